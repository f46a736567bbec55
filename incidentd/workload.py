"""The workload: an open loop of requests through the payment service's connection pool.

Owns the pool, the arrivals and what is measured of each request. Must not know what a mode or an incident is.

Arrivals are a Poisson process scheduled ahead; a request is measured from when it was due, as pgbench does under --rate
(https://www.postgresql.org/docs/current/pgbench.html, "schedule lag"), so a stall is not hidden by the load waiting for it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import nullcontext

import psycopg
from opentelemetry import trace
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from incidentd import database, script
from incidentd.catalog import Actor, Cast
from incidentd.database import Row, Server
from incidentd.metrics import Metrics
from incidentd.population import Population
from incidentd.tracing import Request, Tracing

log = logging.getLogger(__name__)

PAYMENT = "payment"  # the actor whose runs are payments; every other one is only company
ACQUIRE_SECONDS = 5  # how long a request waits for a connection of the pool before it fails
STATEMENT_SECONDS = 10  # a statement that the server has not ended by then (its own limit is 8 s) has no server
SKIP_SECONDS = 10  # a request that could not be started this long after it was due never is (DESIGN §5)
_RECONNECT_SECONDS = 5  # the pool gives up after this and tries again when the next request asks
_CLOSE_SECONDS = 3

_REASONS = {
    "08": "connection",
    "22": "data",
    "23": "constraint",
    "25P03": "idle_in_transaction_timeout",
    "40001": "serialization",
    "40P01": "deadlock",
    "42501": "permission",
    "53": "resources",
    "53300": "too_many_connections",
    "55P03": "lock_timeout",
    "57014": "statement_timeout",
    "57P": "connection",
}


def reason(error: Exception) -> str:
    """A short word for why a request failed: the label `reason` of payment_errors_total."""
    if isinstance(error, PoolTimeout):
        return "pool_timeout"
    state = getattr(error, "sqlstate", None) or ""
    for length in (5, 3, 2):
        if word := _REASONS.get(state[:length]):
            return word
    return "connection" if isinstance(error, psycopg.OperationalError) else "other"


class Workload:
    """Requests of the pooled actors, at a rate, through one pool."""

    def __init__(self, server: Server, pool_size: int, population: Population, metrics: Metrics, tracing: Tracing) -> None:
        self._server = server
        self._pool_size = pool_size
        self._population = population
        self._metrics = metrics
        self._tracing = tracing
        self._pool: AsyncConnectionPool[AsyncConnection[Row]] | None = None
        self._streams: dict[str, _Stream] = {}

    async def open(self, payment: Actor) -> None:
        """Opens the pool as the role of the actor `payment`; it fills itself in the background, now and after a loss."""
        self._pool = AsyncConnectionPool(
            self._server.role(payment.role, payment.application_name),
            kwargs=dict(database.CONNECTION),
            min_size=self._pool_size,
            max_size=self._pool_size,
            timeout=ACQUIRE_SECONDS,
            reconnect_timeout=_RECONNECT_SECONDS,
            name="payments",
            open=False,
        )
        self._metrics.watch_pool(self._pool)
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Ends every request and the pool."""
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        if self._pool:
            await self._pool.close(timeout=_CLOSE_SECONDS)

    def play(self, cast: Cast, rate: float) -> None:
        """Makes the requests those of `cast` at `rate` payments a second, from now on.

        Requests of an actor that is no longer in the cast, or has another script, are cut short.
        """
        wanted = {actor.name: actor for actor in cast.values() if actor.share}
        for name, stream in list(self._streams.items()):
            if wanted.get(name) != stream.actor:
                self._streams.pop(name).close()
        for name, actor in wanted.items():
            if name not in self._streams:
                self._streams[name] = _Stream(actor, self)
            self._streams[name].set_rate(rate * (actor.share or 0))

    async def request(self, actor: Actor, due: float) -> None:
        """One request, due at the loop's time `due`."""
        clock = asyncio.get_running_loop().time
        lag = clock() - due
        if actor.name == PAYMENT:
            self._metrics.payment_begun(lag)
        request = self._tracing.request(actor.name, time.time_ns() - int(lag * 1e9))
        values = {**self._population.draw(), **script.constants(dict(actor.params))}
        failure: psycopg.Error | None = None
        try:
            await self._serve(actor, values, request)
        except psycopg.Error as error:
            failure = error
        span = request.end(failure, values)
        seconds = clock() - due
        if actor.name == PAYMENT:
            self._metrics.payment_ended(seconds, trace.format_trace_id(span.get_span_context().trace_id) if span else None)
        if failure is not None:
            with trace.use_span(span) if span else nullcontext():  # so that the record carries the trace's id
                self._report(actor, failure, seconds)

    async def _serve(self, actor: Actor, values: dict[str, str | None], request: Request) -> None:
        assert self._pool is not None
        asked = time.time_ns()
        try:
            conn = await self._pool.getconn()
        finally:
            got = time.time_ns()
            self._metrics.pool_wait((got - asked) / 1e9)
            request.waited(asked, got)
        try:
            with request.current():
                await script.play(conn, actor.script, values, request, STATEMENT_SECONDS)
        finally:
            await self._pool.putconn(conn)

    def _report(self, actor: Actor, error: psycopg.Error, seconds: float) -> None:
        state, why = error.sqlstate or "", reason(error)
        if actor.name == PAYMENT:
            self._metrics.payment_error(why, state)
        event = {"event": f"{actor.name}_failed", "reason": why, "sqlstate": state, "duration": round(seconds, 4)}
        log.warning("%s failed after %.0f ms: %s: %s", actor.name, seconds * 1000, why, database.sentence(error), extra=event)

    def skipped(self, actor: Actor) -> None:
        """A request that was due too long ago to be started."""
        if actor.name == PAYMENT:
            self._metrics.payment_skipped()


class _Stream:
    """The arrivals of one actor, and its requests on the way."""

    def __init__(self, actor: Actor, workload: Workload) -> None:
        self.actor = actor
        self._workload = workload
        self._rate = 0.0
        self._arrivals: asyncio.Task[None] | None = None
        self._requests: set[asyncio.Task[None]] = set()

    def set_rate(self, rate: float) -> None:
        """Requests a second from now on. Gaps have no memory, so beginning anew changes nothing but the rate."""
        if rate == self._rate:
            return
        self._rate = rate
        if self._arrivals:
            self._arrivals.cancel()
        self._arrivals = asyncio.create_task(self._arrive(), name=f"{self.actor.name} arrivals")

    def close(self) -> None:
        if self._arrivals:
            self._arrivals.cancel()
        for request in self._requests:
            request.cancel()

    async def _arrive(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += random.expovariate(self._rate)
            await asyncio.sleep(max(0.0, due - loop.time()))
            if loop.time() - due > SKIP_SECONDS:
                self._workload.skipped(self.actor)
                continue
            request = asyncio.create_task(self._workload.request(self.actor, due))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
