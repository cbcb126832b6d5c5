"""The text of a configuration file."""

from __future__ import annotations

from collections.abc import Iterator

from commsmgr import reference
from commsmgr.errors import ConfigError
from commsmgr.settings import check, from_toml
from tests.fuzz.kit import nothing_wrong, promise

INSTRUMENT = (
    "commsmgr.settings",
    "commsmgr.rules",
    "commsmgr.shape",
    "commsmgr.urls",
    "commsmgr.headers",
    "commsmgr.patterns",
    "commsmgr.proxies",
    "commsmgr.noproxy",
    "tomllib",
)

SECRET = "s3cr3t-value"

TOKENS = (
    *(f"[{section.name}]\n".encode() for section in reference.sections() if section.name),
    *sorted({f"{option.name} = ".encode() for section in reference.sections() for option in section.options}),
    b'[[backends]]\nurl = "https://a"\n',
    b'"http://[::1]:80/"',
    b'"wss://user:pw@a/"',
    b'"unix:/x"',
    b"[http.headers]\n",
    b'"(a+)+$"',
    b"1979-05-27T07:32:00Z",
    b"+inf",
    b"nan",
    b"0x7f",
    b"'''",
    b'"""',
    b"\\U0010ffff",
    b"{ a = 1 }",
)

ENVIRON = {"A_TOKEN": SECRET}


def one(data: bytes) -> None:
    """See that every text is a configuration that stays one, or a mistake that is told in words and shows no secret."""
    text = data.decode("utf-8", "surrogateescape")
    with nothing_wrong():
        try:
            parsed = from_toml(text, source="agent.toml", environ=ENVIRON)
        except ConfigError as error:
            sentences = str(error)
            promise(sentences.startswith(("agent.toml: ", "environment: ")), "no word on where", sentences)
            promise(all(each.mistake for each in (error, *error.others)), "a mistake without words", sentences)
            promise(SECRET not in sentences or SECRET in text, "a secret is shown", sentences)
            return
        promise(check(parsed, environ=ENVIRON) == parsed, "not the same when it is checked again", parsed)
        promise(SECRET not in repr(parsed) or SECRET in text, "a secret is shown")


def seeds() -> Iterator[bytes]:
    """Yield the example, each of its sections alone, and small files with typical mistakes."""
    example = reference.example()
    yield example.encode()
    head = '[[backends]]\nurl = "https://a.example/api"\n\n'
    for section in reference.sections():
        usable = [f"{option.name} = {option.default}" for option in section.options if option.default]
        if section.name and section.name != "backends":
            yield "\n".join([head, f"[{section.name}]", *usable]).encode()
    for text in (
        head + '[auth]\ntoken_env = "A_TOKEN"\n',
        head + '[auth]\ntoken = "t"\ntoken_file = "/no/such/file"\n',
        head + '[tls]\nca_file = "/no/such/file"\n[http.headers]\n"X-A" = "b"\n',
        head + '[observe]\nlisten = "127.0.0.1:0"\nredact = ["a+b", "("]\n',
        '[[backends]]\nurl = "http://[::1]:8080/"\nwebsocket_url = "ws://[fe80::1%25eth0]/"\n',
        '[[backends]]\nurl = "https://user:pw@a.example/"\n',
        "spool = 1\n[heartbeat]\ninterval = -1\nintervall = 2\n",
        "a = [[[[[[[[1]]]]]]]]\n",
    ):
        yield text.encode()
