"""Logs: one record, as JSON for machines or as a line for a person at a terminal.

Owns formats and levels. Must not know what is logged.
"""

from __future__ import annotations

import datetime
import logging
import sys
from dataclasses import dataclass
from typing import Any

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

FORMATS = ("auto", "json", "text")
SERVICE = "payment-service"

_STORY = frozenset({"incidentd.workload", "incidentd.sessions"})

_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}
_RESET = "\x1b[0m"


def configure(log_format: str, other: logging.Handler | None = None) -> Blindfold:
    """Sends every record of level INFO and above to stdout, in `log_format`, one of FORMATS, and to the handler `other`.

    Returns what silences the harness in blind mode. A storm of one event is calmed before either handler sees it, so both
    get the same records.
    """
    terminal = sys.stdout.isatty()
    out = logging.StreamHandler(sys.stdout)
    if log_format == "json" or (log_format == "auto" and not terminal):
        out.setFormatter(_Json())
    else:
        out.setFormatter(_Text(colours=terminal))
    both = _Both([out, *([other] if other else [])])
    blindfold = Blindfold()
    both.addFilter(blindfold)
    both.addFilter(Calm())
    logging.basicConfig(level=logging.INFO, handlers=[both], force=True)
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # its pool tells of every checkout and every failed attempt
    return blindfold


class _Both(logging.Handler):
    """Hands each record to several handlers."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        super().__init__()
        self._handlers = handlers

    def emit(self, record: logging.LogRecord) -> None:
        record.name = record.name.removeprefix("incidentd.")  # what is read tells of the service, not of the tool
        for handler in self._handlers:
            handler.handle(record)


class Blindfold(logging.Filter):
    """While `on`, lets only the story speak: what its requests and sessions say, and nothing of the harness."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        return not self.on or record.name in _STORY


class Calm(logging.Filter):
    """Lets a storm of one event through as a few lines a second; the next line tells how many were left out.

    Records are of one kind when they have the same `event` and `reason`; records without an event always pass.
    """

    def __init__(self, burst: int = 3, seconds: float = 1.0) -> None:
        super().__init__()
        self._burst, self._seconds = burst, seconds
        self._kinds: dict[tuple[str, str], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        event = getattr(record, "event", None)
        if event is None:
            return True
        kind = self._kinds.setdefault((event, getattr(record, "reason", "")), _Kind())
        if record.created - kind.since >= self._seconds:
            kind.since, kind.passed = record.created, 0
        if kind.passed == self._burst:
            kind.left_out += 1
            return False
        kind.passed += 1
        if kind.left_out:
            record.__dict__["left_out"] = kind.left_out
            record.msg = f"{record.msg} (and {kind.left_out} more before)"
            kind.left_out = 0
        return True


@dataclass(slots=True)
class _Kind:
    """What has come of one kind of record: since when the current second is, and what was let through and left out in it."""

    since: float = 0.0
    passed: int = 0
    left_out: int = 0


class _Json(JsonFormatter):
    """One JSON object a line: timestamp, level, logger, message, service, and the record's own `extra` fields."""

    def __init__(self) -> None:
        super().__init__(
            "{levelname}{name}{message}",
            style="{",
            static_fields={"service": SERVICE},
            rename_fields={"levelname": "level", "name": "logger"},
        )

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        log_data["timestamp"] = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        super().add_fields(log_data, record, message_dict)
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            log_data["trace_id"] = trace.format_trace_id(context.trace_id)
            log_data["span_id"] = trace.format_span_id(context.span_id)


class _Text(logging.Formatter):
    """`10:07:21 lock_contention begins`, warnings in yellow and errors in red where there are colours."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        colour = _COLOURS.get(record.levelno) if self._colours else None
        return f"{colour}{line}{_RESET}" if colour else line
