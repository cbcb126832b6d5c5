"""
Reads a configuration from a TOML file, the environment or code, and says what is wrong with it.

Order of steps: syntax, then each value against the type in :mod:`commsmgr.config`, then the rules between values and
with the outside (URLs, tokens, files). All mistakes of a step are reported at once, each with file, key and what was
expected; the next step is not tried, because its findings would be echoes. A mistake never repeats a secret.

Nothing here opens a socket or writes, and what is read (token and certificate files) is only looked at, not kept: who
needs it later reads it then.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from commsmgr import proxies
from commsmgr.config import Auth, Config, Spool
from commsmgr.errors import ConfigError
from commsmgr.rules import TOKEN_SOURCES, broken, why
from commsmgr.shape import Mistake, may_have_control_characters, mismatches, to_builtins
from commsmgr.urls import backend_name, http_target, listen_address, websocket_target

__all__ = [
    "backend_name",
    "check",
    "from_toml",
    "http_target",
    "listen_address",
    "load",
    "load_spool",
    "websocket_target",
]

TOKEN_VARIABLE = "COMMSMGR_TOKEN"
TOKEN_FILE_VARIABLE = "COMMSMGR_TOKEN_FILE"


def load(path: str, environ: Mapping[str, str]) -> Config:
    """
    Read the configuration file at ``path``.

    :param environ: where ``auth.token_env``, ``COMMSMGR_TOKEN``, ``COMMSMGR_TOKEN_FILE`` and proxies are looked up.
    :raise ConfigError: the file cannot be read or is wrong.
    """
    config = from_toml(_read(path), source=path, environ=environ)
    kept = config.auth.accepted_token_file
    if kept and os.path.realpath(kept) == os.path.realpath(path):
        raise ConfigError(
            "is the configuration itself; expected another file", key="auth.accepted_token_file", source=path
        )
    return config


def load_spool(path: str) -> Spool:
    """
    Read ``[spool]`` alone from the configuration file at ``path``, for those who want neither token nor backend.

    :raise ConfigError: the file cannot be read, or that table is wrong.
    """
    raw = _parse(_read(path), path).get("spool", {})
    _raise_for(list(mismatches(raw, Spool, "spool")), path)
    return msgspec.convert(raw, Spool)


def from_toml(text: str, *, source: str, environ: Mapping[str, str]) -> Config:
    """
    Read a configuration from ``text``.

    When ``[auth]`` names no token, ``COMMSMGR_TOKEN`` or ``COMMSMGR_TOKEN_FILE`` in ``environ`` gives one; the result
    then names the variable (``token_env``) or the file (``token_file``), so that no struct holds the secret.

    :param source: the name of the file, for messages.
    :raise ConfigError: the text is wrong; ``others`` holds what else is.
    """
    raw = _parse(text, source)
    config = _convert(raw, source)
    written = raw.get("auth", {})
    _raise_for([(f"auth.{name}", "is empty") for name in TOKEN_SOURCES if written.get(name) in ("", [])], source)
    if any(written.get(name) for name in TOKEN_SOURCES):
        return check(config, source=source, environ=environ)
    auth, origin = _auth_from_environment(config.auth, environ)
    config = msgspec.structs.replace(config, auth=auth)
    _raise_for(broken(config, environ, token_provider=False), source, origin)
    return config


def check(
    config: Config, *, source: str = "code", environ: Mapping[str, str] = os.environ, token_provider: bool = False
) -> Config:
    """
    Check a configuration, whether built by code or read from a file, and return it in normal form.

    :param environ: where ``auth.token_env`` and proxies are looked up.
    :param token_provider: whether code supplies a token provider, which counts as a source of tokens.
    :raise ConfigError: something is wrong; ``others`` holds what else is.
    """
    config = _convert(_said(config) if isinstance(config, Config) else to_builtins(config), source)
    _raise_for(broken(config, environ, token_provider), source)
    return config


def _said(config: Config) -> dict[str, Any]:
    """Return as plain data what ``config`` says; the default sections are right, and all managers may share them."""
    defaults = _defaults()
    return {
        name: to_builtins(value)
        for name in Config.__struct_fields__
        if (value := getattr(config, name)) is not defaults.get(name, msgspec.NODEFAULT)
    }


@cache
def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(Config)}


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {why(error)}", source=path) from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # an endless number is a plain ValueError
        raise ConfigError(f"not valid TOML: {error}", source=source) from None


def _convert(raw: Any, source: str) -> Config:
    """Turn plain data into a Config; report every value that its type does not allow."""
    with suppress(msgspec.ValidationError, RecursionError, UnicodeEncodeError):
        config = msgspec.convert(raw, Config)
        if not may_have_control_characters(raw):
            return config
    # To find out what is wrong, and where, takes twenty times as long.
    _raise_for(list(mismatches(raw, Config)), source)
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:  # pragma: no cover - only if the walk above overlooked something
        raise ConfigError(str(error), source=source) from None


def _auth_from_environment(auth: Auth, environ: Mapping[str, str]) -> tuple[Auth, str]:
    """Return ``auth`` with what the environment says of the token, and the variable that says it, if one does."""
    found = [name for name in (TOKEN_VARIABLE, TOKEN_FILE_VARIABLE) if name in environ]
    if len(found) > 1:
        fact = f"expected one source of the token, found {' and '.join(found)}"
        raise ConfigError(fact, key=found[0], source="environment")
    if TOKEN_FILE_VARIABLE in found:
        if not environ[TOKEN_FILE_VARIABLE]:
            raise ConfigError("is empty", key=TOKEN_FILE_VARIABLE, source="environment")
        return msgspec.structs.replace(auth, token_file=environ[TOKEN_FILE_VARIABLE]), TOKEN_FILE_VARIABLE
    return (msgspec.structs.replace(auth, token_env=TOKEN_VARIABLE), TOKEN_VARIABLE) if found else (auth, "")


def _raise_for(mistakes: list[Mistake], source: str, origin: str = "") -> None:
    """
    Raise one error for all mistakes, the first one leading.

    :param origin: the environment variable that stands behind ``auth.token_file`` or ``auth.token_env``, if one does.
    """
    errors = []
    for key, fact in mistakes:
        if origin and key.startswith("auth.token_"):
            errors.append(ConfigError(fact, key=origin, source="environment"))
        elif key in proxies.VARIABLES:
            errors.append(ConfigError(fact, key=key, source="environment"))
        else:
            errors.append(ConfigError(fact, key=key, source=source))
    if errors:
        first, *others = errors
        raise ConfigError(mistakes[0][1], key=first.key, source=first.source, others=tuple(others))
