"""
Proxies for tests: squid and tinyproxy as processes, and one within the test that does what it is told.

Real ones listen on a port that was free a moment ago; where somebody else was quicker another one is tried.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import reactor as installed
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, connectProtocol
from twisted.internet.error import ConnectError
from twisted.internet.protocol import Protocol, ServerFactory
from twisted.internet.task import deferLater

from tests.certificates import Issued
from tests.processes import PATIENCE, Program

reactor: Any = installed

USER, PASSWORD = "agent", "open-sesame"
_HASHED = "$1$tests$TOWNMHhlhvcG8WEUObD1z0"
""":data:`PASSWORD` for basic_ncsa_auth: ``openssl passwd -1 -salt tests open-sesame``."""

_ATTEMPTS = 5

_TINYPROXY = """
Port {port}
Listen 127.0.0.1
Timeout 60
MaxClients 50
Allow 127.0.0.1
{more}
"""

# As root it gives up its rights, but only after it has read this file and the certificate.
_SQUID = """
{listen} 127.0.0.1:{port} {tls}
pid_filename none
cache deny all
access_log none
cache_store_log none
cache_log stdio:/dev/stderr
shutdown_lifetime 0 seconds
pinger_enable off
netdb_filename none
coredump_dir none
cache_mem 0
memory_pools off
max_filedescriptors 512
{more}
"""


def program(name: str) -> str:
    """Return where the program ``name`` is, which the Debian package of the same name brings."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise AssertionError(f"tests of proxies need the program {name}: install the Debian package {name}")
    return found


class RealProxy:
    """
    A proxy in a process of its own.

    :ivar port: where it listens on 127.0.0.1.
    """

    def __init__(self, directory: Path, *, password: bool, tls: Issued | None, allow: str) -> None:
        self.directory = directory
        self.port = 0
        self.process = Program()
        self._password = password
        self._tls = tls
        self._allow = allow

    async def start(self) -> None:
        """Start it: at the port it had before, or else at a free one."""
        chosen = self.port
        for _ in range(_ATTEMPTS):
            self.port = chosen or _free_port()
            command = self.command()
            self.process = Program()
            reactor.spawnProcess(self.process, command[0], command, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
            if await self._listens():
                return
            await self.kill()
        raise AssertionError(f"{type(self).__name__} does not start:\n{self.process.text}")

    async def _listens(self) -> bool:
        for _ in range(int(PATIENCE / 0.02)):
            if self.process.code is not None:
                return False
            try:
                knock = await connectProtocol(TCP4ClientEndpoint(reactor, "127.0.0.1", self.port), Protocol())
            except ConnectError:
                await deferLater(reactor, 0.02)
            else:
                knock.transport.abortConnection()
                return True
        return False

    async def kill(self) -> None:
        """End it at once, with all its connections."""
        await self.process.end(signal.SIGKILL)

    def command(self) -> list[str]:
        """Write the configuration; return the command."""
        raise NotImplementedError


class Tinyproxy(RealProxy):
    """Debian's tinyproxy, which knows no TLS itself."""

    def command(self) -> list[str]:
        more = f"BasicAuth {USER} {PASSWORD}" if self._password else ""
        path = self.directory / "tinyproxy.conf"
        path.write_text(_TINYPROXY.format(port=self.port, more=more))
        return [program("tinyproxy"), "-d", "-c", str(path)]


class Squid(RealProxy):
    """Debian's squid, which is built with GnuTLS."""

    def command(self) -> list[str]:
        path = self.directory / "squid.conf"
        more, tls = [], ""
        if self._password:
            passwords = self.directory / "passwords"
            passwords.write_text(f"{USER}:{_HASHED}\n")
            # Its helper reads it without the rights of root.
            passwords.chmod(0o644)
            more += [
                f"auth_param basic program /usr/lib/squid/basic_ncsa_auth {passwords}",
                "auth_param basic children 1 startup=1",
                "auth_param basic realm tests",
                "acl known proxy_auth REQUIRED",
                "http_access allow known",
            ]
        else:
            more.append(f"http_access {self._allow}")
        if self._tls is not None:
            both = self.directory / "squid.pem"
            both.write_bytes(self._tls.cert_pem + self._tls.key_pem)
            tls = f"tls-cert={both}"
        listen = "https_port" if self._tls is not None else "http_port"
        path.write_text(_SQUID.format(listen=listen, port=self.port, tls=tls, more="\n".join(more)))
        return [program("squid"), "-N", "-n", self._name, "-f", str(path)]

    @property
    def _name(self) -> str:
        return f"commsmgr{os.getpid()}x{self.port}"

    async def kill(self) -> None:
        await super().kill()
        # What it leaves in shared memory, even after an orderly end.
        for path in Path("/dev/shm").glob(f"{self._name}-*"):
            path.unlink()


async def real_proxy(
    case: Any,
    kind: type[RealProxy],
    *,
    password: bool = False,
    tls: Issued | None = None,
    allow: str = "allow all",
) -> RealProxy:
    """
    Return a proxy that listens until the test ``case`` ends.

    :param password: ask for :data:`USER` and :data:`PASSWORD`.
    :param tls: speak TLS with clients (squid only).
    :param allow: squid's rule, without a password.
    """
    directory = Path(tempfile.mkdtemp(prefix="commsmgr-proxy-"))
    directory.chmod(0o755)
    case.addCleanup(shutil.rmtree, directory)
    proxy = kind(directory, password=password, tls=tls, allow=allow)
    case.addCleanup(proxy.kill)
    await proxy.start()
    return proxy


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Outward(Protocol):
    def __init__(self, client: Any) -> None:
        self.client = client

    def dataReceived(self, data: bytes) -> None:
        self.client.transport.write(data)

    def connectionLost(self, reason: Any = None) -> None:
        self.client.transport.loseConnection()


class _Client(Protocol):
    """One client of a :class:`TunnelProxy`."""

    def __init__(self, proxy: TunnelProxy) -> None:
        self.proxy = proxy
        self.head = b""
        self.outward: Any = None
        self._saying: Any = None
        self.lost: Deferred[None] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        if self.outward is not None:
            self.proxy.carried += data
            self.outward.transport.write(data)
            return
        self.head += data
        if self.head.endswith(b"\r\n\r\n"):
            self.proxy.requests.append(self.head)
            self.proxy.answer(self)

    def open(self, *pieces: bytes) -> None:
        """Open the tunnel, and then answer with ``pieces``, each in a packet of its own."""
        port = int(self.head.split(b"\r\n")[0].split()[1].rpartition(b":")[2])
        host = "::1" if b"[::1]" in self.head.split(b"\r\n")[0] else "127.0.0.1"
        connecting = connectProtocol(HostnameEndpoint(reactor, host, port), _Outward(self))
        connecting.addCallback(self._opened, list(pieces))

    def _opened(self, outward: Any, pieces: list[bytes]) -> None:
        self.outward = outward
        self.say(pieces)

    def say(self, pieces: list[bytes]) -> None:
        """Send ``pieces``, one in each turn of the reactor."""
        if pieces:
            self.transport.write(pieces.pop(0))
            self._saying = reactor.callLater(0, self.say, pieces)

    def connectionLost(self, reason: Any = None) -> None:
        if self._saying is not None and self._saying.active():
            self._saying.cancel()
        if self.outward is not None:
            self.outward.transport.loseConnection()
        self.lost.callback(None)


class TunnelProxy(ServerFactory):
    """
    A proxy within the test.

    :param answer: called with the client once its request is there.
    :ivar requests: the heads that came.
    :ivar carried: all that clients sent through tunnels.
    """

    noisy = False

    def __init__(self, answer: Callable[[Any], None] = lambda client: client.open(b"HTTP/1.1 200 OK\r\n\r\n")) -> None:
        self.answer = answer
        self.requests: list[bytes] = []
        self.carried = b""
        self.clients: list[_Client] = []

    def buildProtocol(self, addr: Any) -> _Client:
        """A client came."""
        client = _Client(self)
        self.clients.append(client)
        return client
