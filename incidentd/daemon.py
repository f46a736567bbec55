"""The daemon: everything put together, started in order and stopped in order.

Owns the order of start and stop, the signals, and the status line. Must not know how any part does its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import signal
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import psycopg
from psycopg import AsyncConnection

from incidentd import catalog, check, conductor, database, identity, install, journal, population
from incidentd.catalog import Catalog
from incidentd.conductor import Conductor
from incidentd.control import Control
from incidentd.database import Row, Server, ask
from incidentd.errors import ServerError, SqlFileError
from incidentd.guards import Guards
from incidentd.install import Progress
from incidentd.metrics import Metrics
from incidentd.sessions import Sessions
from incidentd.settings import Settings
from incidentd.tracing import Tracing
from incidentd.workload import PAYMENT, Workload

log = logging.getLogger(__name__)

_STATUS_SECONDS = 10
_CONTROL_SECONDS = 10  # for the first reading of demo_control; without one the daemon waits for the server as it always does
_LAG_SECONDS = 0.1  # how often the event loop is asked whether it is late
_RECOVER_SECONDS = 4  # for recovering on the way out; what is not undone then is undone by the next start
_STOP = (signal.SIGINT, signal.SIGTERM)


async def run_until_stopped(
    server: Server, settings: Settings, metrics: Metrics, tracing: Tracing, progress: Progress, ready: Callable[[], None]
) -> None:
    """Prepares the database and keeps the payment service running until SIGINT or SIGTERM.

    `ready` is called when payments are about to flow. Raises IncidentdError with the reason why they cannot.
    """
    stop = asyncio.Event()
    for number in _STOP:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    preparing = asyncio.create_task(prepare(server, settings, progress))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([preparing, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not preparing.done():
        preparing.cancel()
        await asyncio.wait([preparing])
        return
    server, loaded = preparing.result()
    ready()
    await serve(server, loaded, settings, metrics, tracing, stopping)


async def prepare(server: Server, settings: Settings, progress: Progress) -> tuple[Server, Catalog]:
    """Brings the database and its catalog to where payments can flow; returns the server with the roles' password.

    Raises IncidentdError with the reason why they cannot.
    """
    loaded = catalog.load(catalog.incident_files(catalog.incident_directories(settings.incidents)))
    try:
        conn = await database.connect(server.control())
    except psycopg.OperationalError as error:
        raise database.unreachable(error) from None
    async with conn:
        await identity.be_unseen(conn)
        await install.install(conn, settings.payments, progress)
        if settings.server is not None:
            server = Server(server.parameters, await install.share_password(conn, settings.role_password))
        await recover_before_anything_else(conn)
        if faults := await check.check(conn, await unknown(conn, loaded), make_changes=False):
            raise SqlFileError(faults)
        await publish(conn, loaded, settings.allow_cluster_scope)
    return server, loaded


async def recover_before_anything_else(conn: AsyncConnection[Row]) -> None:
    """Undoes what a daemon that died has left; a daemon that leads does that by itself."""
    if await journal.unfinished(conn):
        with contextlib.suppress(ServerError):
            await conductor.recover_now(conn)


async def unknown(conn: AsyncConnection[Row], loaded: Catalog) -> Catalog:
    """The part of the catalog that has to be checked: all of it, except while another daemon has an incident going.

    Then the database is not as the files expect it, and those that are published already were found sound before.
    """
    if not await journal.unfinished(conn):
        return loaded
    published = {str(row["sha256"]) for row in await ask(conn, "list_incidents")}
    new = {name: incident for name, incident in loaded.incidents.items() if incident.sha256 not in published}
    return Catalog(loaded.normal, MappingProxyType(new))


async def publish(conn: AsyncConnection[Row], loaded: Catalog, allow_cluster_scope: bool) -> None:
    """Tells the control plane what modes there are, and which of them this server cannot have."""
    async with conn.transaction():
        for incident in loaded.incidents.values():
            front = incident.front
            requires = json.dumps(front.requires)
            missing = [str(row["name"]) for row in await ask(conn, "missing_requirements", requires=requires)]
            refusal = None
            if front.scope == "cluster" and not allow_cluster_scope:
                refusal = "it affects other databases of the server: start the daemon with --allow-cluster-scope"
            elif missing:
                refusal = f"the server does not offer what it requires: {', '.join(missing)}"
            await ask(
                conn,
                "publish_incident",
                name=incident.name,
                title=front.title,
                category=front.category,
                severity=front.severity,
                cause=front.cause,
                fix=front.fix,
                traps=json.dumps(front.traps),
                requires=requires,
                scope=front.scope,
                sha256=incident.sha256,
                refusal=refusal,
                signals=json.dumps(
                    {"promql": front.signals.promql, "logql": front.signals.logql, "traceql": front.signals.traceql}
                ),
            )
        await ask(conn, "forget_incidents", names="{" + ",".join(loaded.incidents) + "}")


async def serve(
    server: Server, loaded: Catalog, settings: Settings, metrics: Metrics, tracing: Tracing, stopping: asyncio.Task[Any]
) -> None:
    """Keeps the payment service running until `stopping` is done, then recovers what runs."""
    async with await database.connect(server.control()) as conn:
        await identity.be_unseen(conn)
        people = await population.load(conn)
    control = Control(server, metrics)
    workload = Workload(server, settings.pool_size, people, metrics, tracing)
    sessions = Sessions(server, people, tracing)
    disk = settings.state_dir if settings.server is None else None
    leader = Conductor(server, loaded, control, sessions, workload, metrics, tracing, Guards(disk))
    following = asyncio.create_task(control.follow(), name="control")
    await control.changed(_CONTROL_SECONDS)  # the control's connection comes first: the pool takes what is left
    await workload.open(loaded.normal[PAYMENT])
    conducting = asyncio.create_task(leader.conduct(), name="conductor")
    helpers = [
        following,
        asyncio.create_task(_tell_status(metrics, leader), name="status"),
        asyncio.create_task(_measure_lag(metrics), name="lag"),
    ]
    try:
        await asyncio.wait([stopping, conducting, *helpers], return_when=asyncio.FIRST_COMPLETED)
        leader.stop()
        await asyncio.wait([conducting], timeout=_RECOVER_SECONDS)
    finally:
        for task in (conducting, *helpers):
            task.cancel()
        ended = await asyncio.gather(conducting, *helpers, return_exceptions=True)
        await sessions.close()
        await workload.close()
    for failure in ended:
        if isinstance(failure, Exception):
            raise failure
    if isinstance(ended[0], asyncio.CancelledError):
        log.error("not recovered within %d s: the next start does it", _RECOVER_SECONDS, extra={"event": "not_recovered"})


async def _measure_lag(metrics: Metrics) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + _LAG_SECONDS
        await asyncio.sleep(_LAG_SECONDS)
        metrics.harness.loop_lag.observe(max(0.0, clock() - due))


async def _tell_status(metrics: Metrics, conductor: Conductor) -> None:
    """A line now and then, so that a person at the terminal sees the payments flow."""
    payments, failed, counts = metrics.payments, metrics.failed, metrics.duration_counts()
    while True:
        since = time.monotonic()
        await asyncio.sleep(_STATUS_SECONDS)
        seconds, now = time.monotonic() - since, metrics.duration_counts()
        p95 = _quantile(0.95, {bound: count - counts[bound] for bound, count in now.items()})
        log.info(
            "%s: %.0f payments/s, 95 %% within %s, %d failed",
            conductor.mode,
            (metrics.payments - payments) / seconds,
            f"{p95 * 1000:.0f} ms" if p95 < float("inf") else "more than 30 s",
            metrics.failed - failed,
            extra={"event": "status"},
        )
        payments, failed, counts = metrics.payments, metrics.failed, now


def _quantile(part: float, counts: dict[float, float]) -> float:
    """The upper bound of the bucket that holds the quantile, 0 of nothing."""
    total = sum(counts.values())
    reached = itertools.accumulate(counts.values())
    return next((bound for bound, below in zip(counts, reached, strict=True) if total and below >= part * total), 0.0)
