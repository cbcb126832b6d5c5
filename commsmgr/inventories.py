"""
The inventory, put together and sent: a state, of which a newer one replaces an unsent older one in the outbox. Content
that the backend already has is not sent again before ``inventory.resend_after``.

What a backend has is the last that came to it, and that need not be the last that was sent: a request that was given up
on a slow way, perhaps by an agent that has died since, may arrive after its successor. Nothing can be read from times
and ids then, for clocks step. So a commsmgr.v1 backend says in each answer to a heartbeat which inventory it has, and
if that is another than the one it took last, the next inventory is sent even if nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import TypeAlias

import msgspec
from twisted.internet.defer import Deferred, DeferredLock
from twisted.logger import Logger

from commsmgr import config
from commsmgr.errors import InvalidMessage
from commsmgr.interfaces import MachineSource
from commsmgr.machine import Identity, stable_view
from commsmgr.messages import Inventory, InventoryAnswer, JSONObject
from commsmgr.observe.metrics import Metrics
from commsmgr.outgoing import encode_data
from commsmgr.redact import Redactor
from commsmgr.sanitise import Malformed
from commsmgr.session.wire import body_decoder
from commsmgr.spool import Entry, Lane, Outbox
from commsmgr.transport.http import HTTPResponse

_Stock: TypeAlias = tuple[bytes, bytes]

LONG = 64 << 10
"""Bytes from which on an inventory is looked at in a thread."""


class Inventories:
    """
    Sends inventories through the outbox.

    :param in_thread: runs a function in a thread, since taking stock of a machine takes a while, and so does looking
        for secrets in what is long.
    :ivar last_accepted: when a backend took one, as RFC 3339; empty for never.
    :ivar accepted_checksum: of the one that a backend took last; empty for none, or when a backend has another.
    """

    log = Logger()

    def __init__(
        self,
        *,
        identity: Identity,
        machine: MachineSource,
        outbox: Outbox,
        whole: config.Config,
        redactor: Redactor,
        in_thread: Callable[[Callable[[], _Stock]], Deferred[_Stock]],
        wall: Callable[[], float],
        timestamp: Callable[[], str],
        new_id: Callable[[], str],
        metrics: Metrics,
    ) -> None:
        self._identity = identity
        self._machine = machine
        self._outbox = outbox
        self._settings = whole.inventory
        self._max_body_bytes = whole.delivery.max_body_bytes
        self._answers = body_decoder(InventoryAnswer, whole)
        self._redactor = redactor
        self._in_order = DeferredLock()
        self._in_thread = in_thread
        self._wall = wall
        self._timestamp = timestamp
        self._new_id = new_id
        self._metrics = metrics
        self._sent: tuple[bytes, float] = (b"", 0.0)
        self._fingerprints: dict[str, bytes] = {}
        self.last_accepted = ""
        self.accepted_checksum = ""

    async def send(self, data: JSONObject | None = None, *, force: bool = False) -> str | None:
        """
        Put an inventory into the outbox.

        :param data: the inventory, of what JSON has: dicts with texts as keys, lists, texts, numbers, truth values,
            None; it may be changed as soon as this has returned. None: take it from the machine.
        :param force: send it although the backend has the same.
        :return: the message's id once it is durable, or None when the backend already has this content.
        :raise InvalidMessage: ``data`` is nothing that JSON can say, or larger than ``delivery.max_body_bytes``.
        :raise SpoolError: it could not be kept.
        """
        encoded = None if data is None else self._encoded(data)
        # A later one must not be overtaken by one that took longer in its thread.
        await self._in_order.acquire()
        try:
            if encoded is None:
                stock = await self._in_thread(lambda: self._taken(self._encoded(self._machine.inventory())))
            elif len(encoded) > LONG:
                stock = await self._in_thread(lambda: self._taken(encoded))
            else:
                stock = self._taken(encoded)
            return await self._put(stock, force)
        finally:
            self._in_order.release()

    def _encoded(self, data: object) -> bytes:
        if not isinstance(data, dict):
            raise InvalidMessage(f"an inventory is a JSON object, not {type(data).__name__}")
        encoded = encode_data(data)
        if len(encoded) > self._max_body_bytes:
            raise InvalidMessage(f"the inventory has {len(encoded)} bytes, more than {self._max_body_bytes}")
        return encoded

    def _taken(self, encoded: bytes) -> _Stock:
        """Return what will be sent, and its fingerprint; in whatever thread."""
        data = self._redactor.data(msgspec.json.decode(encoded))
        redacted = encode_data(data)
        return redacted, sha256(msgspec.json.encode(stable_view(data), order="deterministic")).digest()

    async def _put(self, stock: _Stock, force: bool) -> str | None:
        encoded, fingerprint = stock
        known, at = self._sent
        if not force and fingerprint == known and 0 <= self._wall() - at < self._settings.resend_after:
            self._metrics.message("inventory", "out", "unchanged")
            return None
        body = msgspec.json.encode(
            Inventory(
                machine_id=self._identity.machine_id,
                timestamp=self._timestamp(),
                checksum=sha256(encoded).hexdigest(),
                data=msgspec.Raw(encoded),
            )
        )
        if len(body) > self._max_body_bytes:
            raise InvalidMessage(f"the inventory has {len(body)} bytes, more than {self._max_body_bytes}")
        message_id = self._new_id()
        await self._outbox.put(lane=Lane.STATE, kind="inventory", id=message_id, body=body, key="inventory")
        self._fingerprints = {message_id: fingerprint}
        return message_id

    def delivered(self, entry: Entry, response: HTTPResponse) -> None:
        """The backend has taken an inventory."""
        self._sent = (self._fingerprints.pop(entry.id, b""), self._wall())
        self.last_accepted = self._timestamp()
        sent = msgspec.json.decode(entry.body, type=Inventory).checksum
        try:
            received = self._answers.decode(response.body).checksum_received
        except Malformed as error:
            self._metrics.invalid(error.reason)
            received = ""
        if received and received != sent:
            self._differs(received, sent)
            return
        self.accepted_checksum = sent
        self.log.info(
            "inventory accepted after {milliseconds:.0f} ms",
            event="inventory.accepted",
            milliseconds=response.elapsed * 1000,
            message_id=entry.id,
        )

    def held(self, checksum: str, *, expected: str) -> None:
        """
        A backend has answered a heartbeat, and said which inventory it has.

        Nothing can be said while one is on its way: it may have come already, and will if it has not.

        :param checksum: of that inventory, empty if it has none.
        :param expected: :attr:`accepted_checksum` when the heartbeat was sent.
        """
        if expected and expected == self.accepted_checksum != checksum and not self._outbox.stats.states:
            self._differs(checksum, expected)

    def _differs(self, received: str, sent: str) -> None:
        """Send an inventory the next time even if it is unchanged."""
        self._metrics.message("inventory", "out", "checksum-differs")
        self._sent = (b"", 0.0)
        self.accepted_checksum = ""
        self.log.warn(
            "the backend has an inventory with checksum {received}, sent was {sent}; it will be sent again",
            event="inventory.checksum-differs",
            received=received[:80],
            sent=sent,
        )
