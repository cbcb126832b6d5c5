"""Pins: which keys count, and that a pin is one more condition and never a way around another."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from OpenSSL import SSL
from OpenSSL.crypto import X509
from twisted.trial.unittest import SynchronousTestCase

from commsmgr.errors import TLSFailed
from commsmgr.transport.certificate import pin
from tests.certificates import DAY, NOW, Authority, Issued, rsa_key, self_signed
from tests.tls_kit import HOST, TOKEN, TransportsCase

OTHER = "sha256//" + b64encode(bytes(32)).decode()


def pin_of(issued: Issued) -> str:
    """Return the pin of its key, made without the code under test."""
    key = issued.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return "sha256//" + b64encode(sha256(key).digest()).decode()


class PinTests(SynchronousTestCase):
    """The pin of a certificate."""

    def test_same_key(self) -> None:
        """A certificate renewed for the same key has the same pin, another key another one."""
        authority = Authority()
        one, two, other = authority.issue("one"), authority.issue("two"), authority.issue("one")
        renewed = authority.issue("one", key=one.key)
        pins = [pin(X509.from_cryptography(each.certificate)) for each in (one, renewed, two, other)]
        self.assertEqual(pins[0], pins[1])
        self.assertEqual(len(set(pins)), 3)
        self.assertEqual(pins[0], pin_of(one))


class PinnedTests(TransportsCase):
    """Both transports against real listeners."""

    def setUp(self) -> None:
        super().setUp()
        self.middle = Authority("Middle", parent=self.authority)
        self.leaf = self.middle.issue("leaf", names=[HOST])

    async def accepted(self, issued: Issued, pins: list[str], **settings: Any) -> None:
        """Both speak to the listener."""
        port = self.listen(issued.server_context())
        for reach in (self.by_http, self.by_websocket):
            self.assertIsNone(await reach(port, pins=tuple(pins), **settings))
        self.assertEqual(self.server.received.count(TOKEN.encode()), 2)
        await self.gone()

    async def refused(self, context: Any, pins: list[str], check: str, *words: str, **settings: Any) -> None:
        """Neither does, and neither sends a byte."""
        port = self.listen(context)
        for reach in (self.by_http, self.by_websocket):
            error = await reach(port, pins=tuple(pins), **settings)
            assert isinstance(error, TLSFailed), repr(error)
            self.assertEqual(error.check, check)
            for word in words:
                self.assertIn(word, str(error))
        await self.gone()
        self.assertEqual(self.server.received, b"")
        self.assertEqual(len(self.server.connections), 2)

    async def test_leaf(self) -> None:
        """The backend's own key."""
        await self.accepted(self.leaf, [pin_of(self.leaf), OTHER])

    async def test_intermediate(self) -> None:
        """The key of an issuer that was sent along and has a part in the chain."""
        await self.accepted(self.leaf, [OTHER, pin_of(self.middle)])

    async def test_root(self) -> None:
        """The key of the root, which was not sent along."""
        await self.accepted(self.leaf, [pin_of(self.authority)])

    async def test_rotation_to_the_backup(self) -> None:
        """The backend goes over to the key that was pinned in advance, and back there is no way for anybody else."""
        spare = self.middle.issue("leaf", names=[HOST])
        pins = [pin_of(self.leaf), pin_of(spare)]
        await self.accepted(spare, pins)
        third = self.middle.issue("leaf", names=[HOST])
        self.server.connections.clear()
        await self.refused(third.server_context(), pins, "pin", "no key of its chain is among tls.pins", pin_of(third))

    async def test_none(self) -> None:
        """No pin matches: the certificate is named, and what its pin is."""
        await self.refused(self.leaf.server_context(), [OTHER], "pin", "CN=leaf", pin_of(self.leaf))

    async def test_client_certificate_is_not_shown(self) -> None:
        """A mismatch ends the handshake before the agent's certificate is sent, over TLS 1.2 too."""
        own = self.authority.issue("agent", client=True).save(self.mktemp())
        seen: list[Any] = []
        context: Any = self.leaf.server_context(client_authority=self.authority, maximum=SSL.TLS1_2_VERSION)
        context.getContext().set_verify(
            SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, lambda *arguments: bool(seen.append(arguments)) or True
        )
        await self.refused(context, [OTHER], "pin", certificate=own.cert_pem, key=own.key_pem)
        self.assertEqual(seen, [])

    async def test_certificate_that_only_comes_along(self) -> None:
        """Another trusted issuer's certificate, with those of the pinned chain sent beside it, is refused."""
        rogue = Authority("Rogue")
        issued = rogue.issue("impostor", names=[HOST])
        with open(self.ca_file, "ab") as file:
            file.write(rogue.pem)
        pins = [pin_of(self.leaf), pin_of(self.middle), pin_of(self.authority)]
        beside = [self.leaf.certificate, self.middle.certificate, self.authority.certificate]
        disguised = Issued(issued.certificate, issued.key, beside)
        await self.refused(disguised.server_context(), pins, "pin", "CN=impostor")
        # The rogue's certificate is good but for that.
        self.server.connections.clear()
        await self.accepted(disguised, [])

    async def test_wrong_name(self) -> None:
        """A pinned key with another name."""
        issued = self.middle.issue("leaf", names=["other.example"])
        await self.refused(issued.server_context(), [pin_of(issued), pin_of(self.middle)], "name", "other.example only")

    async def test_untrusted(self) -> None:
        """A pinned key that nobody vouches for."""
        issued = self_signed(names=[HOST])
        await self.refused(issued.server_context(), [pin_of(issued)], "self-signed")

    async def test_expired(self) -> None:
        """A pinned key in a certificate that has expired."""
        issued = self.middle.issue(names=[HOST], not_before=NOW - 3 * DAY, not_after=NOW - DAY)
        await self.refused(issued.server_context(), [pin_of(issued)], "expired")

    async def test_as_curl_does(self) -> None:
        """For keys of all kinds our pin is the one that curl takes, and curl refuses another one."""
        for key in (None, rsa_key(2048), rsa_key(3072), ed25519.Ed25519PrivateKey.generate()):
            issued = self.authority.issue(names=[HOST], key=key)
            port = self.listen(issued.server_context())
            ours = pin(X509.from_cryptography(issued.certificate))
            for given, expected in ((ours, 0), (OTHER, 90)):
                code, said = await self.by_curl(port, arguments=["--pinnedpubkey", given])
                self.assertEqual(code, expected, said)
            self.assertIsNone(await self.by_http(port, pins=(OTHER, ours)))
        await self.gone()
