"""Traces: the spans of a request, with the wait for a connection and each statement below it.

Owns which requests are traced and what their spans are called. Must not know how requests are made, nor where spans go.

Two kinds of request are traced. A part of all, chosen when they begin (OTEL_TRACES_SAMPLER, 5 % unless it says otherwise),
run on the cursor of opentelemetry-instrumentation-psycopg, which puts the trace id into an SQL comment. Of the rest nothing
is made but a list of times; where such a request fails or is slow, its spans are made from that list when it ends. So an
unsampled request costs next to nothing, its statements stay prepared and free of comments, and no failed or slow one is lost.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psycopg
from opentelemetry import trace
from opentelemetry.context import Context, get_value, set_value
from opentelemetry.instrumentation.psycopg import PsycopgInstrumentor
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.sdk.trace.sampling import _get_from_env_or_default as sampler_from_environment
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer

from incidentd import otlp
from incidentd.logs import SERVICE
from incidentd.sqltext import Statement

SLOW_SECONDS = 0.1  # from when on a request is slow: twenty times a healthy payment
SHARE = 0.05
_SESSION_GAP_SECONDS = 0.5  # actors with sessions are traced about twice a second at most, each

# Span names of the story's operations; any other actor's name is its operation's.
_NAMES = {"payment": "create_payment"}
_KEEP = "incidentd.keep"
_COMMENTER = {
    "db_driver": False,
    "dbapi_threadsafety": False,
    "dbapi_level": False,
    "libpq_version": False,
    "driver_paramstyle": False,
}

Timeline = list[tuple[Statement, int, int]]


class Tracing:
    """Begins traces. Without a `processor` nothing is traced."""

    def __init__(self, processor: SpanProcessor | None, environment: Mapping[str, str]) -> None:
        self._processor = processor
        self._sampler = _sampler(environment)
        self._ids = RandomIdGenerator()
        self._tracers: dict[str, Tracer] = {}
        self._last: dict[str, float] = {}
        self.attributes: Mapping[str, str] = {}  # on every span of a request: which incident there is, where that may be told
        if processor is not None:
            provider = self._provider(SERVICE)
            PsycopgInstrumentor().instrument(tracer_provider=provider, enable_commenter=True, commenter_options=_COMMENTER)

    def request(self, actor: str, due_ns: int) -> Request:
        """A request of the payment service that was due at `due_ns` (time.time_ns's clock)."""
        if self._processor is None:
            return Request(None, actor, due_ns, {}, sampled=False)
        decision = self._sampler.should_sample(None, self._ids.generate_trace_id(), actor).decision
        sampled = decision is Decision.RECORD_AND_SAMPLE
        return Request(self._tracer(SERVICE), actor, due_ns, self.attributes, sampled=sampled)

    def session(self, actor: str, service: str) -> Request:
        """A pass of an actor with a session of its own, which is a service of its own."""
        now = time.monotonic()
        if self._processor is None:
            return Request(None, actor, time.time_ns(), {}, sampled=False)
        request = Request(self._tracer(service), actor, time.time_ns(), self.attributes, sampled=False, paced=True)
        if now - self._last.get(actor, 0) >= _SESSION_GAP_SECONDS:
            self._last[actor] = now
            request.keep = True
        return request

    def close(self) -> None:
        """Leaves the driver as it was."""
        if self._processor is not None:
            PsycopgInstrumentor().uninstrument()

    def _tracer(self, service: str) -> Tracer:
        if service not in self._tracers:
            self._provider(service)
        return self._tracers[service]

    def _provider(self, service: str) -> TracerProvider:
        assert self._processor is not None
        provider = TracerProvider(sampler=ParentBased(_Kept()), resource=otlp.resource(service), shutdown_on_exit=False)
        provider.add_span_processor(self._processor)
        self._tracers[service] = provider.get_tracer("payments")
        return provider


class Request:
    """One request on its way, traced or not (yet)."""

    __slots__ = ("_actor", "_attributes", "_due", "_paced", "_span", "_tracer", "_waits", "keep", "timeline")

    def __init__(
        self,
        tracer: Tracer | None,
        actor: str,
        due_ns: int,
        attributes: Mapping[str, str],
        *,
        sampled: bool,
        paced: bool = False,
    ) -> None:
        self._tracer = tracer
        self._actor = actor
        self._due = due_ns
        self._attributes = attributes
        self._paced = paced  # by think time, which does not make it slow
        self._waits: list[tuple[int, int]] = []
        self.timeline: Timeline = []  # of an unsampled request: its statements, and when each began and ended
        self.keep = sampled
        self._span: Span | None = self._begin() if sampled else None

    @property
    def sampled(self) -> bool:
        """Whether the request runs on the instrumented cursor."""
        return self._span is not None

    def current(self) -> AbstractContextManager[Any]:
        """Makes a sampled request the parent of the spans that the instrumented cursor makes."""
        if self._span is None:
            return nullcontext()
        return trace.use_span(self._span, end_on_exit=False, record_exception=False, set_status_on_exception=False)

    def waited(self, begun_ns: int, ended_ns: int) -> None:
        """The request has waited for a connection of the pool, in vain or not."""
        self._waits.append((begun_ns, ended_ns))

    def end(self, error: Exception | None, values: Mapping[str, str | None]) -> Span | None:
        """Ends the request; its span where it is traced, which then carries what is in `values` of the payment."""
        ended = time.time_ns()
        if self._tracer is None or not (self.keep or error is not None or self._slow(ended)):
            return None
        span = self._span or self._begin()
        below = trace.set_span_in_context(span)
        for begun, got in self._waits:
            wait = self._tracer.start_span("pool.acquire", below, SpanKind.INTERNAL, start_time=begun)
            wait.end(got)
        for number, (statement, begun, done) in enumerate(self.timeline, 1):
            failed = error if number == len(self.timeline) else None
            self._statement(self._tracer, below, statement, (begun, done), failed)
        if self._actor == "payment":
            found = {"payment.id": values.get("payment_id"), "payment.amount": values.get("amount")}
            span.set_attributes({key: value for key, value in found.items() if value is not None})
        if error is not None:
            _fail(span, error, ended)
        span.end(ended)
        return span

    def _slow(self, ended: int) -> bool:
        spent = sum(done - begun for _, begun, done in self.timeline) if self._paced else ended - self._due
        return spent >= SLOW_SECONDS * 1e9

    def _begin(self) -> Span:
        assert self._tracer is not None
        name = _NAMES.get(self._actor, self._actor)
        context = set_value(_KEEP, True, Context())
        return self._tracer.start_span(name, context, SpanKind.SERVER, dict(self._attributes), start_time=self._due)

    @staticmethod
    def _statement(
        tracer: Tracer, below: Context, statement: Statement, times: tuple[int, int], error: Exception | None
    ) -> None:
        attributes = {"db.system.name": "postgresql", "db.query.text": statement.text, "db.operation.name": statement.keyword}
        span = tracer.start_span(statement.keyword, below, SpanKind.CLIENT, attributes, start_time=times[0])
        if error is not None:
            _fail(span, error, times[1])
        span.end(times[1])


def _fail(span: Span, error: Exception, when_ns: int) -> None:
    span.record_exception(error, timestamp=when_ns)
    span.set_status(Status(StatusCode.ERROR, str(error).split("\n", 1)[0]))
    span.set_attribute("error.type", type(error).__name__)
    if isinstance(error, psycopg.Error) and error.sqlstate:
        span.set_attribute("db.response.status_code", error.sqlstate)


def _sampler(environment: Mapping[str, str]) -> Sampler:
    """What chooses when a request begins: the sampler that the environment names, else a share of all."""
    if environment.get("OTEL_TRACES_SAMPLER"):
        return sampler_from_environment()
    return TraceIdRatioBased(SHARE)


class _Kept(Sampler):
    """Records exactly the root spans that were decided on already; the driver's other statements have no root and no span."""

    def should_sample(
        self, parent_context: Context | None, trace_id: int, name: str, *_: Any, attributes: Any = None, **__: Any
    ) -> SamplingResult:
        keep = get_value(_KEEP, parent_context)
        return SamplingResult(Decision.RECORD_AND_SAMPLE if keep else Decision.DROP, attributes)

    def get_description(self) -> str:
        return "Kept"
