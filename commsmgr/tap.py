"""``twistd commsmgr``: the command line, and the service that it makes."""

from __future__ import annotations

import encodings.idna  # noqa: F401  # needed to look up names, when --uid or --chroot have put Python out of reach
import os
import signal
import sys
import time
from random import SystemRandom
from typing import Any, ClassVar, NoReturn, TextIO, cast

import msgspec
from twisted.application.service import MultiService, Service
from twisted.logger import ILogObserver
from twisted.python.failure import Failure
from twisted.python.logfile import LogFile
from twisted.python.usage import Options as UsageOptions
from twisted.python.usage import UsageError

from commsmgr.process import loading

with loading():
    from commsmgr import privileges, process, settings
    from commsmgr.clock import steady
    from commsmgr.config import Auth, Config
    from commsmgr.errors import ConfigError
    from commsmgr.handlers import BuiltinHandler
    from commsmgr.manager import Manager
    from commsmgr.observe.logs import make_observer
    from commsmgr.redact import Redactor
    from commsmgr.systemd import SystemdNotify
    from commsmgr.transport.tls import ContextSource
    from commsmgr.urls import backend_name, http_target, websocket_target

ROTATE_AT = 10 << 20
"""Bytes of a log file after which a new one is begun."""

PRIVATE = 0o077
"""The umask: what comes into being is for this user alone. twistd sees to that only as a daemon, and only later."""

KEPT_LOGS = 10
"""Older log files that are kept: a link that comes and goes must not fill the disk."""


class Options(UsageOptions):
    """The command line."""

    synopsis = "[--config FILE [--check] | --demo]"
    longdesc = (
        "Connects this machine's agent to its backend: heartbeats, inventory, commands in and results out, over "
        "WebSocket and HTTP, with a durable queue while there is no connection. Run like this it answers the built-in "
        "commands ping, echo, uptime and status; embed commsmgr.Manager in an agent to run others. Relative paths, in "
        "the configuration too, begin at the directory that twistd was called in. Exit code 1: a mistake in the "
        "configuration, or the start failed (the log says why). After SIGTERM or SIGINT all stops in order within "
        "stop_deadline, and the process ends by that signal."
    )
    optParameters: ClassVar[list[list[Any]]] = [
        ["config", "c", None, "configuration file (TOML)"],
        ["log-level", None, None, "debug, info, warn or error; overrides observe.log_level"],
        ["listen", None, None, "host:port of the status page; overrides observe.listen"],
    ]
    optFlags: ClassVar[list[list[Any]]] = [
        ["check", None, "only check the configuration, say what is wrong, and exit"],
        ["demo", None, "start a reference backend on loopback and an agent beside it, and show what they say"],
    ]

    config: Config

    def parseOptions(self, options: Any = None) -> None:
        """Parse the command line; a mistake there is told like one in the configuration."""
        try:
            super().parseOptions(options)
        except UsageError as error:
            _refuse(f"{error}; twistd commsmgr --help shows the options")

    def opt_version(self) -> None:
        """Show the version and exit."""
        from commsmgr._version import __version__

        print(f"commsmgr {__version__}")
        raise SystemExit(0)

    def postOptions(self) -> None:
        """Read and check the configuration; what is wrong ends the program here, before anything starts."""
        if self["demo"]:
            if self["config"] or self["check"]:
                _refuse("--demo brings its own configuration: leave out --config and --check")
            if self.parent is not None and not self.parent["nodaemon"]:
                _refuse("the demo needs a terminal: twistd -n commsmgr --demo")
            return
        if not self["config"]:
            _refuse("which configuration? Give --config FILE, or --demo to look around")
        try:
            self.config = _anchored(self._overridden(settings.load(self["config"], os.environ)))
            warnings = _try_tls(self.config, self["config"])
            self._try_as_user()
        except ConfigError as error:
            _refuse(str(error))
        if self["check"]:
            sys.stderr.writelines(f"{self['config']}: warning: {warning}\n" for warning in warnings)
            names = ", ".join(backend_name(backend) for backend in self.config.backends)
            print(f"{self['config']}: the configuration is valid (backends: {names})")
            raise SystemExit(0)

    def _try_as_user(self) -> None:
        """
        See that all files can be used by the user that twistd will change to.

        :raise ConfigError: one cannot.
        """
        source = self["config"]

        def look() -> None:
            settings.check(self.config, source=source)
            _try_tls(self.config, source)
            if self.config.spool.durability != "memory":
                privileges.require_place(self.config.spool.path, source)

        user = privileges.to_become(self.parent or {})
        if user is not None:
            try:
                user.acting(look)
            except ConfigError as error:
                fact = f"{error.mistake} (by the user {user.name}, which --uid has the agent become)"
                raise ConfigError(fact, key=error.key, source=error.source, others=error.others) from None

    def _overridden(self, config: Config) -> Config:
        changes = {
            field: self[option] for field, option in (("log_level", "log-level"), ("listen", "listen")) if self[option]
        }
        if not changes:
            return config
        observe = msgspec.structs.replace(config.observe, **changes)
        return settings.check(msgspec.structs.replace(config, observe=observe), source="command line")


def _anchored(config: Config) -> Config:
    """
    Make the paths absolute: the files just checked are to be the files used later, whatever ``--rundir`` says.

    ``~`` is no more than a character here, as it is in every other path that a service is given.
    """

    def absolute(section: Any, *names: str) -> Any:
        paths = {name: os.path.abspath(getattr(section, name)) for name in names if getattr(section, name)}
        return msgspec.structs.replace(section, **paths)

    return msgspec.structs.replace(
        config,
        auth=_anchored_program(absolute(config.auth, "token_file", "accepted_token_file")),
        tls=absolute(config.tls, "ca_file", "certificate", "key"),
        proxy=absolute(config.proxy, "password_file"),
        spool=absolute(config.spool, "path"),
    )


def _anchored_program(auth: Auth) -> Auth:
    """Make the path of the program that gives the token absolute; a name without a slash is looked for in PATH."""
    if not auth.token_command or "/" not in auth.token_command[0]:
        return auth
    program, *arguments = auth.token_command
    return msgspec.structs.replace(auth, token_command=(os.path.abspath(program), *arguments))


def _try_tls(config: Config, source: str) -> list[str]:
    """
    Look at the TLS files as connections will: settings only says whether they can be read.

    :return: what can be used, but is likely to be regretted; a start logs it, where TLS is used at all.
    :raise ConfigError: they cannot be used.
    """
    tls = config.tls
    targets = (target(backend) for backend in config.backends for target in (http_target, websocket_target))
    if not (tls.ca_file or tls.certificate or tls.key or any(target.secure for target in targets)):
        return []
    contexts = ContextSource(tls)
    try:
        contexts.load()
    except ConfigError as error:
        raise ConfigError(error.mistake, key=error.key, source=source) from None
    return list(contexts.warnings())


def _refuse(why: str) -> NoReturn:
    """End with exit code 1 and nothing but the reason: twistd's own way prints all of its help first."""
    sys.stderr.write(f"twistd commsmgr: {why}\n")
    raise SystemExit(1)


class Root(MultiService):
    """
    The service at the top: it brings the log's observer along, and sees to the signals.

    :param observer: takes the place of twistd's; None leaves that.
    """

    def __init__(self, observer: ILogObserver | None, reactor: Any) -> None:
        super().__init__()
        self._observer = observer
        self._reactor = reactor

    def startService(self) -> None:
        """Start what is below."""
        process.stop_once(self._reactor)
        super().startService()

    def setServiceParent(self, parent: Any) -> None:
        """Become a child of twistd's application, which is also where it looks for the observer."""
        if self._observer is not None and hasattr(parent, "setComponent"):
            parent.setComponent(ILogObserver, self._observer)
        super().setServiceParent(parent)


def makeService(options: Options) -> Service:
    """Return the service for ``options``. It is called before twistd forks: nothing is opened before startService."""
    from twisted.internet import reactor

    if options["demo"]:
        from commsmgr.demo import make_demo

        demo, observer = make_demo(steady(reactor))
        root = Root(observer, reactor)
        demo.setServiceParent(root)
        return root
    config = options.config
    if options.parent is not None and options.parent.get("umask") is None:
        os.umask(PRIVATE)
    redactor = Redactor(config.redaction.patterns, config.redaction.keys)
    root = Root(_observer(options, config, redactor, reactor), reactor)
    began = time.monotonic()
    manager = Manager(
        config,
        reactor=reactor,
        handler=BuiltinHandler(status=lambda: manager.status(), uptime=lambda: time.monotonic() - began),
        redactor=redactor,
        wall=time.time,
        random=SystemRandom(),
    )
    manager.setServiceParent(root)
    Watch(manager, reactor).setServiceParent(root)
    SystemdNotify(manager, reactor=reactor).setServiceParent(root)
    return root


class Watch(Service):
    """Ends the process with exit code 1 when the manager cannot start: a supervisor should see that, and try again."""

    def __init__(self, manager: Manager, reactor: Any) -> None:
        self._manager = manager
        self._reactor = reactor

    def startService(self) -> None:
        """Wait for the manager's start, which comes before this one's."""
        super().startService()
        self._manager.started().addErrback(self._failed)

    def _failed(self, failure: Failure) -> None:
        if self.running:
            process.fail(self._reactor)


def _observer(options: Options, config: Config, redactor: Redactor, reactor: Any) -> ILogObserver | None:
    """
    Return our observer, on the file that twistd would log to; None when twistd was told of another way.

    The file is rotated by size, and on SIGUSR1, as twistd does it; without a file that signal does nothing.
    """

    def renew(*_: object) -> None:
        # Not in the signal's handler, which may interrupt a line. What another program moved away already is not
        # rotated, but begun anew.
        reactor.callFromThread(lambda: file.rotate() if os.path.exists(file.path) else file.reopen())

    twistd = options.parent
    if twistd is None or twistd.get("logger") or twistd.get("syslog"):
        return None
    name = twistd.get("logfile")
    stream: TextIO
    if name == "-" or (twistd.get("nodaemon") and not name):
        # Whoever rotates the logs of all daemons by that signal must not end this one.
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        stream = sys.stdout
    else:
        file = _log_file(name or "twistd.log", twistd)
        signal.signal(signal.SIGUSR1, renew)
        stream = cast(TextIO, file)
    return make_observer(stream, format=config.observe.log_format, level=config.observe.log_level, redactor=redactor)


def _log_file(path: str, twistd: Any) -> LogFile:
    """Open the log as the user who will write to it, and for that one's eyes alone, unless it is there already."""

    def opened() -> LogFile:
        # A file that is there keeps its mode, and those that follow get that too.
        mode = None if os.path.exists(path) else 0o600
        directory, name = os.path.split(os.path.abspath(path))
        return LogFile(name, directory, rotateLength=ROTATE_AT, maxRotatedFiles=KEPT_LOGS, defaultMode=mode)

    user = privileges.to_become(twistd)
    try:
        return opened() if user is None else user.acting(opened)
    except OSError as error:
        who = "" if user is None else f" by the user {user.name}: make it a file, in a directory, of that user"
        _refuse(f"--logfile: {path} cannot be written to ({error.strerror}){who}")
