"""The tree of errors: facts, advice, and whether trying again can help."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

from twisted.trial.unittest import SynchronousTestCase

from commsmgr import errors
from commsmgr.errors import CommsError, ConfigError


def tree(error: type[CommsError]) -> Iterator[type[CommsError]]:
    """Yield the class and what is below it, as far as it stands in the module."""
    yield error
    for below in error.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from tree(below)


class ErrorTests(SynchronousTestCase):
    """What every error has."""

    def test_drawn_tree(self) -> None:
        """The tree at the top of the module is the tree of the classes."""
        drawn = re.findall(r"^ {4}([│├└─ ]*)(\w+)", errors.__doc__ or "", re.MULTILINE)
        depths = {name: len(branch) // 4 for branch, name in drawn}
        classes = list(tree(CommsError))
        self.assertEqual(set(depths), {each.__name__ for each in classes})
        for each in classes:
            self.assertEqual(depths[each.__name__], len(each.__mro__) - len(CommsError.__mro__), each)

    def test_fact(self) -> None:
        """Without a fact the first line of the docstring speaks; advice stands behind."""
        for each in tree(CommsError):
            if each in (ConfigError, errors.HTTPStatusError):
                continue
            bare, said = each(), each("the fact")
            self.assertTrue(bare.fact.endswith("."), each)
            self.assertEqual(said.fact, "the fact")
            self.assertEqual(str(said), f"the fact ({each.advice})" if each.advice else "the fact")

    def test_retryable(self) -> None:
        """What can go away by itself may be tried again; mistakes of the caller or the configuration never."""
        retryable = {each.__name__ for each in tree(CommsError) if each.retryable}
        self.assertEqual(
            retryable,
            {
                "QueueFull", "SpoolWriteFailed", "TokenError", "DeadlineExceeded", "TransportError", "ConnectFailed",
                "ProxyRefused",
                "TLSFailed", "UpgradeRefused", "ConnectionEnded", "ClosedByPeer", "PeerSilent", "PeerViolation",
                "RateExceeded", "BreakerOpen", "HTTPStatusError",
            },
        )  # fmt: skip

    def test_config_error(self) -> None:
        """A mistake of the configuration says where it is; further ones follow, a line each."""
        other = ConfigError("wrong too", key="b", source="file.toml")
        error = ConfigError("is wrong", key="a.b", source="environment", others=(other,))
        self.assertEqual(str(error), "environment: a.b: is wrong\nfile.toml: b: wrong too")
        self.assertEqual((error.key, error.source, error.others), ("a.b", "environment", (other,)))
        self.assertEqual(str(ConfigError("is wrong")), "code: is wrong")

    def test_data(self) -> None:
        """Errors carry what a decision needs."""
        self.assertTrue(errors.DeadlineExceeded(may_have_arrived=True).may_have_arrived)
        self.assertFalse(errors.ConnectFailed().may_have_arrived)
        refused = errors.UpgradeRefused("no", status=503, retry_after=5.0)
        self.assertEqual((refused.status, refused.retry_after, refused.may_have_arrived), (503, 5.0, False))
        closed = errors.ClosedByPeer(code=1011)
        self.assertEqual((closed.code, closed.may_have_arrived), (1011, True))
        self.assertEqual(errors.BreakerOpen(retry_in=2.0).retry_in, 2.0)
        answer = errors.HTTPStatusError("no", status=404, body=b"x", retry_after=1.0)
        self.assertEqual((answer.status, answer.body, answer.retry_after), (404, b"x", 1.0))
        self.assertTrue(answer.may_have_arrived)

    def test_pickled(self) -> None:
        """An error that is sent to another process keeps its words and its data."""
        error = pickle.loads(pickle.dumps(errors.ClosedByPeer("gone", code=1011)))
        self.assertEqual((str(error), error.code), ("gone", 1011))
