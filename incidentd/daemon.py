"""The daemon: everything put together, started in order and stopped in order.

Owns the order of start and stop, the signals, and the status line. Must not know how any part does its work.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

from incidentd import database, identity, population, preparation
from incidentd.catalog import Catalog
from incidentd.conductor import Conductor
from incidentd.control import Control
from incidentd.database import Server
from incidentd.guards import Guards
from incidentd.install import Progress
from incidentd.metrics import Metrics
from incidentd.sessions import Sessions
from incidentd.settings import Settings
from incidentd.telemetry import Telemetry
from incidentd.workload import PAYMENT, Workload

log = logging.getLogger(__name__)

_STATUS_SECONDS = 10
_CONTROL_SECONDS = 10  # for the first reading of demo_control; without one the daemon waits for the server as it always does
_LAG_SECONDS = 0.1  # how often the event loop is asked whether it is late
_RECOVER_SECONDS = 4  # for recovering on the way out; what is not undone then is undone by the next start
_STOP = (signal.SIGINT, signal.SIGTERM)


async def run_until_stopped(
    server: Server, settings: Settings, telemetry: Telemetry, progress: Progress, ready: Callable[[], None]
) -> None:
    """Prepares the database and keeps the payment service running until SIGINT or SIGTERM.

    `ready` is called when payments are about to flow. Raises IncidentdError with the reason why they cannot.
    """
    stop = asyncio.Event()
    for number in _STOP:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    preparing = asyncio.create_task(preparation.prepare(server, settings, progress))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([preparing, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not preparing.done():
        preparing.cancel()
        await asyncio.wait([preparing])
        return
    server, loaded = preparing.result()
    ready()
    await serve(server, loaded, settings, telemetry, stopping)


async def serve(server: Server, loaded: Catalog, settings: Settings, telemetry: Telemetry, stopping: asyncio.Task[Any]) -> None:
    """Keeps the payment service running until `stopping` is done, then recovers what runs."""
    async with await database.connect(server.control()) as conn:
        await identity.be_unseen(conn)
        people = await population.load(conn)
    control = Control(server, telemetry)
    workload = Workload(server, settings.pool_size, people, telemetry.metrics, telemetry.tracing)
    sessions = Sessions(server, people, telemetry.tracing)
    disk = settings.state_dir if settings.server is None else None
    leader = Conductor(server, loaded, control, sessions, workload, telemetry, Guards(disk))
    following = asyncio.create_task(control.follow(), name="control")
    await control.changed(_CONTROL_SECONDS)  # the control's connection comes first: the pool takes what is left
    await workload.open(loaded.normal[PAYMENT])
    conducting = asyncio.create_task(leader.conduct(), name="conductor")
    helpers = [
        following,
        asyncio.create_task(_tell_status(telemetry.metrics, leader), name="status"),
        asyncio.create_task(_measure_lag(telemetry.metrics), name="lag"),
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
