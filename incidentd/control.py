"""The control: what `demo_control` asks for, as it changes.

Owns the listening connection and the daemon's presence lock. NOTIFY only wakes it up: the row is the truth, read again on
every wake-up, every reconnect and every few seconds. Must not know what is done about a mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

import psycopg
from psycopg import AsyncConnection

from incidentd import database, identity
from incidentd.catalog import NORMAL
from incidentd.database import Row, Server, ask
from incidentd.telemetry import Telemetry

log = logging.getLogger(__name__)

_POLL_SECONDS = 2  # how late a lost notification, or a daemon that vanished, is noticed
_QUERY_SECONDS = 5  # demo_control locked by somebody: no longer than this for one reading
_RECONNECT_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Wanted:
    """One reading of `demo_control`.

    `rate` is this daemon's part of the payments per second; `deadline` is when the ttl ends on time.monotonic's clock, or
    None; `requested_at` identifies the request for the mode.
    """

    mode: str
    rate: float
    blind: bool
    requested_at: str
    requested_by: str
    deadline: float | None

    def expired(self) -> bool:
        """Whether the ttl is over."""
        return self.mode != NORMAL and self.deadline is not None and time.monotonic() >= self.deadline


class Control:
    """Follows `demo_control`; `latest` is the newest reading, None before the first, `lost` is set while there is no server."""

    def __init__(self, server: Server, telemetry: Telemetry) -> None:
        self._server = server
        self._telemetry = telemetry
        self._news = asyncio.Event()
        self.latest: Wanted | None = None
        self.lost = asyncio.Event()

    async def changed(self, seconds: float) -> None:
        """Waits for a new reading, for `seconds` at most."""
        news = self._news
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await news.wait()

    async def follow(self) -> None:
        """Reads for ever; a server that goes away is waited for.

        A connection that breaks may only be a connection: the server counts as lost when a new one fails as well.
        """
        broken = False
        while True:
            try:
                async with await database.connect(self._server.control()) as conn:
                    await self._listen(conn)
                    self._found()
                    broken = False
                    await self._read_on(conn)
            except psycopg.Error as error:
                self._telemetry.metrics.harness.connected.set(0)
                if broken:
                    self._lose(error)
                    await asyncio.sleep(_RECONNECT_SECONDS)
                broken = True

    def _lose(self, error: psycopg.Error) -> None:
        if not self.lost.is_set():
            self.lost.set()
            log.error("the database is lost: %s: waiting for it", database.sentence(error), extra={"event": "database_lost"})

    def _found(self) -> None:
        if self.lost.is_set():
            self.lost.clear()
            log.info("the database is back", extra={"event": "database_back"})

    async def _listen(self, conn: AsyncConnection[Row]) -> None:
        async with database.within(database.ANSWER_SECONDS):
            await conn.execute("LISTEN demo_control")
        await identity.be_control(conn)
        await ask(conn, "join_daemons")
        await self._read(conn)
        await ask(conn, "announce")

    async def _read_on(self, conn: AsyncConnection[Row]) -> None:
        while True:
            async with contextlib.aclosing(conn.notifies(timeout=_POLL_SECONDS, stop_after=1)) as notifications:
                async for _ in notifications:
                    pass
            await self._read(conn)

    async def _read(self, conn: AsyncConnection[Row]) -> None:
        async with database.within(_QUERY_SECONDS):
            row = (await ask(conn, "read_control"))[0]
        self._telemetry.metrics.harness.connected.set(1)
        left = row["seconds_left"]
        wanted = Wanted(
            mode=str(row["mode"]),
            rate=float(row["rate"] or 0) / max(1, int(row["daemons"] or 0)),
            blind=row["blind"] == "t",
            requested_at=str(row["requested_at"]),
            requested_by=str(row["requested_by"]),
            deadline=None if left is None else time.monotonic() + float(left),
        )
        self._telemetry.set_blind(wanted.blind)
        self.latest = wanted
        news, self._news = self._news, asyncio.Event()
        news.set()
