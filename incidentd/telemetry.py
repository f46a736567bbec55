"""Telemetry: everything of the daemon that others can read, as one thing: started, blinded, closed.

Owns what blind mode hides. Must not know what is measured, traced or logged.
"""

from __future__ import annotations

from opentelemetry.instrumentation.logging.handler import LoggingHandler

from incidentd import logs, otlp
from incidentd.metrics import Metrics
from incidentd.tracing import Tracing


class Telemetry:
    """Metrics, traces and logs, from now on."""

    def __init__(self, metrics: Metrics, log_format: str) -> None:
        environment = otlp.environment()
        self._export = otlp.Export(metrics, environment)
        provider = self._export.logger_provider(logs.SERVICE)
        self._blindfold = logs.configure(log_format, LoggingHandler(logger_provider=provider) if provider else None)
        self.metrics = metrics
        self.tracing = Tracing(self._export.spans, environment)

    def set_blind(self, blind: bool) -> None:
        """Takes the harness and the incident out of everything that is told, or lets them be told again."""
        self._blindfold.on = self.metrics.harness.blind = blind

    def set_incident(self, mode: str, kind: str | None) -> None:
        """What the spans say of the incident from now on; nothing in blind mode."""
        told = {"incident.mode": mode} | ({"incident.type": kind} if kind else {})
        self.tracing.attributes = {} if self._blindfold.on else told

    def close(self) -> None:
        """Sends what is left, for two seconds at most. Blocks."""
        self.tracing.close()
        self._export.close()
