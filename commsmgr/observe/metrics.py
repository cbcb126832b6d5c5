"""
What Prometheus sees of a manager.

Theory of operation: counting is a few dictionary operations on plain numbers (a tenth of what a child of
``prometheus_client`` costs, and there is no ``labels()`` call to cache); the families are built from them when somebody
scrapes. One collector, registered whole and removed whole, so that a manager can stop and start on the same registry.
What the queue holds is asked at the scrape and kept nowhere twice.

Cardinality, all labels together: ``backend`` is a configured name (at most 100, mostly 1 to 3); ``dialect`` 2;
``direction`` 2; ``transport`` 2; ``kind`` and ``route`` come from closed lists here, everything else counts as
``other``; ``outcome``, ``status`` and ``reason`` are words in this program's code, or come from :func:`reason_label`.
Nothing a peer wrote ever becomes a label.
As a last line of defence a family that reaches 500 series counts further ones as ``other``.

All methods are called on the reactor's thread; :meth:`Metrics.collect` may be called on any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from math import inf

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from twisted.internet.defer import CancelledError

from commsmgr import errors
from commsmgr.errors import ConfigError
from commsmgr.observe.families import OTHER, Family, Histogram, Series
from commsmgr.status import QueueStatus

_KINDS = frozenset(
    ("heartbeat", "inventory", "command", "command_result", "loss_receipt", "push", "register", "ack", "nack", "reply")
)
_ROUTES = frozenset(("/heartbeat", "/inventory", "/commands/result"))
_BREAKER_STATES = {"closed": 0, "half_open": 1, "open": 2}

# Exchanges run from a millisecond on a LAN to the longest deadline, commands from nothing to an hour.
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_COMMAND_BUCKETS = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)

_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (errors.PeerSilent, "peer-silent"),
    (errors.ConnectionEnded, "connection-ended"),
    (errors.ProxyRefused, "proxy-refused"),
    (errors.ConnectFailed, "connect-failed"),
    (errors.TLSFailed, "tls-failed"),
    (errors.RateExceeded, "rate-exceeded"),
    (errors.PeerViolation, "peer-violation"),
    (errors.BreakerOpen, "breaker-open"),
    (errors.TransportError, "transport"),
    (errors.DeadlineExceeded, "deadline"),
    (errors.TokenError, "token"),
    (errors.QueueFull, "queue-full"),
    (errors.SpoolError, "spool"),
    (errors.InvalidMessage, "invalid-message"),
    (errors.UsageError, "usage"),
    (errors.ConfigError, "config"),
    (CancelledError, "cancelled"),
)
"""Labels of errors, the more special class before its parents."""

_STATUSES = frozenset((401, 403, 404, 408, 413, 422, 429, 500, 502, 503, 504))
_CLOSE_CODES = frozenset((*range(1000, 1004), *range(1005, 1014)))


def reason_label(error: BaseException | None) -> str:
    """
    Return the label of an error, or ``ok`` of None.

    Statuses and close codes that an operator acts upon stand alone (``http-401``, ``upgrade-503``, ``close-1008``),
    others by their class (``http-4xx``, ``close-4xxx``), because the peer chooses them.
    """
    match error:
        case None:
            return "ok"
        case errors.HTTPStatusError():
            return "http-" + _status_class(error.status)
        case errors.UpgradeRefused():
            return "upgrade-" + _status_class(error.status)
        case errors.ClosedByPeer():
            return "close-" + (str(error.code) if error.code in _CLOSE_CODES else _hundreds(error.code, 1000, 4))
    return next((label for kind, label in _REASONS if isinstance(error, kind)), "error")


def _status_class(status: int) -> str:
    return str(status) if status in _STATUSES else _hundreds(status, 100, 5)


def _hundreds(number: int, unit: int, highest: int) -> str:
    leading = number // unit
    return f"{leading}{'x' * (len(str(unit)) - 1)}" if 1 <= leading <= highest else OTHER


class Metrics:
    """
    Counts what happens, and shows it to ``registry``. The methods are named for what happened.

    :param registry: the embedding agent's, or one of the manager's own; never the global one by default. None: nobody
        is shown anything.
    :param seconds: the time as seconds since the epoch.
    :raise ConfigError: the registry already shows another manager.
    """

    def __init__(self, registry: CollectorRegistry | None, *, seconds: Callable[[], float]) -> None:
        self._registry = registry
        self._seconds = seconds
        self._queue: Callable[[], QueueStatus] | None = None
        self._receipts: dict[str, float] = {}
        counter, gauge = CounterMetricFamily, GaugeMetricFamily
        self._connected = Family(
            gauge, "connected", "1 while registered with the backend over WebSocket.", ("backend",)
        )
        self._connections = Family(counter, "connections_total", "WebSocket registrations.", ("backend", "dialect"))
        self._reconnects = Family(
            counter, "reconnects_total", "Connections or attempts that ended unasked, by cause.", ("backend", "reason")
        )
        self._messages = Family(
            counter,
            "messages_total",
            "Messages by kind, in or out, and what became of them.",
            ("kind", "direction", "outcome"),
        )
        self._bytes = Family(counter, "bytes_total", "Bytes of message bodies.", ("direction", "transport"))
        self._invalid = Family(counter, "invalid_messages_total", "Messages from backends not understood.", ("reason",))
        self._breaker = Family(gauge, "breaker_state", "0 closed, 1 half-open, 2 open.", ("backend",))
        self._since_receipt = Family(
            gauge,
            "seconds_since_receipt",
            "Since the backend last proved that it takes what is sent; +Inf: never.",
            ("backend",),
        )
        self._token = Family(gauge, "token_expiry_timestamp_seconds", "When the bearer token expires, if known.")
        self._token_refused = Family(gauge, "token_refused", "1 while the newest token is refused (401).", ("backend",))
        self._token_earlier = Family(
            gauge, "token_earlier", "1 while a token that was accepted before is used, not the newest.", ("backend",)
        )
        self._certificate = Family(
            gauge, "certificate_expiry_timestamp_seconds", "When the backend's certificate expires.", ("backend",)
        )
        self._requests = Histogram(
            "request_seconds", "Whole HTTP exchanges, retries apart.", _REQUEST_BUCKETS, ("route", "outcome")
        )
        self._commands = Histogram(
            "command_seconds", "Commands, from being offered to their result.", _COMMAND_BUCKETS, ("status",)
        )
        self._families = (
            self._connected,
            self._connections,
            self._reconnects,
            self._messages,
            self._bytes,
            self._invalid,
            self._breaker,
            self._token,
            self._token_refused,
            self._token_earlier,
            self._certificate,
            self._requests,
            self._commands,
        )
        try:
            if registry is not None:
                registry.register(self)
        except ValueError:
            raise ConfigError(
                "this Prometheus registry already shows a commsmgr manager: give each manager its own "
                "CollectorRegistry, or stop the other one first"
            ) from None

    def remove(self) -> None:
        """Show nothing more, so that another instance can be registered. Calling it again does nothing."""
        if self._registry is not None:
            with suppress(KeyError):
                self._registry.unregister(self)

    # -- what the manager says when it starts

    def configured(self, backends: Iterable[str]) -> None:
        """Show these backends from the first scrape on: an alert cannot see a series that is not there."""
        for backend in backends:
            self._connected.values.setdefault((backend,), 0)
            self._breaker.values.setdefault((backend,), 0)
            self._token_refused.values.setdefault((backend,), 0)
            self._token_earlier.values.setdefault((backend,), 0)
            self._receipts.setdefault(backend, -inf)

    def watch(self, queue: Callable[[], QueueStatus]) -> None:
        """Ask ``queue`` at each scrape what is held; it must be quick, and answer from any thread that scrapes."""
        self._queue = queue

    # -- links

    def link_registered(self, backend: str, dialect: str) -> None:
        """A WebSocket is registered; ``dialect`` is ``plain`` or ``commsmgr.v1``."""
        self._connected.values[backend,] = 1
        self._connections.add((backend, dialect), 1)

    def link_ended(self, backend: str, reason: str | None) -> None:
        """
        A WebSocket, or the attempt at one, ended.

        :param reason: from :func:`reason_label`; None when the manager itself wanted the end, which is not counted.
        """
        self._connected.values[backend,] = 0
        if reason is not None:
            self._reconnects.add((backend, reason), 1)

    def receipt(self, backend: str) -> None:
        """The backend proved just now that it takes what is sent: an ack, a barrier's pong, a 2xx."""
        self._receipts[backend] = self._seconds()

    def breaker(self, backend: str, state: str) -> None:
        """The breaker is now ``closed``, ``half_open`` or ``open``."""
        self._breaker.values[backend,] = _BREAKER_STATES[state]

    def token_expires(self, timestamp: float | None) -> None:
        """The token in use expires at ``timestamp`` (seconds since the epoch), or does not say."""
        if timestamp is None:
            self._token.values.pop((), None)
        else:
            self._token.values[()] = timestamp

    def token_standing(self, backend: str, *, refused: bool, earlier: bool) -> None:
        """Whether ``backend`` refuses the newest token, and whether one is shown to it that it accepted before."""
        self._token_refused.values[backend,] = refused
        self._token_earlier.values[backend,] = earlier

    def certificate_expires(self, backend: str, timestamp: float) -> None:
        """The backend's certificate expires at ``timestamp`` (seconds since the epoch)."""
        self._certificate.values[backend,] = timestamp

    # -- messages

    def message(self, kind: str, direction: str, outcome: str, count: int = 1) -> None:
        """
        ``count`` messages went one way.

        :param kind: the envelope's type, or ``heartbeat``, ``inventory``, ``push``, ``reply``.
        :param direction: ``in`` or ``out``.
        :param outcome: ``sent``, ``acked``, ``accepted``, ``duplicate``, ``refused`` … of a list in the code.
        """
        self._messages.add((kind if kind in _KINDS else OTHER, direction, outcome), count)

    def traffic(self, direction: str, transport: str, size: int) -> None:
        """``size`` bytes of bodies went ``in`` or ``out`` over ``http`` or ``websocket``."""
        self._bytes.add((direction, transport), size)

    def exchange(self, route: str, outcome: str, seconds: float) -> None:
        """
        One HTTP request was answered or failed after ``seconds``.

        :param route: the path below the base URL; those that are not the protocol's own count as ``other``.
        :param outcome: the HTTP client's: a class of status such as ``2xx``, or what failed.
        """
        self._requests.observe((route if route in _ROUTES else OTHER, outcome), seconds)

    def invalid(self, reason: str) -> None:
        """A message from a backend was not understood; ``reason`` is a ``Malformed``'s, or ``wrong-machine``."""
        self._invalid.add((reason,), 1)

    def command_finished(self, status: str, seconds: float) -> None:
        """A command has its result; ``status`` is the result's, ``seconds`` since it was offered."""
        self._commands.observe((status,), seconds)

    # -- prometheus_client's Collector

    def collect(self) -> Iterator[Metric]:
        """Yield all families as they stand."""
        for family in self._families:
            yield family.collect()
        now = self._seconds()
        since: Series = {(backend,): max(0.0, now - at) for backend, at in self._receipts.copy().items()}
        yield self._since_receipt.collect(since)
        yield from self._collect_queue(self._queue() if self._queue is not None else None, now)

    # The registry compares names at registration, when there are no samples yet.
    describe = collect

    def _collect_queue(self, held: QueueStatus | None, now: float) -> Iterator[Metric]:
        held = held if held is not None else QueueStatus()
        oldest = 0.0 if held.oldest_event_at is None else max(0.0, now - held.oldest_event_at)
        budget = inf if held.outage_budget is None else held.outage_budget
        for name, text, value in (
            ("queue_events", "Events held for the backend.", held.events),
            ("queue_bytes", "Bytes of event bodies held for the backend.", held.event_bytes),
            ("queue_oldest_seconds", "Age of the oldest event held.", oldest),
            ("dead_letters", "Messages kept that can never be delivered.", held.dead_letters),
            ("unreported_losses", "Losses of which no backend has acknowledged a receipt.", held.unreported_losses),
            ("spool_ok", "Whether the spool's disk and database are in order.", 0 if held.trouble else 1),
            ("open_commands", "Commands accepted and not yet finished.", held.open_commands),
            (
                "outage_budget_seconds",
                "Outage that the spool can still buffer at the present rate; +Inf while nothing is produced.",
                budget,
            ),
        ):
            yield GaugeMetricFamily(f"commsmgr_{name}", text, value)
        dropped = Family(CounterMetricFamily, "dropped_total", "Messages given up, by reason.", ("reason",))
        yield dropped.collect({(reason,): count for reason, count in held.dropped.items()})
