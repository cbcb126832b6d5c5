"""
Every setting, as typed structs: the one source of validation, defaults, and the configuration reference in the docs.

Times are seconds, sizes are bytes. A struct says what a value may be; :mod:`commsmgr.settings` reads files and the
environment, and says which rule a mistake broke.
"""

# Without "annotations" from __future__: msgspec would have to compile each of those strings again, at every start.
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct


def _seconds(description: str, *, ge: float | None = None, gt: float | None = None, le: float | None = None) -> Meta:
    unit = {"unit": "s"}
    if gt is not None:
        return Meta(gt=gt, le=le, description=description, extra_json_schema=unit)
    return Meta(ge=ge, le=le, description=description, extra_json_schema=unit)


def _bytes(description: str, *, ge: int = 1, le: int = 1 << 40) -> Meta:
    return Meta(ge=ge, le=le, description=description, extra_json_schema={"unit": "bytes"})


def _count(description: str, *, ge: int = 1, le: int = 10_000_000) -> Meta:
    return Meta(ge=ge, le=le, description=description, extra_json_schema={"unit": "count"})


def _rate(description: str) -> Meta:
    return Meta(ge=0, le=10_000_000, description=description, extra_json_schema={"unit": "count"})


def _said(description: str) -> Meta:
    return Meta(description=description)


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    A table of the configuration: unknown keys are mistakes.

    :cvar SECRET: fields whose values no ``repr`` shows.
    """

    SECRET: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        shown = (f"{name}={'...' if name in self.SECRET and value else repr(value)}" for name, value in fields)
        return f"{type(self).__name__}({', '.join(shown)})"


class Backend(_Section, frozen=True, kw_only=True):
    """One backend. The list is in order of preference: the first that works is used, the others stand by."""

    url: Annotated[str, _said("base URL of the HTTP interface, http:// or https://")]
    websocket_url: Annotated[
        str, _said("URL of the WebSocket; empty: `url` with ws:// or wss:// and `/ws` appended")
    ] = ""
    name: Annotated[
        str, Meta(pattern=r"^[A-Za-z0-9_.-]{0,64}$", description="label in logs and metrics; empty: host and port")
    ] = ""
    insecure: Annotated[
        bool, _said("allow sending the token over plain http:// or ws:// to a host that is not loopback")
    ] = False


class Auth(_Section, frozen=True, kw_only=True):
    """Where the bearer token comes from: at most one of `token` and the options that begin with `token_`."""

    SECRET = ("token", "token_command")

    token: Annotated[str, _said("the token itself; prefer a file or the environment")] = ""
    token_file: Annotated[str, _said("a file that holds the token; read again when it changes")] = ""
    token_env: Annotated[str, _said("name of the environment variable that holds the token")] = ""
    token_credential: Annotated[
        str, _said("name of the systemd credential (LoadCredential=) that holds the token; read again when it changes")
    ] = ""
    token_command: Annotated[
        tuple[str, ...],
        _said(
            "a program and its arguments, run without a shell; what it prints is the token, kept until it is renewed"
        ),
    ] = ()
    command_timeout: Annotated[
        float, _seconds("for one run of `token_command`, or one call of the agent's own callable", gt=0, le=600)
    ] = 30.0
    accepted_token_file: Annotated[
        str,
        _said(
            "a file, made with mode 0600, that keeps the last token that a backend has accepted, so that a newer one "
            "that is refused does not displace it over a restart; empty: it is kept in memory only"
        ),
    ] = ""
    refused_delay: Annotated[
        float,
        _seconds(
            "a refused token (401) is not shown again for about this long, from half to one and a half times; as long "
            "the agent waits after other refusals that it cannot cure (most 4xx, close codes 1008 and 4400 to 4499)",
            ge=1,
            le=86400,
        ),
    ] = 60.0


class TLS(_Section, frozen=True, kw_only=True):
    """How far a backend must prove who it is."""

    ca_file: Annotated[str, _said("PEM file with further trusted issuers; empty: the system's only")] = ""
    ca_exclusive: Annotated[bool, _said("trust only `ca_file`, not the system's issuers")] = False
    certificate: Annotated[str, _said("PEM file with the agent's own certificate and its chain")] = ""
    key: Annotated[str, _said("PEM file with the private key of `certificate`")] = ""
    minimum_version: Annotated[Literal["1.2", "1.3"], _said("oldest TLS version accepted")] = "1.2"
    pins: Annotated[
        tuple[str, ...],
        _said(
            "public keys as `sha256//BASE64`, one of which must be in the verified chain; have two, so that keys can "
            "be renewed; empty: any key"
        ),
    ] = ()


class Proxy(_Section, frozen=True, kw_only=True):
    """
    An HTTP proxy between the agent and its backends. All connections go through it by CONNECT.

    Without `url` the environment says which proxy there is, if any.
    """

    url: Annotated[
        str, _said("http:// or https:// (TLS to the proxy itself), host and port; empty: as the environment says")
    ] = ""
    username: Annotated[str, _said("who the agent is to the proxy of `url`; empty: no credentials are sent")] = ""
    password_file: Annotated[str, _said("a file that holds the password; read again for each connection")] = ""
    no_proxy: Annotated[
        tuple[str, ...],
        _said("hosts reached directly: names with all below them, addresses, networks, each perhaps with `:port`"),
    ] = ("localhost", "127.0.0.0/8", "::1")
    environment: Annotated[
        bool, _said("without `url`: obey HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY in the environment")
    ] = True


class HTTP(_Section, frozen=True, kw_only=True):
    """Requests: heartbeat, inventory, fallback for results, and `send_http`."""

    SECRET = ("headers",)

    timeout: Annotated[
        float, _seconds("for one whole exchange: name, connection, TLS, headers and body", gt=0, le=3600)
    ] = 30.0
    attempts: Annotated[int, _count("attempts at one `send_http` or heartbeat before giving up", le=100)] = 4
    max_response_bytes: Annotated[int, _bytes("largest answer read")] = 8 << 20
    connections: Annotated[int, _count("connections kept open per backend", le=100)] = 2
    compress: Annotated[bool, _said("send bodies over 1 KiB with Content-Encoding: gzip")] = False
    headers: Annotated[dict[str, str], _said("added to every request and to the WebSocket upgrade")] = {}


class WebSocket(_Section, frozen=True, kw_only=True):
    """The persistent connection for commands and results."""

    enabled: Annotated[bool, _said("false: HTTP only")] = True
    dialect: Annotated[
        Literal["auto", "plain"], _said("auto: offer commsmgr.v1 and accept plain; plain: never offer")
    ] = "auto"
    connect_timeout: Annotated[float, _seconds("for name, connection, TLS and upgrade together", gt=0, le=600)] = 20.0
    register_timeout: Annotated[
        float, _seconds("a commsmgr.v1 backend must answer the registration within this", gt=0, le=600)
    ] = 10.0
    register_wait: Annotated[
        float, _seconds("a plain backend that answers nothing counts as registered after this", gt=0, le=600)
    ] = 3.0
    ping_interval: Annotated[float, _seconds("silence after which a ping frame is sent", gt=0, le=3600)] = 20.0
    ping_timeout: Annotated[float, _seconds("silence after that ping which ends the connection", gt=0, le=3600)] = 10.0
    receipt_timeout: Annotated[
        float, _seconds("results in flight with no receipt at all for this long end the connection", gt=0, le=3600)
    ] = 60.0
    stable_after: Annotated[
        float, _seconds("a connection must have lived this long before the backoff starts afresh", ge=0, le=3600)
    ] = 30.0
    max_message_bytes: Annotated[int, _bytes("largest message taken from the backend")] = 4 << 20
    max_message_rate: Annotated[
        float,
        _rate(
            "frames per second taken from a backend in the long run, and four times as many at once; each 4 KiB of a "
            "message counts like a frame, and so does a packet in which none begins, while answers to what the agent "
            "sent do not count; beyond this the connection is closed with 1008; 0: no limit"
        ),
    ] = 2000.0
    max_depth: Annotated[int, _count("deepest nesting of JSON taken from the backend", le=500)] = 32
    window_messages: Annotated[int, _count("results in flight without a receipt", le=100_000)] = 1000
    window_bytes: Annotated[int, _bytes("bytes in flight without a receipt")] = 1 << 20
    compress: Annotated[bool, _said("offer permessage-deflate (RFC 7692)")] = False


class Reconnect(_Section, frozen=True, kw_only=True):
    """Full jitter after the cap: the wait is uniform between 0 and min(cap, base * 2**n)."""

    base: Annotated[float, _seconds("first upper bound of the wait", gt=0, le=3600)] = 1.0
    cap: Annotated[float, _seconds("largest upper bound of the wait", gt=0, le=86400)] = 60.0
    return_after: Annotated[
        float, _seconds("how long a preferred backend that was left is not returned to", ge=0, le=86400)
    ] = 300.0
    retry_after_cap: Annotated[
        float, _seconds("longest Retry-After or goaway that is taken at its word; jitter comes on top", ge=0, le=86400)
    ] = 300.0


class Breaker(_Section, frozen=True, kw_only=True):
    """
    Leaves a backend alone whose HTTP answers failed several times in a row.

    As many failures of its WebSocket in a row make the agent turn to the next backend of the list.
    """

    failures: Annotated[int, _count("failures in a row that open the breaker", le=1000)] = 5
    open_for: Annotated[float, _seconds("how long it stays open before one probe is let through", gt=0, le=3600)] = 15.0


class Spool(_Section, frozen=True, kw_only=True):
    """What must not be lost, on disk. Bounds are for events; state keeps one entry per key."""

    path: Annotated[str, _said("directory of the spool, one per process, created with mode 0700")] = "/var/lib/commsmgr"
    durability: Annotated[
        Literal["full", "normal", "memory"],
        _said(
            "full: survives a power cut; normal: survives a killed process, may lose the last moments in a power cut; "
            "memory: nothing on disk, all is lost with the process"
        ),
    ] = "full"
    max_events: Annotated[int, _count("events held")] = 100_000
    max_bytes: Annotated[int, _bytes("bytes of event bodies held", ge=1024)] = 256 << 20
    max_age: Annotated[
        float, _seconds("events older than this become dead letters; 0: never", ge=0, le=10 * 365 * 86400)
    ] = 0
    max_dead_letters: Annotated[int, _count("dead letters kept; the oldest give way", ge=0)] = 10_000
    remember_commands: Annotated[
        float, _seconds("how long finished commands are remembered to recognise duplicates", ge=60, le=365 * 86400)
    ] = 7 * 86400.0


class Delivery(_Section, frozen=True, kw_only=True):
    """How the outbox is emptied."""

    http_fallback_after: Annotated[
        float, _seconds("results go over HTTP when no WebSocket could be had for this long", ge=0, le=86400)
    ] = 30.0
    max_body_bytes: Annotated[int, _bytes("largest result or inventory accepted for sending", ge=1024)] = 64 << 20
    max_output_bytes: Annotated[
        int, _bytes("longest `output` or `error` of a result; of a longer one the middle is left out", ge=256)
    ] = 1 << 20


class Commands(_Section, frozen=True, kw_only=True):
    """Commands in: how many at once, how long each."""

    concurrency: Annotated[int, _count("commands handed to the handler at once", le=1000)] = 4
    max_pending: Annotated[int, _count("commands taken from the backend and not yet finished")] = 1000
    max_rate: Annotated[
        float,
        _rate(
            "new commands per second that are taken in the long run, and ten times as many at once; further ones are "
            "refused like those beyond `max_pending`; 0: no limit"
        ),
    ] = 1000.0
    default_timeout: Annotated[float, _seconds("for a command that names none", gt=0, le=30 * 86400)] = 300.0
    max_timeout: Annotated[float, _seconds("longest timeout a command may ask for", gt=0, le=30 * 86400)] = 3600.0
    safe_to_repeat: Annotated[
        tuple[str, ...],
        _said(
            "command types that are offered again after a crash, marked redelivered, and not reported as interrupted"
        ),
    ] = ()


class Heartbeat(_Section, frozen=True, kw_only=True):
    """POST /heartbeat."""

    interval: Annotated[float, _seconds("between heartbeats; 0: none by itself", ge=0, le=86400)] = 30.0
    jitter: Annotated[float, _seconds("the first comes at a random moment within this", ge=0, le=86400)] = 5.0


class Inventory(_Section, frozen=True, kw_only=True):
    """POST /inventory."""

    interval: Annotated[float, _seconds("between inventories; 0: none by itself", ge=0, le=30 * 86400)] = 3600.0
    jitter: Annotated[float, _seconds("the first comes at a random moment within this", ge=0, le=86400)] = 10.0
    resend_after: Annotated[
        float, _seconds("unchanged content is not sent again before this has passed", ge=0, le=365 * 86400)
    ] = 86400.0


class Messages(_Section, frozen=True, kw_only=True):
    """What is taken from a backend, over WebSocket and in the answers over HTTP."""

    unknown_fields: Annotated[
        Literal["keep", "refuse"],
        _said(
            "keep: fields that this version does not know are no mistake, and are ignored; refuse: a message that has "
            "one is refused, for good if it is a command, so that a backend must not be newer than its agents"
        ),
    ] = "keep"


class Redaction(_Section, frozen=True, kw_only=True):
    """What is replaced by ``[redacted]`` before anything is spooled, sent or logged."""

    keys: Annotated[
        tuple[str, ...],
        _said(
            "names of secrets: the value is replaced wherever a key has one of them among its words (`db_password`, "
            "`dbPassword`, not `passwordless`), and after `name=` or `name:` in texts"
        ),
    ] = (
        "authorization", "password", "passwd", "passphrase", "pwd", "secret", "token", "credential", "credentials",
        "api_key", "private_key", "secret_key", "access_key",
    )  # fmt: skip
    patterns: Annotated[tuple[str, ...], _said("regular expressions; what they match is replaced, in every text")] = ()


class Observe(_Section, frozen=True, kw_only=True):
    """What operators and Prometheus see."""

    listen: Annotated[
        str,
        _said("address of /metrics, /healthz, /readyz and /status as `host:port`, port 0 for any; empty: none"),
    ] = ""
    public: Annotated[
        bool, _said("allow `listen` beyond loopback: whoever reaches it sees the page, which asks for no password")
    ] = False
    log_format: Annotated[Literal["text", "json"], _said("form of the log lines under twistd")] = "text"
    log_level: Annotated[
        Literal["debug", "info", "warn", "error"], _said("debug also shows attempts, timings and TLS details")
    ] = "info"


class Config(_Section, frozen=True, kw_only=True):
    """The whole configuration of one manager."""

    backends: Annotated[tuple[Backend, ...], Meta(min_length=1, max_length=100, description="in order of preference")]
    machine_id: Annotated[
        str,
        Meta(
            pattern=r"^[ -~]{0,200}$",
            description="who this agent is to the backend; empty: /etc/machine-id, or else the host name",
        ),
    ] = ""
    agent_version: Annotated[str, _said("reported in heartbeats; empty: commsmgr's own version")] = ""
    stop_deadline: Annotated[float, _seconds("for an orderly stop: flush, goodbye, close", gt=0, le=600)] = 10.0
    auth: Auth = Auth()
    tls: TLS = TLS()
    proxy: Proxy = Proxy()
    http: HTTP = HTTP()
    websocket: WebSocket = WebSocket()
    reconnect: Reconnect = Reconnect()
    breaker: Breaker = Breaker()
    spool: Spool = Spool()
    delivery: Delivery = Delivery()
    commands: Commands = Commands()
    heartbeat: Heartbeat = Heartbeat()
    inventory: Inventory = Inventory()
    messages: Messages = Messages()
    redaction: Redaction = Redaction()
    observe: Observe = Observe()
