"""
Fuzzing guided by coverage: what arrives from outside, as bytes that nobody has thought of.

A target is a module of this package. It has

- ``one(data)``: lets the code under test take ``data``, and raises when it breaks one of its promises. It needs nothing
  but the package, so that every input is also a test;
- ``seeds()``: good inputs to begin with;
- ``TOKENS``: byte strings that mean something there;
- ``INSTRUMENT``: the modules whose branches guide the search.

Run them with ``tox -e fuzz``, or ``python -m tests.fuzz [TARGET ...] --seconds N`` (which needs atheris: the extra
``fuzz``). Each target runs in a process of its own, bounded in time and memory. An input that breaks a promise is put
into ``findings/TARGET/``: with the repair it is committed, and ``tests/test_fuzz_findings.py`` replays it from then on,
beside inputs that are kept because each leads to another end. To look at one alone:
``python -m tests.fuzz --replay FILE``.

How an input is made of data: the first byte or two say how the rest is cut into packets, and what happens meanwhile
(see :class:`~tests.fuzz.kit.Input`). The rest is what the peer sends, as it is.
"""
