"""Playing a script: one pass over a section's steps on a connection, as somebody of the story.

Owns parameters (what is drawn for a pass, and what a statement's first row adds) and the clean end of a pass. Must not
know who plays, nor how often.
"""

from __future__ import annotations

import asyncio
import random
import time

import psycopg
from psycopg import AsyncConnection
from psycopg.pq import TransactionStatus

from incidentd import database
from incidentd.database import Row
from incidentd.sqltext import Section, Think
from incidentd.tracing import Request

_ROLLBACK_SECONDS = 2  # a server that does not answer a ROLLBACK is not worth keeping the connection for


async def play(
    conn: AsyncConnection[Row],
    script: Section,
    values: dict[str, str | None],
    request: Request,
    seconds: float = database.CHANGE_SECONDS,
) -> None:
    """Runs the steps of `script` in order, for `request`; `values` are its parameters and grow with what statements return.

    The columns of a statement's first row become parameters of the statements after it, null where no row came. Raises
    psycopg.Error, among others when a statement has no answer within `seconds`; a transaction that is open at the end, for
    whatever reason, is rolled back.
    """
    try:
        for step in script.steps:
            if isinstance(step, Think):
                await asyncio.sleep(random.uniform(step.low, step.high))
            elif request.sampled:
                values |= await database.first(conn, step, values, seconds, traced=True)
            else:
                begun = time.time_ns()
                try:
                    values |= await database.first(conn, step, values, seconds)
                finally:
                    request.timeline.append((step, begun, time.time_ns()))
    finally:
        await leave_transaction(conn)


async def leave_transaction(conn: AsyncConnection[Row]) -> None:
    """Rolls back what is open on a connection in autocommit mode; closes a connection that does not answer."""
    if conn.closed or conn.info.transaction_status == TransactionStatus.IDLE:
        return
    try:
        async with asyncio.timeout(_ROLLBACK_SECONDS):
            await conn.rollback()
    except (TimeoutError, psycopg.Error):
        await conn.close()


def constants(params: dict[str, object]) -> dict[str, str | None]:
    """The text of a file's `[params]`."""
    return {name: database.as_text(value) for name, value in params.items()}
