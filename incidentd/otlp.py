"""Export: where spans and log records go, and what happens while nobody takes them.

Owns the OpenTelemetry SDK's processors and exporters, their bounds, and the count of what was dropped. Must not know what is
traced or logged. OTEL_* environment variables mean what the specification says
(https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/); the exporters read most of them.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from incidentd.errors import SettingsError
from incidentd.metrics import Metrics

log = logging.getLogger(__name__)

_QUEUE = 2048  # spans or records that may wait: the SDK's default, and about 5 MB
_BATCH = 512
_DELAY_MS = 500  # half a second from the end of a payment to its trace being sent
_SHUTDOWN_SECONDS = 2  # for what is still queued on the way out
_PROTOCOLS = {"grpc": "grpc", "http/protobuf": "http"}


def resource(service: str) -> Resource:
    """What spans and records of `service` say about where they come from. `service` and `app` are labels in Loki."""
    own = {"service.name": service, "service": service, "service.instance.id": socket.gethostname()}
    return Resource.create(own)


class Export:
    """The ways out for spans and log records; either is None where the environment says so."""

    def __init__(self, metrics: Metrics, environment: Mapping[str, str]) -> None:
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # what it would repeat for every batch, `_Way` tells once
        self.spans = self._spans(metrics, environment)
        self.logs = self._logs(metrics, environment)

    def close(self) -> None:
        """Sends what is queued, for two seconds at most. Blocks."""
        closing = [
            threading.Thread(target=processor.shutdown, daemon=True)
            for processor in (self.spans, self.logs)
            if processor is not None
        ]
        for thread in closing:
            thread.start()
        deadline = time.monotonic() + _SHUTDOWN_SECONDS  # for both together
        for thread in closing:
            thread.join(max(0.0, deadline - time.monotonic()))

    @staticmethod
    def _spans(metrics: Metrics, environment: Mapping[str, str]) -> BatchSpanProcessor | None:
        package = _package("TRACES", environment)
        if package is None:
            return None
        exporter = importlib.import_module(f"{package}.trace_exporter").OTLPSpanExporter()
        return _SpanProcessor(_SpanExporter(exporter, _Way("traces", metrics)))

    @staticmethod
    def _logs(metrics: Metrics, environment: Mapping[str, str]) -> BatchLogRecordProcessor | None:
        package = _package("LOGS", environment)
        if package is None:
            return None
        exporter = importlib.import_module(f"{package}._log_exporter").OTLPLogExporter()
        return _LogProcessor(_LogExporter(exporter, _Way("logs", metrics)))

    def logger_provider(self, service: str) -> LoggerProvider | None:
        """Where the logging handler of OpenTelemetry sends its records."""
        if self.logs is None:
            return None
        provider = LoggerProvider(resource(service), shutdown_on_exit=False)
        provider.add_log_record_processor(self.logs)
        return provider


def _package(signal: str, environment: Mapping[str, str]) -> str | None:
    """The package of the exporter that the environment chooses for `signal`, None for no export. Raises SettingsError.

    Packages are imported when chosen: gRPC alone takes as much memory as the rest of the daemon.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    name = environment.get(f"OTEL_{signal}_EXPORTER") or "otlp"
    if name == "none":
        return None
    if name != "otlp":
        raise SettingsError(f'OTEL_{signal}_EXPORTER must be otlp or none, not "{name}"')
    variables = (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    variable = next((variable for variable in variables if environment.get(variable)), variables[1])
    protocol = environment.get(variable) or "http/protobuf"
    if protocol not in _PROTOCOLS:
        raise SettingsError(f'{variable} must be {" or ".join(_PROTOCOLS)}, not "{protocol}"')
    return f"opentelemetry.exporter.otlp.proto.{_PROTOCOLS[protocol]}"


class _Way:
    """What one signal has let in and sent, and whether somebody takes it. Says so when that changes, once."""

    def __init__(self, signal: str, metrics: Metrics) -> None:
        self._signal = signal
        self._metrics = metrics
        self._lock = threading.Lock()
        self._waiting = 0
        self._taken = True

    def enter(self) -> bool:
        """Whether there is room for one more; counts it as dropped where there is not."""
        with self._lock:
            room = self._waiting < _QUEUE
            self._waiting += room
        if not room:
            self._metrics.harness.dropped.labels(self._signal).inc()
        return room

    def sent(self, count: int, *, taken: bool) -> None:
        """A batch has been taken, or given up."""
        with self._lock:
            self._waiting -= count
        if not taken:
            self._metrics.harness.dropped.labels(self._signal).inc(count)
        if taken != self._taken:
            self._taken = taken
            event = {"event": "telemetry_back" if taken else "telemetry_lost"}
            if taken:
                log.info("%s are taken again", self._signal, extra=event)
            else:
                log.info("nobody takes %s: they are dropped until somebody does", self._signal, extra=event)


class _SpanExporter(SpanExporter):
    def __init__(self, exporter: SpanExporter, way: _Way) -> None:
        self._exporter, self.way = exporter, way

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self.way.sent(len(spans), taken=result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _LogExporter(LogRecordExporter):
    def __init__(self, exporter: LogRecordExporter, way: _Way) -> None:
        self._exporter, self.way = exporter, way

    def export(self, batch: Sequence[Any]) -> LogRecordExportResult:
        result = LogRecordExportResult.FAILURE
        try:
            result = self._exporter.export(batch)
        finally:
            self.way.sent(len(batch), taken=result is LogRecordExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class _SpanProcessor(BatchSpanProcessor):
    def __init__(self, exporter: _SpanExporter) -> None:
        super().__init__(exporter, max_queue_size=_QUEUE, schedule_delay_millis=_DELAY_MS, max_export_batch_size=_BATCH)
        self._way = exporter.way

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled and self._way.enter():
            super().on_end(span)


class _LogProcessor(BatchLogRecordProcessor):
    def __init__(self, exporter: _LogExporter) -> None:
        super().__init__(exporter, max_queue_size=_QUEUE, schedule_delay_millis=_DELAY_MS, max_export_batch_size=_BATCH)
        self._way = exporter.way

    def on_emit(self, log_record: Any) -> None:
        if self._way.enter():
            super().on_emit(log_record)


def environment() -> dict[str, str]:
    """The process's environment, with the current names of database attributes chosen unless the user chose otherwise."""
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "database,http")
    return dict(os.environ)
