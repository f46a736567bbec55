"""Making a database ours: refused if it is somebody else's, claimed if it is empty, filled once.

Owns the order of installation and the seeding. Must not know how the daemon runs afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable

import psycopg
from psycopg import AsyncConnection

from incidentd import database
from incidentd.catalog import sql_directory
from incidentd.database import Row, queries, run
from incidentd.errors import ForeignDatabaseError, ServerError

log = logging.getLogger(__name__)

OLDEST = 150000
BATCH = 100_000

# Called with what is being done and how much of the whole is done, from 0 to 1.
Progress = Callable[[str, float], None]

# How the time of seeding is shared out, measured with 2 million payments.
_INSERTED, _INDEXED = 0.55, 0.85


async def install(conn: AsyncConnection[Row], payments: int, progress: Progress) -> None:
    """Brings the database to where payments can flow; does nothing where it is there already.

    Raises ForeignDatabaseError for a database with tables that are not ours, ServerError for a server or user that will
    not do.
    """
    await check_ours(conn)
    mark = await _mark(conn)
    if mark and mark["schema_sha256"] == _schema_sha256() and mark["seeded_at"]:
        return
    await _lock(conn)
    try:
        await _install(conn, payments, progress)
    finally:
        if not conn.broken:
            await run(conn, queries("install.sql")["unlock"])


async def _lock(conn: AsyncConnection[Row]) -> None:
    """Several daemons may start at once: one of them installs."""
    if (await run(conn, queries("install.sql")["try_to_lock"]))[0]["locked"] != "t":
        log.info("another daemon is filling the database: waiting for it", extra={"event": "installation_awaited"})
        await run(conn, queries("install.sql")["lock"])


async def check_ours(conn: AsyncConnection[Row]) -> None:
    """Raises ForeignDatabaseError unless the database is ours or empty, ServerError for a server that is too old."""
    if conn.info.server_version < OLDEST:
        raise ServerError(f"the server is PostgreSQL {conn.info.server_version // 10000}: 15 or later is needed")
    name = conn.info.dbname
    mark = await _mark(conn)
    if mark is None and (foreign := await run(conn, queries("install.sql")["foreign_tables"])):
        tables = ", ".join(str(row["name"]) for row in foreign)
        raise ForeignDatabaseError(
            f'database "{name}" holds tables of somebody else ({tables}): name an empty one, made with: createdb payments_demo'
        )
    if mark is not None and mark["ours"] != "t":
        raise ForeignDatabaseError(
            f'database "{name}" is a copy of one that was claimed on another server: name an empty database instead'
        )


async def is_installed(conn: AsyncConnection[Row]) -> bool:
    """Whether the database is ours and complete."""
    mark = await _mark(conn)
    return bool(mark and mark["ours"] == "t" and mark["seeded_at"])


async def share_password(conn: AsyncConnection[Row], given: str | None) -> str:
    """The password that the story's roles log in with: the one `given`, else one made up for this database and kept in it.

    The server is sent the SCRAM verifier only, so that no log shows the password.
    """
    kept = (await run(conn, queries("install.sql")["role_password"]))[0]["role_password"]
    password = given or kept or secrets.token_urlsafe(24)
    if password != kept:
        await _set_password(conn, password)
    return password


async def _set_password(conn: AsyncConnection[Row], password: str) -> None:
    async with conn.transaction():
        for row in await run(conn, queries("install.sql")["login_roles"]):
            role = str(row["name"])
            verifier = conn.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
            await run(conn, queries("install.sql")["set_password"], role=role, verifier=verifier.decode())
        await run(conn, queries("install.sql")["keep_password"], password=password)


async def _mark(conn: AsyncConnection[Row]) -> Row | None:
    if (await run(conn, queries("install.sql")["has_mark"]))[0]["marked"] != "t":
        return None
    rows = await run(conn, queries("install.sql")["read_mark"])
    return rows[0] if rows else None


def _schema_sha256() -> str:
    files = ("schema.sql", "payments.sql")
    return hashlib.sha256(b"".join((sql_directory() / name).read_bytes() for name in files)).hexdigest()


async def _install(conn: AsyncConnection[Row], payments: int, progress: Progress) -> None:
    await check_ours(conn)  # again, now that nobody else installs
    await _check_rights(conn)
    payment_service = queries("payments.sql")
    async with conn.transaction():
        await run(conn, queries("schema.sql")["schema"])
        await run(conn, queries("install.sql")["claim"])
        await run(conn, payment_service["roles"])
        await run(conn, payment_service["limits"])
        await run(conn, payment_service["tables"])
        await run(conn, payment_service["grants"])
        await run(conn, queries("install.sql")["schema_applied"], sha256=_schema_sha256())
    await _let_investigators_look(conn)
    mark = await _mark(conn)
    if mark is None or not mark["seeded_at"]:
        await _seed(conn, payments, progress)


async def _check_rights(conn: AsyncConnection[Row]) -> None:
    rights = (await run(conn, queries("install.sql")["can_install"]))[0]
    if rights["can_install"] != "t":
        raise ServerError(
            f'user "{rights["name"]}" may not create roles and schemas here: connect as a superuser, or ALTER ROLE '
            f'"{rights["name"]}" CREATEROLE and GRANT CREATE ON DATABASE "{conn.info.dbname}" to it'
        )
    if foreign := await run(conn, queries("install.sql")["foreign_roles"]):
        names = ", ".join(str(row["name"]) for row in foreign)
        raise ForeignDatabaseError(
            f"the server has roles of the names that the payment service uses ({names}): use another server, or DROP ROLE "
            "them if they are left from a payment service that is gone"
        )


async def _let_investigators_look(conn: AsyncConnection[Row]) -> None:
    try:
        await run(conn, queries("payments.sql")["monitoring"])
    except psycopg.errors.InsufficientPrivilege as error:
        log.warning("investigators will see less of the server: %s", database.sentence(error))


async def _seed(conn: AsyncConnection[Row], payments: int, progress: Progress) -> None:
    """Fills the tables; begun again from empty tables if an earlier attempt was cut short."""
    payment_service, control = queries("payments.sql"), queries("install.sql")
    progress("seeding", 0)
    await conn.execute("SET synchronous_commit = off")  # a crash means to begin again anyway
    await run(conn, payment_service["empty"])
    await run(conn, payment_service["seed_merchants"])
    for first in range(1, payments + 1, BATCH):
        last = min(first + BATCH - 1, payments)
        await run(conn, payment_service["seed_payments"], first=first, last=last, payments=payments)
        progress("seeding", last / payments * _INSERTED)
    await _index(conn, payments, progress)
    progress("analyzing", _INDEXED)
    await run(conn, payment_service["vacuum"])
    await conn.execute("RESET synchronous_commit")
    await run(conn, control["seeded"], payments=payments)
    progress("seeded", 1)


async def _index(conn: AsyncConnection[Row], payments: int, progress: Progress) -> None:
    statements = queries("payments.sql")["indexes"].statements
    async with conn.transaction():
        for done, statement in enumerate(statements):
            progress("indexing", _INSERTED + (_INDEXED - _INSERTED) * done / len(statements))
            await database.execute(conn, statement, {"payments": str(payments)})
