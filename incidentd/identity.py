"""Identity: as whom the control plane's connection acts, and what of it others see.

Owns the two identities: the control plane itself, which stays out of the server's activity views where its user may say so,
and the story's migration tool, which is seen like anybody else. Must not know what is done under either.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from psycopg import AsyncConnection
from psycopg.pq import TransactionStatus

from incidentd.database import Row, ask


async def be_control(conn: AsyncConnection[Row], *, local: bool = False) -> None:
    """The control plane: its user's own role, short limits, unseen. `local`: until the end of the transaction."""
    await ask(conn, "become_control", local=local)
    await be_unseen(conn, local=local)


async def be_unseen(conn: AsyncConnection[Row], *, local: bool = False) -> None:
    """What the control plane asks is nobody's evidence: where its user may, it stays out of the views of activity."""
    await ask(conn, "be_seen", activities="off", statements="none", local=local)


async def be_migrator(conn: AsyncConnection[Row], *, local: bool) -> None:
    """The migration tool: its role, name and patience, in everybody's sight."""
    await ask(conn, "be_seen", activities="on", statements="top", local=local)
    await ask(conn, "become_migrator", local=local)


@contextlib.asynccontextmanager
async def migrator(conn: AsyncConnection[Row], *, local: bool) -> AsyncIterator[None]:
    """The migration tool for the time of a block, the control plane afterwards; in a transaction that failed, a rollback."""
    await be_migrator(conn, local=local)
    try:
        yield
    finally:
        if conn.info.transaction_status in (TransactionStatus.IDLE, TransactionStatus.INTRANS):
            await be_control(conn, local=local)
