"""
An HTTP/1.1 server that takes posts as fast as it can, without and with TLS, and counts those that were as they should.

``POST /posts/512`` with a token, an ``application/json`` body of 512 bytes and nothing else: 200. What is wrong: 400.
``GET /count``: how many were right so far. ``GET /answers/512``: 512 bytes.
It says its ``port``, its ``tls_port``, and in which file its issuer is (``ca``).
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl

import msgspec

from tests.certificates import Authority

ANSWER = b'{"status":"accepted"}'
TOKEN = "a-token-of-an-agent-0123456789"

_REQUEST_LINE = re.compile(rb"POST /posts/(\d+) HTTP/1\.1\r\n")
_ANSWERS = re.compile(rb"GET /answers/(\d+) ")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
_TYPE = re.compile(rb"\r\ncontent-type: *application/json", re.IGNORECASE)
_AUTHORIZATION = re.compile(rb"\r\nauthorization: *Bearer " + TOKEN.encode() + b"\r\n", re.IGNORECASE)


class Count:
    """How many were right so far."""

    right = 0


class Posts(asyncio.Protocol):
    """One connection."""

    transport: asyncio.Transport

    def __init__(self, count: Count) -> None:
        self._count = count
        self._received = b""
        self._left = 0
        self._right = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Take what came; of bodies only the length matters."""
        while True:
            if self._left:
                taken = min(self._left, len(data))
                self._left -= taken
                data = data[taken:]
                if self._left:
                    return
                self._answer()
            self._received += data
            head, end, data = self._received.partition(b"\r\n\r\n")
            if not end:
                return
            self._received = b""
            self._begin(head + b"\r\n")
            if not self._left:
                self._answer()

    def _begin(self, head: bytes) -> None:
        request, length = _REQUEST_LINE.match(head), _LENGTH.search(head)
        self._left = int(length[1]) if length else 0
        self._right = (
            request is not None
            and int(request[1]) == self._left
            and _TYPE.search(head) is not None
            and _AUTHORIZATION.search(head) is not None
        )
        self._head = head

    def _answer(self) -> None:
        self._count.right += self._right
        status, body = b"200 OK", ANSWER
        if self._head.startswith(b"GET /count "):
            body = str(self._count.right).encode()
        elif wanted := _ANSWERS.match(self._head):
            body = b"a" * int(wanted[1])
        elif not self._right:
            status = b"400 Bad Request"
        self.transport.write(
            b"HTTP/1.1 %s\r\nServer: posts\r\nDate: Sat, 28 Nov 2026 12:00:00 GMT\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)
        )


async def main() -> None:
    """Serve until killed."""
    authority = Authority("Benchmarks")
    paths = authority.issue(names=["localhost"], ips=["127.0.0.1"]).save(os.path.abspath("issued"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(paths.cert_pem, paths.key_pem)
    loop = asyncio.get_running_loop()
    count = Count()
    plain = await loop.create_server(lambda: Posts(count), "127.0.0.1", 0)
    secure = await loop.create_server(lambda: Posts(count), "127.0.0.1", 0, ssl=context)
    address = {
        "port": plain.sockets[0].getsockname()[1],
        "tls_port": secure.sockets[0].getsockname()[1],
        "ca": authority.save_pem(os.path.abspath("ca.pem")),
    }
    print(msgspec.json.encode(address).decode(), flush=True)
    await asyncio.gather(plain.serve_forever(), secure.serve_forever())


if __name__ == "__main__":
    asyncio.run(main())
