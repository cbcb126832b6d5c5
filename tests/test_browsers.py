"""Requests that web pages make: which are another page's, and what names this machine."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from commsmgr.browsers import is_foreign, names_loopback


class Names(SynchronousTestCase):
    def test_hosts(self) -> None:
        """Only the loopback's own names and addresses are this machine; what merely begins with one is not."""
        for host in (
            "localhost",
            "LOCALHOST.",
            "localhost:1",
            "127.0.0.1",
            "127.9.9.9:80",
            "[::1]",
            "[::1]:8",
            " [::1] ",
        ):
            self.assertTrue(names_loopback(host), host)
        for host in (
            "", ":80", "::1", "10.0.0.1", "0.0.0.0", "[::]", "[fe80::1]", "[::2]", "localhost.evil.example",
            "127.0.0.1.evil.example", "evil.example", "localhost@evil.example", "127.1", "2130706433", "0x7f000001",
            "[::1]evil.example", "localhost:evil.example", "localhost:1:2", "[localhost", "[::1]:1]",
        ):  # fmt: skip
            self.assertFalse(names_loopback(host), host)


class Pages(SynchronousTestCase):
    OWN = "http://localhost:9464"

    def test_own(self) -> None:
        """A page's own requests, what somebody typed, and what no browser sends."""
        for origins, sites in (
            ([], []),
            ([self.OWN], []),
            (["HTTP://LOCALHOST:9464"], ["same-origin"]),
            ([], ["none"]),
            ([], ["Same-Origin"]),
        ):
            self.assertFalse(is_foreign(self.OWN, origins, sites), (origins, sites))

    def test_foreign(self) -> None:
        """Any other origin, none at all, an unknown site, and one good value beside a bad one."""
        for origins, sites in (
            (["http://evil.example"], []),
            (["null"], []),
            ([""], []),
            (["https://localhost:9464"], []),
            (["http://localhost"], []),
            (["http://localhost:9464.evil.example"], []),
            ([self.OWN], ["cross-site"]),
            ([], ["same-site"]),
            ([], ["cross-site"]),
            ([], [""]),
            ([], ["whatever comes next"]),
            ([self.OWN, "http://evil.example"], []),
        ):
            self.assertTrue(is_foreign(self.OWN, origins, sites), (origins, sites))
