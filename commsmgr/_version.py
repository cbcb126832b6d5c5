"""The version of the distribution, said once: read by ``setup.py``, imported by the package."""

__version__ = "0.1.0"
