"""
Makes ``twistd commsmgr`` and ``twistd commsmgr-backend`` known.

``twistd`` imports every plugin module whenever it needs the list of commands: the statements here only name modules,
which are imported once their command was chosen.
"""

from twisted.application.service import ServiceMaker

agent = ServiceMaker(
    "commsmgr",
    "commsmgr.tap",
    "Connect this machine's agent to its backend over HTTP and WebSocket.",
    "commsmgr",
)

backend = ServiceMaker(
    "commsmgr reference backend",
    "commsmgr.backend.tap",
    "Run the reference backend, for development and tests.",
    "commsmgr-backend",
)
