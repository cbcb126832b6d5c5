"""The distribution's metadata. ``pyproject.toml`` names the build backend and configures tools, nothing else."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

# The package is not imported to learn its version: its dependencies are not installed while it is being built.
VERSION = re.search(r'^__version__ = "([^"]+)"$', (HERE / "commsmgr" / "_version.py").read_text("utf-8"), re.MULTILINE)
assert VERSION is not None, "commsmgr/_version.py names no version"

PSUTIL = ["psutil>=7.0"]
TEST = ["coverage>=7.10", "hypothesis>=6.100", *PSUTIL]
FUZZ = ["atheris>=3.0"]
BENCH = [
    "aiohttp>=3.14",
    "diskcache>=5.6",
    "matplotlib>=3.10",
    "nats-py>=2.16",
    "paho-mqtt>=2.1",
    "persist-queue>=1.1",
    "picows>=2.0",
    "python-socketio[asyncio_client]>=5.16",
    "requests>=2.32",
    "websockets>=16.0",
]
DOCS = ["furo>=2025.9", "sphinx>=8.2"]
DEV = [
    "build>=1.2",
    "cyclonedx-bom>=7.0",
    "mypy>=2.0",
    "mypy-zope>=1.0.17",
    "packaging>=25.0",
    "pip-audit>=2.9",
    "ruff>=0.14",
    "towncrier>=25.8",
    "tox>=4.30",
]

setup(
    name="commsmgr",
    version=VERSION.group(1),
    description="Connects an agent to its backend over HTTP and WebSocket, as a Twisted service, losing nothing",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author="commsmgr maintainers",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Twisted",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: System :: Monitoring",
        "Topic :: System :: Networking",
        "Typing :: Typed",
    ],
    keywords="agent backend heartbeat twisted websocket",
    python_requires=">=3.11",
    # No package "twisted" here: that one belongs to Twisted, which looks for plugins in every "twisted/plugins"
    # directory on the path, and there must be no __init__.py in ours.
    packages=[*find_packages(include=["commsmgr", "commsmgr.*"]), "twisted.plugins"],
    package_data={"commsmgr": ["py.typed", "data/*.service"], "commsmgr.backend": ["*.html", "*.css", "*.js"]},
    entry_points={"console_scripts": ["commsmgr = commsmgr.cli:main"]},
    zip_safe=False,
    # An editable install puts this directory on the path. Setuptools' own way maps the packages one by one, and Twisted
    # would not find the plugin.
    options={"editable_wheel": {"mode": "compat"}},
    # The oldest versions that the tests have been run with.
    install_requires=[
        "twisted[tls]>=26.10",
        "treq>=26.7",
        "autobahn>=26.10.2",
        "pyopenssl>=26.4",
        "service-identity>=26.1",
        "prometheus-client>=0.26",
        "msgspec>=0.20",
        "hyperlink>=21.0",
        "cryptography>=46.0",
    ],
    extras_require={
        "psutil": PSUTIL,
        "test": TEST,
        "fuzz": FUZZ,
        "bench": BENCH,
        "docs": DOCS,
        "dev": [*DEV, *TEST, *DOCS],
    },
)
