"""Makes ``twistd libraries`` known, where the directory above this one's is on Python's path."""

from twisted.application.service import ServiceMaker

libraries = ServiceMaker(
    "libraries", "benchmarks.programs.libraries", "Do nothing, with libraries imported.", "libraries"
)
