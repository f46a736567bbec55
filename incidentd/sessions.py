"""Sessions: actors with connections of their own, each playing its script again and again.

Owns those connections and their tasks. Must not know about the payment pool, nor why somebody acts.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Iterable

import psycopg
from psycopg import AsyncConnection

from incidentd import database, script
from incidentd.catalog import Actor, Cast
from incidentd.database import Row, Server, Values, ask
from incidentd.population import Population
from incidentd.tracing import Tracing

log = logging.getLogger(__name__)

_PAUSE = (0.1, 0.3)  # seconds after a failed pass: a worker's retry, and no busy loop when a script always fails
_RECONNECT = (0.5, 1.5)  # seconds after a lost connection
_END_SECONDS = 3  # a backend notices within two that its client is gone
_END_TICK_SECONDS = 0.05
_LEAVE_SECONDS = 11  # psycopg gives a cancelled query ten seconds to end before it closes the connection


async def end_strangers(conn: AsyncConnection[Row], actors: Iterable[Actor]) -> None:
    """Ends the sessions of `actors` that a daemon which led before has left, if its death has not. Raises psycopg.Error."""
    for row in await ask(conn, "end_sessions", actors=_listed(actors)):
        log.warning(
            "ended a session that was left behind: %s, pid %s",
            row["application_name"],
            row["pid"],
            extra={"event": "session_ended"},
        )


async def surplus(conn: AsyncConnection[Row], actors: Iterable[Actor], now: Iterable[Actor]) -> list[str]:
    """Which of `actors` have more sessions than `now` says, a sentence each; sessions that are just ending are waited for.

    Raises psycopg.Error.
    """
    expected, deadline = _listed(actors, now), time.monotonic() + _END_SECONDS
    while True:
        rows = await ask(conn, "surplus_sessions", actors=expected)
        if not rows or time.monotonic() > deadline:
            return [f"{row['application_name']} has {row['sessions']} sessions, not {row['expected']}" for row in rows]
        await asyncio.sleep(_END_TICK_SECONDS)


def _listed(actors: Iterable[Actor], now: Iterable[Actor] = ()) -> str:
    """JSON for the server: who has sessions of their own among `actors`, and how many each should have `now`."""
    expected = {(actor.role, actor.application_name): 0 for actor in actors if actor.sessions is not None}
    for actor in now:
        if actor.sessions is not None:
            identity = actor.role, actor.application_name
            expected[identity] = expected.get(identity, 0) + actor.sessions
    return json.dumps([{"role": role, "application_name": name, "sessions": n} for (role, name), n in expected.items()])


class Sessions:
    """The actors' sessions that run now."""

    def __init__(self, server: Server, population: Population, tracing: Tracing) -> None:
        self._server = server
        self._population = population
        self._tracing = tracing
        self._tasks: dict[tuple[str, int], tuple[Actor, asyncio.Task[None]]] = {}

    async def play(self, cast: Cast | dict[str, Actor]) -> None:
        """Makes the sessions those of `cast`: who is unchanged goes on undisturbed, the others are ended and begun."""
        wanted = {(actor.name, n): actor for actor in cast.values() for n in range(actor.sessions or 0)}
        await self._end([key for key, (actor, _) in self._tasks.items() if wanted.get(key) != actor])
        for key, actor in wanted.items():
            if key not in self._tasks:
                task = asyncio.create_task(self._live(actor, key[1]), name=f"{actor.name} {key[1]}")
                self._tasks[key] = actor, task

    async def close(self) -> None:
        """Ends every session."""
        await self._end(list(self._tasks))

    async def _end(self, keys: list[tuple[str, int]]) -> None:
        tasks = [self._tasks.pop(key)[1] for key in keys]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_LEAVE_SECONDS)

    async def _live(self, actor: Actor, number: int) -> None:
        conninfo = self._server.role(actor.role, actor.application_name)
        own = {"session": str(number), "session_count": str(actor.sessions), **script.constants(dict(actor.params))}
        while True:
            try:
                async with await database.connect(conninfo) as conn:
                    await self._work(conn, actor, own)
            except psycopg.Error as error:
                log.warning(
                    "%s has no connection: %s",
                    actor.application_name,
                    database.sentence(error),
                    extra={"event": "session_lost", "actor": actor.name, "sqlstate": error.sqlstate},
                )
                await asyncio.sleep(random.uniform(*_RECONNECT))

    async def _work(self, conn: AsyncConnection[Row], actor: Actor, own: Values) -> None:
        """Plays on one connection until it is lost, or once where the actor connects for each pass."""
        while True:
            request, values = self._tracing.session(actor.name, actor.application_name), {**self._population.draw(), **own}
            try:
                await script.play(conn, actor.script, values, request)
                request.end(None, values)
            except psycopg.Error as error:
                request.end(error, values)
                if conn.closed:
                    raise
                log.warning(
                    "%s failed: %s",
                    actor.application_name,
                    database.sentence(error),
                    extra={"event": "session_error", "actor": actor.name, "sqlstate": error.sqlstate},
                )
                await asyncio.sleep(random.uniform(*_PAUSE))
            if actor.connect == "each":
                return
            await asyncio.sleep(0)  # a script without a wait still lets the others run
