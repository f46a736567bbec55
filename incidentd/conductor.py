"""The conductor: turns what is wanted into what happens, one run at a time.

Owns the state of the run and the order of its steps: inject, witness, watch, mitigate, recover. One daemon leads, chosen by
an advisory lock; the others only play their part of the payments. Must not know how statements are executed or how requests
are made.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

import psycopg
from psycopg import AsyncConnection

from incidentd import database, identity, journal, sessions
from incidentd.catalog import NORMAL, Catalog, Incident
from incidentd.control import Control, Wanted
from incidentd.database import Row, Server, ask
from incidentd.errors import ServerError
from incidentd.guards import Guards
from incidentd.journal import Run
from incidentd.metrics import Metrics
from incidentd.sessions import Sessions
from incidentd.telemetry import Telemetry
from incidentd.workload import Workload

log = logging.getLogger(__name__)

_FOLLOW_SECONDS = 1  # how soon a follower notices that nobody leads
_TICK_SECONDS = 1  # how often a run is looked at: stop condition, ttl, evidence
_WITNESS_TICK_SECONDS = 0.2  # the same until the evidence is there
_RECONNECT_SECONDS = 0.5
_INJECT_ATTEMPTS = 3  # a lock that could not be had in time is tried for again, as a migration tool does
_UNDO_PAUSE = (0.2, 10.0)  # seconds between attempts to undo, from the first to the longest
_CALM_SECONDS = 15  # how long the evidence may outlast the recovery
_CALM_TICK_SECONDS = 0.1
_BUSY = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)


class Conductor:
    """Follows `control` with `sessions` and `workload`."""

    def __init__(
        self,
        server: Server,
        catalog: Catalog,
        control: Control,
        players: Sessions,
        workload: Workload,
        telemetry: Telemetry,
        guards: Guards,
    ) -> None:
        self._server = server
        self.catalog = catalog
        self._control = control
        self._sessions = players
        self._guards = guards
        self._workload = workload
        self._telemetry = telemetry
        self._metrics = telemetry.metrics
        self._run: Run | None = None
        self._injected = 0.0  # on time.monotonic's clock
        self._finished: str | None = None  # requested_at of the last run: a request is served once
        self._stopping = asyncio.Event()

    @property
    def mode(self) -> str:
        """The mode that the daemon is in."""
        return self._run.mode if self._run else NORMAL

    def stop(self) -> None:
        """Asks `conduct` to recover what runs and return."""
        self._stopping.set()

    async def conduct(self) -> None:
        """Leads or follows until told to stop; a server that goes away is waited for."""
        while not self._stopping.is_set():
            attempt = asyncio.create_task(self._attempt())
            lost = asyncio.create_task(self._control.lost.wait())
            try:
                await asyncio.wait([attempt, lost], return_when=asyncio.FIRST_COMPLETED)
            finally:
                lost.cancel()
                attempt.cancel()  # of no effect where it has ended; else bounded, as psycopg gives up in ten seconds
                await asyncio.wait([attempt])
            if not attempt.cancelled():
                attempt.result()
            await self._pause(_RECONNECT_SECONDS)

    async def _attempt(self) -> None:
        """Follows and leads for as long as the connection lasts."""
        try:
            async with await database.connect(self._server.control()) as conn:
                await identity.be_control(conn)
                if await self._follow(conn):
                    await self._lead(conn)
        except psycopg.Error as error:
            log.info("the conductor begins anew: %s", database.sentence(error), extra={"event": "conductor_lost"})
        finally:
            self._metrics.harness.leading.set(0)
            await self._sessions.close()

    # -- following ----------------------------------------------------------------------------------------------------

    async def _follow(self, conn: AsyncConnection[Row]) -> bool:
        """Plays the payments of whatever mode is wanted until this daemon leads; false when told to stop before."""
        while not self._stopping.is_set():
            if (await ask(conn, "try_to_lead"))[0]["leading"] == "t":
                return True
            if wanted := self._control.latest:
                self._play_payments(wanted.mode, wanted)
            await self._pause(_FOLLOW_SECONDS)
        return False

    async def _pause(self, seconds: float) -> None:
        """Waits for news of `demo_control`, the word to stop, or `seconds`."""
        tasks = [asyncio.create_task(self._control.changed(seconds)), asyncio.create_task(self._stopping.wait())]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    # -- leading ------------------------------------------------------------------------------------------------------

    async def _lead(self, conn: AsyncConnection[Row]) -> None:
        self._metrics.harness.leading.set(1)
        await sessions.end_strangers(conn, self.catalog.actors())
        await self._clean_up(conn)
        await self._play(NORMAL)
        self._metrics.harness.entered(NORMAL, 0)
        while not self._stopping.is_set():
            wanted = self._control.latest
            if wanted:
                await self._serve(conn, wanted)
            if wanted is self._control.latest:
                await self._pause(_WITNESS_TICK_SECONDS if self._run and not self._run.witnessed else _TICK_SECONDS)
        if self._run:
            await self._leave(conn, "recovered", "the daemon was stopped")

    async def _clean_up(self, conn: AsyncConnection[Row]) -> None:
        """Undoes what earlier runs have left: those of a daemon that died, or this one's when it lost the server."""
        for old in await journal.unfinished(conn):
            if self._run is not None and self._run.id == old.id:
                await _recover(conn, old, "aborted", "the connection to the server was lost", self._metrics)
            else:
                await _recover(conn, old, "interrupted", "the daemon died", self._metrics)
            self._finished = old.requested_at
        self._run = None
        self._metrics.harness.evidence.set(0)

    async def _serve(self, conn: AsyncConnection[Row], wanted: Wanted) -> None:
        """One look at the row: begin, end or watch a run, whichever is due."""
        if self._run and wanted.requested_at != self._run.requested_at:
            await self._leave(conn, "recovered", None)
        if self._run:
            self._play_payments(self._run.mode, wanted)
            await self._watch(conn, self._run, wanted)
            return
        self._play_payments(NORMAL, wanted)
        if wanted.mode != NORMAL and wanted.requested_at != self._finished:
            await self._enter(conn, wanted)

    async def _enter(self, conn: AsyncConnection[Row], wanted: Wanted) -> None:
        noticed = time.monotonic()
        incident = self.catalog.incidents.get(wanted.mode)
        if incident is None or wanted.expired():
            self._finished = wanted.requested_at
            why = "its ttl was over before a daemon saw it" if incident else "its file is gone"
            log.warning("%s is not begun: %s", wanted.mode, why, extra={"event": "not_begun", "mode": wanted.mode})
            await _back_to_normal(conn, wanted.mode, wanted.requested_at)
            return
        try:
            if danger := await self._guards.begin(conn):
                await self._refuse(conn, wanted, danger)
                return
            self._run = await self._inject(conn, incident, wanted)
        except psycopg.Error as error:
            if conn.closed:
                raise
            await self._refuse(conn, wanted, database.sentence(error))
            return
        self._injected = time.monotonic()
        await self._play(wanted.mode)
        seconds = time.monotonic() - noticed
        self._metrics.harness.entered(wanted.mode, seconds)
        log.info(
            "%s begins",
            wanted.mode,
            extra={"event": "injected", "mode": wanted.mode, "run": self._run.id, "seconds": round(seconds, 4)},
        )

    async def _inject(self, conn: AsyncConnection[Row], incident: Incident, wanted: Wanted) -> Run:
        for attempt in range(1, _INJECT_ATTEMPTS + 1):
            try:
                return await journal.inject(conn, incident, wanted)
            except _BUSY:
                if attempt == _INJECT_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    async def _refuse(self, conn: AsyncConnection[Row], wanted: Wanted, why: str) -> None:
        """The run cannot be: whatever part of its change was journaled is undone, and the request is over."""
        log.error("%s could not be injected: %s", wanted.mode, why, extra={"event": "inject_failed", "mode": wanted.mode})
        journaled = await journal.unfinished(conn)
        for part in journaled:
            await _recover(conn, part, "failed", why, self._metrics)
        if not journaled:
            await journal.failed(conn, wanted, why)
            await _back_to_normal(conn, wanted.mode, wanted.requested_at)
        self._finished = wanted.requested_at

    async def _watch(self, conn: AsyncConnection[Row], current: Run, wanted: Wanted) -> None:
        """Looks at the run that goes on: its ttl, what must stop it, its evidence."""
        incident = self.catalog.incidents[current.mode]
        if wanted.expired():
            await self._leave(conn, "recovered", None)
            return
        try:
            danger = await self._guards.tripped(conn)
            if not danger and incident.stop and await journal.stopped(conn, current, incident.stop):
                danger = "its stop condition came true"
            evidence = await journal.witness(conn, current, incident)
        except psycopg.Error as error:
            if conn.closed:
                raise
            said = database.sentence(error)
            log.warning("%s cannot be watched: %s", current.mode, said, extra={"event": "watch_error", "mode": current.mode})
            danger, evidence = None, journal.Evidence(False, {})
        self._metrics.harness.evidence.set(evidence.visible)
        if evidence.visible and not current.witnessed:
            await journal.witnessed(conn, current, evidence)
            seconds = time.monotonic() - self._injected
            event = {"event": "witnessed", "mode": current.mode, "run": current.id, "seconds": round(seconds, 4)}
            log.info("%s is witnessed after %.1f s: %s", current.mode, seconds, _listed(evidence.details), extra=event)
        if danger:
            log.error("%s is stopped: %s", current.mode, danger, extra={"event": "stopped", "mode": current.mode})
            await self._leave(conn, "aborted", danger)
        elif not current.witnessed and time.monotonic() - self._injected > incident.witness_within:
            await self._leave(conn, "not_witnessed", f"no evidence within {incident.front.witness_within}")

    async def _leave(self, conn: AsyncConnection[Row], outcome: str, error: str | None) -> None:
        """From the run to a healthy day: the actors first, then the change, then the proof."""
        assert self._run is not None
        ended, noticed = self._run, time.monotonic()
        if outcome == "recovered" and not ended.witnessed:
            outcome, error = "not_witnessed", error or "it ended before there was evidence"
        await self._play(NORMAL)
        await _undo(conn, ended)
        if not await self._calm(conn, ended):
            outcome, error = "failed", "its evidence is still visible after the recovery"
        left = await sessions.surplus(conn, self.catalog.cast(ended.mode).values(), self.catalog.normal.values())
        await _close(conn, ended, outcome, error, self._metrics, left)
        self._run, self._finished = None, ended.requested_at
        self._metrics.harness.entered(NORMAL, time.monotonic() - noticed)

    async def _calm(self, conn: AsyncConnection[Row], ended: Run) -> bool:
        """Whether the evidence is gone, soon enough."""
        incident = self.catalog.incidents[ended.mode]
        deadline = time.monotonic() + _CALM_SECONDS
        while await self._visible(conn, ended, incident):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_CALM_TICK_SECONDS)
        self._metrics.harness.evidence.set(0)
        return True

    async def _visible(self, conn: AsyncConnection[Row], ended: Run, incident: Incident) -> bool:
        """Whether the evidence is there, or cannot be read, which proves nothing."""
        try:
            return (await journal.witness(conn, ended, incident)).visible
        except psycopg.Error:
            if conn.closed:
                raise
            return True

    async def _play(self, mode: str) -> None:
        cast = self.catalog.cast(mode)
        if wanted := self._control.latest:
            self._play_payments(mode, wanted)
        await self._sessions.play(cast)

    def _play_payments(self, mode: str, wanted: Wanted) -> None:
        """Makes the payments, and what their spans say, those of `mode`."""
        incident = self.catalog.incidents.get(mode)
        self._telemetry.set_incident(mode, incident.front.category if incident else None)
        self._workload.play(self.catalog.cast(mode), wanted.rate)


async def recover_now(conn: AsyncConnection[Row]) -> int:
    """Undoes every unfinished run, as a daemon would on its start; returns how many there were.

    Raises ServerError when a daemon leads, for it does that itself.
    """
    if (await ask(conn, "try_to_lead"))[0]["leading"] != "t":
        raise ServerError("a daemon is connected and recovers by itself: UPDATE demo_control SET mode = 'normal'")
    await identity.be_control(conn)
    try:
        old_runs = await journal.unfinished(conn)
        for old in old_runs:
            await _recover(conn, old, "interrupted", "the daemon died", None)
        return len(old_runs)
    finally:
        if not conn.broken:
            await ask(conn, "stop_leading")


async def _recover(conn: AsyncConnection[Row], old: Run, outcome: str, error: str, metrics: Metrics | None) -> None:
    log.warning("recovering run %s of %s: %s", old.id, old.mode, error, extra={"event": "recovering", "mode": old.mode})
    await _undo(conn, old)
    await _close(conn, old, outcome, error, metrics)


async def _undo(conn: AsyncConnection[Row], old: Run) -> None:
    """Undoes until it is undone: nothing else is begun before."""
    pause, longest = _UNDO_PAUSE
    while True:
        try:
            await journal.undo(conn, old)
            return
        except psycopg.Error as error:
            if conn.closed:
                raise
            log.error(
                "%s is not undone yet: %s: trying again",
                old.mode,
                database.sentence(error),
                extra={"event": "undo_failed", "mode": old.mode},
            )
        await asyncio.sleep(pause)
        pause = min(2 * pause, longest)


async def _close(
    conn: AsyncConnection[Row],
    ended: Run,
    outcome: str,
    error: str | None,
    metrics: Metrics | None,
    left: Sequence[str] = (),
) -> None:
    """Compares the fingerprints, closes the row, and lets the control go back to normal; `left` is residue known already."""
    residue = await journal.finish(conn, ended, outcome, error, list(left))
    if metrics:
        metrics.harness.residue.set(len(residue))
    for thing in residue:
        log.error("%s has left something behind: %s", ended.mode, thing, extra={"event": "residue", "mode": ended.mode})
    outcome = "failed" if residue else outcome
    log.info(
        "%s is over: %s",
        ended.mode,
        outcome,
        extra={"event": "finished", "mode": ended.mode, "run": ended.id, "outcome": outcome},
    )
    await _back_to_normal(conn, ended.mode, ended.requested_at)


async def _back_to_normal(conn: AsyncConnection[Row], mode: str, requested_at: str) -> None:
    await ask(conn, "back_to_normal", mode=mode, requested_at=requested_at)


def _listed(details: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in details.items())
