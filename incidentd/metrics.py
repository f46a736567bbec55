"""Metrics: what Prometheus reads on the side port.

Owns every metric's name, labels and buckets, and the HTTP server that shows them. Must not know how anything it counts
comes about.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from incidentd.errors import SettingsError

disable_created_metrics()  # type: ignore[no-untyped-call]

# From a healthy payment (a few ms, where the steps are finest) to the pool's timeout and the longest think time.
_MILLISECONDS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7.5, 10, 15, 25, 50, 75, 100, 150, 250, 500, 750)
_DURATION = (*(ms / 1000 for ms in _MILLISECONDS), 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 15.0, 30.0)
_LAG = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Pool(Protocol):
    """What is asked of a connection pool: psycopg_pool's figures."""

    @property
    def max_size(self) -> int: ...

    def get_stats(self) -> dict[str, int]: ...


class Metrics:
    """The metrics of one daemon, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        add: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("payment_requests", "Payments begun, whatever became of them.", **add)
        self._errors = Counter("payment_errors", "Payments that failed.", ["reason", "sqlstate"], **add)
        self._skipped = Counter("payment_skipped", "Payments that could not be begun within 10 s of being due.", **add)
        self._duration = Histogram(
            "payment_duration_seconds",
            "From when a payment was due to its end, failed ones included.",
            buckets=_DURATION,
            **add,
        )
        self._lag = Histogram(
            "payment_schedule_lag_seconds", "From when a payment was due to when it was begun.", buckets=_LAG, **add
        )
        self._pool_wait = Histogram(
            "db_client_connection_wait_time_seconds", "The wait for a connection of the pool.", buckets=_DURATION, **add
        )
        self.harness = _Harness(self.registry)
        self.payments = self.failed = 0  # the same counts for the status line, cheaper than reading samples

    def payment_begun(self, lag: float) -> None:
        """A payment is begun, `lag` seconds after it was due."""
        self._requests.inc()
        self._lag.observe(lag)

    def payment_ended(self, seconds: float, trace_id: str | None = None) -> None:
        """A payment ended, well or not, `seconds` after it was due; `trace_id` becomes the exemplar of a traced one."""
        self.payments += 1
        self._duration.observe(seconds, {"trace_id": trace_id} if trace_id else None)

    def payment_error(self, reason: str, sqlstate: str) -> None:
        """A payment ended badly."""
        self.failed += 1
        self._errors.labels(reason, sqlstate).inc()

    def payment_skipped(self) -> None:
        """A payment was given up before it was begun."""
        self._skipped.inc()

    def pool_wait(self, seconds: float) -> None:
        """A request waited for a connection, in vain or not."""
        self._pool_wait.observe(seconds)

    def watch_pool(self, pool: Pool) -> None:
        """Shows the figures of `pool` from now on."""
        self.registry.register(_PoolCollector(pool))

    def duration_counts(self) -> dict[float, float]:
        """The payments so far by upper bound of their duration in seconds, not cumulated."""
        samples = [s for metric in self._duration.collect() for s in metric.samples if s.name.endswith("_bucket")]
        counts, below = {}, 0.0
        for sample in samples:
            counts[float(sample.labels["le"])] = sample.value - below
            below = sample.value
        return counts

    def serve(self, address: str, port: int) -> MetricsServer:
        """Serves the metrics on `address`. Raises SettingsError when that is not to be had."""
        try:
            server, thread = start_http_server(port, addr=address, registry=self.registry)
        except OverflowError:
            raise SettingsError(f"metrics port {port} is not a port: choose one from 0 to 65535") from None
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot even be asked for
            reason = getattr(error, "strerror", None) or error
            raise SettingsError(
                f"cannot serve metrics on {address}:{port}: {reason}: choose another --metrics-port "
                "(0 takes a free one) or --metrics-addr"
            ) from None
        return MetricsServer(server, thread)


class MetricsServer:
    """The running HTTP server; `port` is the one it got."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        self.port = server.server_port

    def close(self) -> None:
        """Stops serving. Blocks for up to half a second, until the server has noticed."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=1)


class _PoolCollector(Collector):
    """The pool under the names of OpenTelemetry's semantic conventions for database clients."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def collect(self) -> Iterable[Metric]:
        stats = self._pool.get_stats()
        idle = stats.get("pool_available", 0)
        count = GaugeMetricFamily("db_client_connection_count", "Connections of the pool.", labels=["state"])
        count.add_metric(["idle"], idle)
        count.add_metric(["used"], max(0, stats.get("pool_size", 0) - idle))
        yield count
        yield GaugeMetricFamily("db_client_connection_max", "The most connections the pool may have.", self._pool.max_size)
        yield GaugeMetricFamily(
            "db_client_connection_pending_requests",
            "Requests that wait for one.",
            stats.get("requests_waiting", 0),
        )
        timeouts = Metric("db_client_connection_timeouts", "Requests that got no connection in time.", "counter")
        timeouts.add_sample("db_client_connection_timeouts_total", {}, stats.get("requests_errors", 0))
        yield timeouts


class _Harness(Collector):
    """The daemon's own metrics, under `incidentd_`; nothing at all while `blind`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.blind = False
        self._own = CollectorRegistry()
        add: dict[str, Any] = {"registry": self._own}
        self._mode = Gauge("incidentd_mode", "1 for the mode that the daemon is in.", ["mode"], **add)
        self._transitions = Counter("incidentd_transitions", "Modes entered.", ["mode"], **add)
        self._seconds = Histogram(
            "incidentd_transition_seconds",
            "From noticing a change of mode to its end.",
            ["mode"],
            buckets=_DURATION,
            **add,
        )
        self.evidence = Gauge("incidentd_evidence_visible", "1 while the incident's evidence is visible.", **add)
        self.residue = Gauge("incidentd_residue", "Objects that the last incident has left behind.", **add)
        self.connected = Gauge("incidentd_control_connected", "1 while demo_control can be read.", **add)
        self.leading = Gauge("incidentd_leading", "1 in the daemon that injects and recovers.", **add)
        self.loop_lag = Histogram("incidentd_event_loop_lag_seconds", "How late the event loop runs.", buckets=_LAG, **add)
        self.dropped = Counter("incidentd_telemetry_dropped", "Spans and log records that nobody took.", ["signal"], **add)
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        return [] if self.blind else self._own.collect()

    def entered(self, mode: str, seconds: float) -> None:
        """The daemon is in `mode`, `seconds` after it noticed that it should be."""
        self._mode.clear()
        self._mode.labels(mode).set(1)
        self._transitions.labels(mode).inc()
        self._seconds.labels(mode).observe(seconds)
