"""
TLS on hostile listeners: both transports, and curl beside them.

Each case of the table is a listener that was really started. Three clients go there: HTTP, WebSocket and curl. What
curl refuses we refuse; what only we refuse says in ``stricter`` why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from OpenSSL import SSL
from twisted.logger import capturedLogs

from commsmgr.errors import TLS_CHECKS, TLSFailed
from tests.certificates import DAY, NOW, Authority, Issued, rsa_key, self_signed, signed_with_sha1
from tests.loopback import Recorder, Recording
from tests.tls_kit import HOST, TOKEN, TransportsCase

Script = Callable[[Recorder], None]
TLS_1_2 = SSL.TLS1_2_VERSION


class Case(NamedTuple):
    """
    A listener and what is to come of it.

    :ivar listener: given the trusted authority, returns a context factory, or a script for plain TCP.
    :ivar check: the check that refuses it; empty when it is to be accepted.
    :ivar words: parts of the error's sentence.
    :ivar stricter: why we refuse what curl accepts.
    """

    listener: Callable[[Authority], Any]
    check: str = ""
    words: tuple[str, ...] = ()
    host: str = HOST
    stricter: str = ""
    settings: Mapping[str, Any] = MappingProxyType({})
    curl: tuple[str, ...] = ()


def leaf(**kwargs: Any) -> Callable[[Authority], Any]:
    """Return a listener with a certificate of the trusted authority, for :data:`HOST` if nothing else is said."""
    kwargs.setdefault("names", [HOST])
    return lambda authority: authority.issue("leaf", **kwargs).server_context()


def below(**kwargs: Any) -> Callable[[Authority], Any]:
    """Return a listener with a certificate of an intermediate issuer, which is sent along."""
    return lambda authority: Authority("Middle", parent=authority, **kwargs).issue(names=[HOST]).server_context()


def speaking(
    ciphers: bytes, *, key: Any = None, minimum: int = TLS_1_2, maximum: int = TLS_1_2
) -> Callable[[Authority], Any]:
    """Return a listener with a good certificate and other ideas about versions and ciphers."""
    return lambda authority: authority.issue(names=[HOST], key=key).server_context(
        ciphers=ciphers, minimum=minimum, maximum=maximum
    )


def without_intermediate(authority: Authority) -> Any:
    issued = Authority("Middle", parent=authority).issue(names=[HOST])
    return Issued(issued.certificate, issued.key).server_context()


def foreign(*, with_root: bool) -> Callable[[Authority], Any]:
    other = Authority("Unknown Root")
    issued = other.issue("leaf", names=[HOST])
    chain = [other.certificate] if with_root else []
    return lambda _: Issued(issued.certificate, issued.key, chain).server_context()


def sha1_leaf(authority: Authority) -> Any:
    issuer = Authority("Middle", parent=authority, key=rsa_key(2048))
    issued = issuer.issue("leaf", names=[HOST])
    return Issued(signed_with_sha1(issued.certificate, rsa_key(2048)), issued.key, issued.chain).server_context(
        ciphers=b"ALL:@SECLEVEL=0"
    )


def sha1_intermediate(authority: Authority) -> Any:
    issuer = Authority("Upper", parent=authority, key=rsa_key(2048))
    middle = Authority("Middle", parent=issuer)
    issued = middle.issue("leaf", names=[HOST])
    chain = [signed_with_sha1(middle.certificate, rsa_key(2048)), issuer.certificate]
    return Issued(issued.certificate, issued.key, chain).server_context(ciphers=b"ALL:@SECLEVEL=0")


def asks(maximum: int) -> Callable[[Authority], Any]:
    """Return a listener that wants a certificate from the agent."""
    return lambda authority: authority.issue(names=[HOST]).server_context(client_authority=authority, maximum=maximum)


def export_cipher(_: Authority) -> Script:
    """Choose TLS_RSA_EXPORT_WITH_RC4_40_MD5 (RFC 2246), which no OpenSSL of today can do: by hand."""

    def script(recorder: Recorder) -> None:
        hello = b"\x03\x03" + bytes(32) + b"\0" + b"\0\x03" + b"\0" + b"\0\x05\xff\x01\0\x01\0"
        message = b"\x02" + len(hello).to_bytes(3, "big") + hello
        recorder.transport.write(b"\x16\x03\x03" + len(message).to_bytes(2, "big") + message)

    return script


def plain_http(_: Authority) -> Script:
    return lambda recorder: recorder.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK")


def hangs_up(_: Authority) -> Script:
    return lambda recorder: recorder.transport.loseConnection()


CASES = {
    # Accepted: without these the others would prove nothing.
    "good": Case(leaf()),
    "good_tls_1_2": Case(speaking(b"", maximum=TLS_1_2)),
    "good_tls_1_3_only": Case(
        speaking(b"", minimum=SSL.TLS1_3_VERSION, maximum=SSL.TLS1_3_VERSION), settings={"minimum_version": "1.3"}
    ),
    "good_rsa": Case(leaf(key=rsa_key(2048))),
    "good_intermediate": Case(below()),
    "good_wildcard": Case(leaf(names=["*.example", "*.backend.example", HOST])),
    "good_name_constraints": Case(below(permitted=["example"], excluded=["other.example"])),
    "good_ipv4": Case(leaf(names=[], ips=["127.0.0.1"]), host="127.0.0.1"),
    "good_ipv6": Case(leaf(names=[], ips=["::1"]), host="::1"),
    # Dates.
    "expired": Case(leaf(not_before=NOW - 9 * DAY, not_after=NOW - DAY), "expired", ("has expired", "CN=leaf")),
    "not_yet_valid": Case(leaf(not_before=NOW + DAY, not_after=NOW + 9 * DAY), "not-yet-valid", ("not valid yet",)),
    "expired_intermediate": Case(
        below(not_after=NOW - DAY), "expired", ("has expired (number 1 of its chain)", "CN=Middle")
    ),
    # Issuers.
    "self_signed": Case(lambda _: self_signed(names=[HOST]).server_context(), "self-signed", ("CN=self",)),
    "unknown_root": Case(foreign(with_root=False), "issuer", ("issuer is not trusted", "CN=Unknown Root")),
    "unknown_root_sent": Case(foreign(with_root=True), "issuer", ("self-signed issuer that is not trusted",)),
    "missing_intermediate": Case(without_intermediate, "issuer", ("issuer is not trusted", "issued by CN=Middle")),
    "non_ca_issuer": Case(below(is_ca=False), "not-a-ca", ("may not issue certificates",)),
    "name_constraints_permitted": Case(
        below(permitted=["other.example"]), "name-constraints", ("outside of what an issuer in its chain may",)
    ),
    "name_constraints_excluded": Case(
        below(excluded=["example"]), "name-constraints", ("among those that an issuer in its chain may not",)
    ),
    "name_constraints_and_a_blank": Case(
        lambda authority: Authority("Middle", parent=authority, excluded=["example"])
        .issue(names=[f"{HOST} "])
        .server_context(),
        "name",
        ("it is for",),
    ),
    "client_only": Case(leaf(client=True), "purpose", ("not issued for servers",)),
    # Names.
    "wrong_name": Case(leaf(names=["other.example"]), "name", ("it is for other.example only",)),
    "wildcard_alone": Case(leaf(names=["*"]), "name", ("it is for * only",)),
    "wildcard_tld": Case(leaf(names=["*.example"]), "name", ("it is for *.example only",)),
    "wildcard_partial": Case(leaf(names=["b*.example", "back*.example"]), "name", ("it is for b*.example",)),
    "wildcard_two_labels": Case(leaf(names=["*.*.example", "*.*"]), "name", ("*.*",)),
    "wildcard_not_leftmost": Case(leaf(names=["backend.*"]), "name", ("backend.* only",)),
    "no_names": Case(
        lambda authority: authority.issue(HOST).server_context(),
        "no-name",
        ("no subjectAltName", f"CN={HOST}"),
        stricter="curl still takes the common name; RFC 9525 section 2 and browsers do not",
    ),
    "ip_against_dns_names": Case(leaf(), "name", (f"it is for {HOST} only",), host="127.0.0.1"),
    "ip_as_a_dns_name": Case(leaf(names=["127.0.0.1"]), "name", ("it is for 127.0.0.1 only",), host="127.0.0.1"),
    "ipv6_against_dns_names": Case(leaf(), "name", (f"it is for {HOST} only",), host="::1"),
    "other_ip": Case(leaf(names=[], ips=["127.0.0.9", "::2"]), "name", ("127.0.0.9, ::2 only",), host="127.0.0.1"),
    # Weak.
    "weak_leaf": Case(
        lambda authority: authority.issue(names=[HOST], key=rsa_key(1024)).server_context(ciphers=b"ALL:@SECLEVEL=0"),
        "weak",
        ("its key is too weak",),
    ),
    "weak_issuer": Case(
        lambda authority: Authority("Middle", parent=authority, key=rsa_key(1024))
        .issue(names=[HOST])
        .server_context(ciphers=b"ALL:@SECLEVEL=0"),
        "weak",
        ("an issuer's key is too weak", "CN=Middle"),
    ),
    "sha1": Case(sha1_leaf, "weak", ("signature algorithm is too weak",)),
    "sha1_intermediate": Case(sha1_intermediate, "weak", ("signature algorithm is too weak (number 1",)),
    # Versions and ciphers.
    "tls_1_0": Case(
        speaking(b"ALL:@SECLEVEL=0", minimum=SSL.TLS1_VERSION, maximum=SSL.TLS1_VERSION), "version", ("older than",)
    ),
    "tls_1_1": Case(
        speaking(b"ALL:@SECLEVEL=0", minimum=SSL.TLS1_1_VERSION, maximum=SSL.TLS1_1_VERSION), "version", ("older than",)
    ),
    "tls_1_2_where_1_3_is_wanted": Case(
        speaking(b""), "version", ("older than",), settings={"minimum_version": "1.3"}, curl=("--tlsv1.3",)
    ),
    "no_forward_secrecy": Case(
        speaking(b"AES128-GCM-SHA256:AES256-GCM-SHA384", key=rsa_key(2048)),
        "ciphers",
        ("no common ground",),
        stricter="curl offers RSA key exchange: who gets the server's key one day can read what was recorded",
    ),
    "cbc": Case(
        speaking(b"ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA"),
        "ciphers",
        ("no common ground",),
        stricter="curl offers CBC: without authenticated encryption every few years brings another padding oracle",
    ),
    "null_cipher": Case(speaking(b"ECDHE-ECDSA-NULL-SHA:@SECLEVEL=0"), "ciphers", ("no common ground",)),
    "anonymous_cipher": Case(speaking(b"AECDH-AES128-SHA:@SECLEVEL=0"), "ciphers", ("no common ground",)),
    "export_cipher": Case(export_cipher, "ciphers", ("cipher that was not offered",)),
    # Handshakes.
    "not_tls": Case(plain_http, "not-tls", ("does not speak TLS",)),
    "hung_up": Case(hangs_up, "closed", ("closed by the other side",)),
    "client_certificate_missing_tls_1_2": Case(
        asks(TLS_1_2), "client-certificate", ("wants a certificate from the agent",)
    ),
    "client_certificate_missing_tls_1_3": Case(
        asks(SSL.TLS1_3_VERSION), "client-certificate", ("wants a certificate from the agent", "certificate required")
    ),
}  # fmt: skip


class TableTests(TransportsCase):
    """Each case of the table, by each of the three; the methods are made below."""

    async def ours(self, case: Case, transport: str) -> None:
        """Go there by one of our transports."""
        listener = case.listener(self.authority)
        tls = hasattr(listener, "getContext")
        if not tls:
            self.server = Recording(listener)
        port = self.listen(listener if tls else None, case.host)
        reach = self.by_http if transport == "http" else self.by_websocket
        with capturedLogs() as events:
            error = await reach(port, case.host, **case.settings)
        await self.gone()
        self.assertEqual(len(self.server.connections), 1)
        refusals = [event for event in events if event.get("event") == "tls.refused"]
        if not case.check:
            self.assertIsNone(error)
            self.assertIn(TOKEN.encode(), self.server.received)
            self.assertEqual(refusals, [])
            return
        assert isinstance(error, TLSFailed), f"expected TLSFailed, found {error!r}"
        self.assertEqual((error.check, error.host), (case.check, case.host))
        for word in case.words:
            self.assertIn(word, str(error))
        self.assertFalse(error.may_have_arrived)
        if tls:
            self.assertEqual(self.server.received, b"", "something was sent to a listener that was refused")
        else:
            self.assertEqual(self.server.received[:1], b"\x16", "no ClientHello")
            for sign in (TOKEN.encode(), b"GET", b"HTTP"):
                self.assertNotIn(sign, self.server.received)
        [line] = refusals
        self.assertEqual((line["check"], line["host"], line["error"]), (case.check, case.host, str(error)))
        self.assertEqual((line["subject"], line["issuer"]), (error.subject, error.issuer))
        if error.subject:
            assert error.not_after is not None
            self.assertEqual(line["not_after"], f"{datetime.fromtimestamp(error.not_after, UTC):%Y-%m-%dT%H:%M:%SZ}")
            self.assertIn(f"certificate {error.subject}, issued by {error.issuer}, valid from", str(error))

    async def curls(self, case: Case) -> None:
        """Go there by curl: it must refuse what we refuse, unless we say why."""
        listener = case.listener(self.authority)
        tls = hasattr(listener, "getContext")
        if not tls:
            self.server = Recording(listener)
        code, said = await self.by_curl(self.listen(listener if tls else None, case.host), case.host, case.curl)
        await self.gone()
        self.assertEqual(code != 0, bool(case.check) and not case.stricter, f"curl said {code}: {said}")


def _method(name: str, case: Case, client: str) -> Callable[[TableTests], Any]:
    async def by_curl(self: TableTests) -> None:
        await self.curls(case)

    async def by_ours(self: TableTests) -> None:
        await self.ours(case, client)

    method = by_curl if client == "curl" else by_ours
    method.__name__ = f"test_{name}_{client}"
    outcome = f"refused: {case.check}" if case.check else "accepted"
    method.__doc__ = f"The listener {name.replace('_', ' ')!r}, by {client}: {outcome}."
    return method


for _name, _case in CASES.items():
    assert not _case.check or _case.check in TLS_CHECKS, _name
    for _client in ("http", "websocket", "curl"):
        setattr(TableTests, f"test_{_name}_{_client}", _method(_name, _case, _client))
