"""
Rules between settings and with the outside: URLs, tokens, files, header fields. Each function yields what is broken.

Files are opened to see whether they can be read; nothing of them is kept, because who needs them reads them when the
time comes, and again when they change.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

from commsmgr import noproxy, patterns, proxies
from commsmgr.config import TLS, Auth, Backend, Config, Observe, Proxy, Redaction
from commsmgr.errors import ConfigError, escaped
from commsmgr.headers import CONTROL_CHARACTERS, MAX_TOKEN, mistakes, token_mistake
from commsmgr.redact import words
from commsmgr.shape import Mistake, key_text
from commsmgr.urls import Target, backend_name, http_target, is_loopback, listen_address, websocket_target

TOKEN_SOURCES = ("token", "token_file", "token_env", "token_credential", "token_command")

_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_CREDENTIAL = re.compile(r"[A-Za-z0-9_.@:-]{1,255}")
_PROGRAM = re.compile(r"/[^\s=]*|[a-z][a-z0-9._-]{0,31}")

# Exactly what an encoder makes of 32 bytes: pins are compared as texts; one that no encoder makes would never match.
_PIN = re.compile(r"sha256//[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")


def broken(config: Config, environ: Mapping[str, str], token_provider: bool) -> list[Mistake]:
    """
    Return every rule that ``config``, whose values have the right types, breaks.

    :param environ: where ``auth.token_env`` and proxies are looked up.
    :param token_provider: whether code supplies a token provider, which counts as a source of tokens.
    """
    sources = [f"auth.{name}" for name in TOKEN_SOURCES if getattr(config.auth, name)]
    return [
        *_backend_rules(config.backends, bool(sources) or token_provider),
        *_token_rules(config.auth, sources + ["a token provider"] * token_provider, environ),
        *_accepted_token_rules(config, bool(sources) or token_provider),
        *_tls_rules(config.tls),
        *_proxy_rules(config, environ),
        *_header_rules(config.http.headers),
        *_range_rules(config),
        *_redaction_rules(config.redaction),
        *_observe_rules(config.observe),
    ]


def _backend_rules(backends: tuple[Backend, ...], with_token: bool) -> Iterator[Mistake]:
    names: dict[str, int] = {}
    for index, backend in enumerate(backends):
        key = f"backends[{index}]"
        http = _target(http_target, backend, backend.url)
        if isinstance(http, str):
            yield f"{key}.url", http
            continue
        websocket = _target(websocket_target, backend, backend.websocket_url)
        if isinstance(websocket, str):
            yield f"{key}.websocket_url", websocket
        elif http.secure and not websocket.secure and not websocket.loopback and not backend.insecure:
            yield f"{key}.websocket_url", "expected wss://, because url is https://; or set insecure = true"
        elif with_token and not backend.insecure and backend.websocket_url and _exposed(websocket):
            yield f"{key}.websocket_url", _EXPOSED.format("wss", websocket.host)
        if with_token and not backend.insecure and _exposed(http):
            yield f"{key}.url", _EXPOSED.format("https", http.host)
        name = backend_name(backend)
        if name in names:
            yield f"{key}.name", f'"{name}" is also the name of backends[{names[name]}]; names must differ'
        names.setdefault(name, index)


_EXPOSED = "the token would travel unencrypted to {1}, which is not loopback; use {0}://, or set insecure = true"


def _exposed(target: Target) -> bool:
    return not target.secure and not target.loopback


def _target(parse: Callable[[Backend], Target], backend: Backend, url: str) -> Target | str:
    """Return the target, or what is wrong with ``url``; without quoting from one that may hold a password."""
    try:
        return parse(backend)
    except ValueError as error:
        return "not a URL that can be used; user and password belong in [auth]" if "@" in url else str(error)


def _token_rules(auth: Auth, sources: list[str], environ: Mapping[str, str]) -> Iterator[Mistake]:
    if len(sources) > 1:
        yield "auth", f"expected one source of the token, found {len(sources)}: {', '.join(sources)}"
    if auth.token:
        yield from _token_mistakes("auth.token", "the token", auth.token)
    if auth.token_file:
        # Quoted only when it looks like a path or a variable: people paste the token itself into the wrong option.
        name = _shown(auth.token_file)
        yield from _token_file_mistakes("auth.token_file", name, auth.token_file)
    if auth.token_credential:
        try:
            path = credential_file(auth.token_credential, environ)
        except ValueError as error:
            yield "auth.token_credential", str(error)
        else:
            if os.path.exists(path):
                yield from _token_file_mistakes("auth.token_credential", path, path)
            else:
                yield "auth.token_credential", "there is no such credential; does the unit have LoadCredential= for it?"
    if auth.token_command:
        yield from _command_mistakes(auth.token_command)
    if auth.token_env:
        name = auth.token_env if _VARIABLE.fullmatch(auth.token_env) else "the variable"
        if auth.token_env in environ:
            yield from _token_mistakes("auth.token_env", f"the token in {name}", environ[auth.token_env])
        else:
            yield "auth.token_env", f"{name} is not in the environment"


def credential_file(name: str, environ: Mapping[str, str]) -> str:
    """
    Return the path of the systemd credential ``name`` (systemd.exec(5), LoadCredential=).

    :raise ValueError: there can be none; the sentence does not quote the name.
    """
    if not _CREDENTIAL.fullmatch(name) or name in (".", ".."):
        raise ValueError("expected the name of a credential, which is that of a file without a directory")
    directory = environ.get("CREDENTIALS_DIRECTORY", "")
    if not os.path.isabs(directory):
        raise ValueError(
            "the environment has no CREDENTIALS_DIRECTORY: the agent was not started by systemd, or its unit has no "
            "LoadCredential="
        )
    return os.path.join(directory, name)


def _token_file_mistakes(key: str, name: str, path: str) -> Iterator[Mistake]:
    try:
        with _regular(path) as file:
            text = file.read(MAX_TOKEN + 1).decode("ascii", "replace").rstrip("\r\n")
    except OSError as error:
        yield key, f"{name} cannot be read: {why(error)}"
    else:
        yield from _token_mistakes(key, f"the token in {name}", text)


def _shown(path: str) -> str:
    """Return ``path`` if it is hardly a secret: it begins with a directory that is there, or has no capitals."""
    if not path.startswith("/"):
        top, slash, _ = path.partition("/")
        return escaped(path) if slash and os.path.isdir(top) else "the file"
    top, slash, _ = path[1:].partition("/")
    return escaped(path) if path.islower() or (slash and os.path.isdir(f"/{top}")) else "the file"


def _command_mistakes(command: tuple[str, ...]) -> Iterator[Mistake]:
    key = "auth.token_command"
    if any(CONTROL_CHARACTERS.search(word) for word in command):
        yield key, "control characters (such as CR, LF or NUL) are not allowed"
    elif not _can_be_run(command[0]):
        # The name alone, and only when it looks like one: arguments may be secret.
        name = command[0] if _PROGRAM.fullmatch(command[0]) else "its first word"
        yield key, f"{name} is no program that can be run here; a program and its arguments are given as a list"


def _can_be_run(program: str) -> bool:
    """Return whether a program is there, with the rights of who will run it, which shutil.which does not look at."""
    places = [program] if os.path.dirname(program) else [os.path.join(place, program) for place in os.get_exec_path()]
    return any(os.path.isfile(place) and os.access(place, os.X_OK, effective_ids=True) for place in places)


def _accepted_token_rules(config: Config, with_token: bool) -> Iterator[Mistake]:
    """The file is replaced by commsmgr: it must be nobody else's."""
    key, path = "auth.accepted_token_file", config.auth.accepted_token_file
    if not path:
        return
    if not with_token:
        # What an earlier configuration has left there would be shown, in the clear perhaps, by one that has no token.
        yield key, "is of no use without a token"
    directory, name = os.path.split(os.path.realpath(path))
    tls = config.tls
    others = (config.auth.token_file, config.proxy.password_file, tls.ca_file, tls.certificate, tls.key)
    beside_spool = directory == os.path.realpath(config.spool.path)
    if beside_spool and name.startswith("spool"):
        yield key, f"{path} may be one of the spool's own files; expected another name"
    elif not beside_spool and not os.path.isdir(directory):
        # The spool's directory is made when the agent starts.
        yield key, f"{os.path.dirname(path)} is no directory"
    elif (os.path.exists(path) and not os.path.isfile(path)) or any(
        other and os.path.realpath(other) == os.path.realpath(path) for other in others
    ):
        yield key, f"{path} is something else; expected a file of its own"
    elif os.path.isdir(directory) and not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        yield key, f"{path} cannot be made, as {directory} cannot be written to; it may lie in spool.path"


def _token_mistakes(key: str, subject: str, token: str) -> Iterator[Mistake]:
    if wrong := token_mistake(token):
        yield key, f"{subject} {wrong}"


def _tls_rules(tls: TLS) -> Iterator[Mistake]:
    if tls.ca_exclusive and not tls.ca_file:
        yield "tls.ca_exclusive", "without tls.ca_file no issuer at all would be trusted"
    if tls.key and not tls.certificate:
        yield "tls.key", "is of no use without tls.certificate"
    if tls.certificate and not tls.key:
        yield "tls.certificate", "is of no use without tls.key"
    for name in ("ca_file", "certificate", "key"):
        path = getattr(tls, name)
        try:
            if path:
                with _regular(path) as file:
                    file.read(1)
        except OSError as error:
            yield f"tls.{name}", f"{_shown(path)} cannot be read: {why(error)}"
    for index, pin in enumerate(tls.pins):
        if not _PIN.fullmatch(pin):
            yield f"tls.pins[{index}]", f"expected sha256// and a SHA-256 in base64, found {json.dumps(pin[:60])}"
        elif pin in tls.pins[:index]:
            yield f"tls.pins[{index}]", f"is the same as tls.pins[{tls.pins.index(pin)}]"


def _proxy_rules(config: Config, environ: Mapping[str, str]) -> Iterator[Mistake]:
    proxy = config.proxy
    for index, entry in enumerate(proxy.no_proxy):
        if wrong := noproxy.mistake(entry):
            # Not of a URL, which may hold a password.
            found = "a URL" if "@" in entry or "://" in entry else json.dumps(entry[:60])
            yield f"proxy.no_proxy[{index}]", f"{wrong}, found {found}"
    yield from _proxy_credential_rules(proxy)
    told: set[str] = set()
    if proxy.url:
        # Even if no backend is reached through it yet.
        try:
            proxies.configured(proxy)
        except ConfigError as error:
            yield error.key, error.mistake
            told.add(error.key)
    for parse in (http_target, websocket_target):
        for backend in config.backends:
            try:
                target = parse(backend)
            except ValueError:  # told by the backends' own rules
                continue
            try:
                proxies.choose(proxy, environ, target)
            except ConfigError as error:
                if error.key not in told:
                    yield error.key, error.mistake
                told.add(error.key)


def _proxy_credential_rules(proxy: Proxy) -> Iterator[Mistake]:
    for name in ("username", "password_file"):
        if getattr(proxy, name) and not proxy.url:
            yield f"proxy.{name}", "is of no use without proxy.url"
    if proxy.password_file and not proxy.username:
        yield "proxy.password_file", "is of no use without proxy.username"
    if wrong := proxies.credential_mistake(proxy.username, ""):
        yield "proxy.username", wrong
    if proxy.password_file:
        # Quoted only when it looks like a path: people paste the password itself into the wrong option.
        name = _shown(proxy.password_file)
        try:
            with _regular(proxy.password_file) as file:
                file.read(1)
        except OSError as error:
            yield "proxy.password_file", f"{name} cannot be read: {why(error)}"


def _regular(path: str) -> BinaryIO:
    """Open a file. Not a pipe, which would keep us waiting for a writer and be empty when it is read again."""
    try:
        found = os.stat(path)
    except UnicodeEncodeError:
        raise OSError(None, "a file cannot have such a name") from None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(None, "it is no regular file")
    return open(path, "rb")


def _header_rules(headers: Mapping[str, str]) -> Iterator[Mistake]:
    for name, wrong in mistakes(headers):
        yield f"http.headers.{key_text(name)}", wrong


def _range_rules(config: Config) -> Iterator[Mistake]:
    for section, lower, upper in (("reconnect", "base", "cap"), ("commands", "default_timeout", "max_timeout")):
        low, high = (getattr(getattr(config, section), name) for name in (lower, upper))
        if low > high:
            yield f"{section}.{lower}", f"expected at most {section}.{upper}, which is {high:g}, found {low:g}"
    if not config.spool.path and config.spool.durability != "memory":
        yield "spool.path", f'is empty, but spool.durability is "{config.spool.durability}"'


def _observe_rules(observe: Observe) -> Iterator[Mistake]:
    if observe.listen:
        try:
            host, _ = listen_address(observe.listen)
        except ValueError as error:
            yield "observe.listen", f"{error}, found {json.dumps(observe.listen[:60])}"
        else:
            if not observe.public and not is_loopback(host):
                yield "observe.listen", _PUBLISHED.format(host)


def _redaction_rules(redaction: Redaction) -> Iterator[Mistake]:
    for index, key in enumerate(redaction.keys):
        if not words(key):
            yield f"redaction.keys[{index}]", f"expected a word or several, found {json.dumps(key[:60])}"
    for index, pattern in enumerate(redaction.patterns):
        if wrong := patterns.mistake(pattern):
            yield f"redaction.patterns[{index}]", wrong


_PUBLISHED = (
    "{} is not loopback, and the page has neither password nor TLS: listen on 127.0.0.1, or set observe.public = true"
)


def why(error: Exception) -> str:
    """Return the system's reason without the path, which is named already."""
    return (error.strerror if isinstance(error, OSError) else None) or "not UTF-8 text"
