"""
Whole agents, backends and the network between them on one virtual clock, with seeded faults.

What is what, from the bottom up; each of them imports those before it only (of those behind it, types at most):

================  ===================================================================================================
``clock``         virtual time: calls in order, and whose turn it is
``wire``          one direction of one TCP connection: latency, bandwidth, loss, windows
``network``       hosts, names, and the paths between them, which can be cut, narrowed and swallowed
``transport``     a Twisted transport on two wires
``reactor``       what one process takes for the reactor, and what is left of it when it stops
``setting``       what stays the same in a world: dialect, bounds, how many agents
``history``       all that happened in a world
``witness``       notes, inside commsmgr, what is promised and what becomes of it
``process``       a program that starts, stops, dies, loses power; its disk (``tests/faulty_vfs.py``) and its locks
``agent``         the real manager with a handler that writes down what it does
``backend``       the reference backend, and reverse proxies
``workload``      what agents are told to do
``faults``        what goes wrong, drawn from the seed before anything runs
``oracles``       what must be true of every history
``scenario``      a world from its first moment to its last
``runner``        many seeds, and what is to be said of them
``mutants``       commsmgr with one mistake each, to see that the oracles notice
================  ===================================================================================================

Real are the manager, the backend, Twisted's and autobahn's protocols, treq, and SQLite with its files. Not real are the
reactor, TCP, names and time; the disk's behaviour, below SQLite; the spool's thread (work is done at one moment and
known at a later one); what ``commsmgr.spool.ballast`` asks ``os`` about free room; ``sqlite3`` as the backend's ledger
sees it (it opens databases for itself alone, for the disk has no shared memory). Some constants are made small, so that
pages, checkpoints and housekeeping happen within a minute: see ``process.adapt``. Locks are real: those of a dead
process are found below ``/proc/self/fd`` and closed.

Not simulated are files that are torn, foreign or newer (``tests/test_spool_salvage.py``, ``test_spool_disk.py``), TLS
(``tests/test_transport_tls.py``), a backend whose disk fails, and a machine that sleeps or whose
own timers stand still (the tests of ``commsmgr.clock``).

To read a seed that was objected to
    Run ``python -m tests.simulation --seed N --history``: setting, plan, one line for each thing that happened, and
    at the end what the oracles say. Take the id or the tag from an oracle's sentence and look for it from the top: a
    command is ``gave``, ``ran``, its result ``kept`` (it has an id from here on), ``stored``. Then look at what else
    happened between the last line that is right and the first that is missing. The same seed gives the same lines to
    the byte, so prints may be added anywhere and the seed be run again.

To add a fault
    Write a generator in ``faults`` with ``@kind``: what it does before its ``yield`` begins the fault, what it does
    after ends it. Whatever it breaks must be whole again at the end, or be mended in ``World._heal``. All plans change
    with it, and with them which seeds show what.

To add an oracle
    Write a function of the history and of the agents' ends in ``oracles``, add it to ``ORACLES``, and a test with a
    planted line to ``tests/test_simulation.py``. What it must know is noted in ``agent``, ``backend`` or ``witness``.
    Add a mutant that it alone would notice.
"""
