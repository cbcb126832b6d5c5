"""
The reference backend: a small server that speaks both dialects, for the demo, the tests and the conformance kit.

It is made for development: one process, one machine, SQLite in the reactor's thread, no user management, and a console
that can make it misbehave on purpose. Do not run agents that matter against it.
"""

from __future__ import annotations

from commsmgr.backend.events import BackendEvent
from commsmgr.backend.faults import Fault, Faults
from commsmgr.backend.service import ReferenceBackend
from commsmgr.backend.switchboard import MachineNotConnected

__all__ = ["BackendEvent", "Fault", "Faults", "MachineNotConnected", "ReferenceBackend"]
