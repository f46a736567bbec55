"""Connections: how the daemon reaches the server, and how a statement of an SQL file is run on one.

Owns the driver's configuration (limits, keepalives, text adaptation). Must not know what any statement is for.

Values travel as PostgreSQL's own text in both directions, with types left to the server to infer, as libpq sends them:
what one statement returns can be the parameter of the next without a change, whatever its type.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg.types.none import NoneDumper
from psycopg.types.string import StrDumperUnknown, TextLoader

from incidentd.catalog import sql_directory
from incidentd.errors import ServerError
from incidentd.sqltext import Section, Statement, parse_sections

Row = dict[str, str | None]
Values = Mapping[str, str | None]

# What investigators see of the harness's own sessions: a word of the trade, not the tool's name.
CONTROL = "control-plane"

# A server that does not answer is given up after about ten seconds: TCP notices neither a cut cable nor a frozen host.
_LIMITS = {
    "connect_timeout": "5",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}

# The server's own limits come first (sql/payments.sql, `limits`; control.sql, `become_control`); these are for a server
# that is there and does not answer.
ANSWER_SECONDS = 15
CHANGE_SECONDS = 16 * 60

TEXT = AdaptersMap()
TEXT.register_loader(0, TextLoader)
TEXT.register_dumper(str, StrDumperUnknown)
TEXT.register_dumper(type(None), NoneDumper)


@dataclass(frozen=True, slots=True)
class Server:
    """Where the database is: libpq parameters of its owner, and the password of the story's roles (None: not needed)."""

    parameters: Mapping[str, str]
    role_password: str | None = None

    def control(self) -> str:
        """The connection string of the control plane."""
        return self._conninfo(application_name=CONTROL)

    def role(self, role: str, application_name: str) -> str:
        """The connection string of an actor of the story."""
        own = {"user": role, "application_name": application_name, "password": self.role_password}
        return self._conninfo(**{key: value for key, value in own.items() if value is not None})

    def _conninfo(self, **own: str) -> str:
        options = f"{self.parameters.get('options', '')} {_SETTINGS}".strip()
        return make_conninfo(**{**_LIMITS, **self.parameters, **own, "options": options})


# A backend notices within two seconds that its daemon is gone, even in the middle of an index build.
_SETTINGS = "-c TimeZone=UTC -c DateStyle=ISO -c client_connection_check_interval=2s"

# Keyword arguments of every connection: statements of the files manage their own transactions.
CONNECTION: Mapping[str, Any] = MappingProxyType(
    {"autocommit": True, "cursor_factory": AsyncRawCursor, "context": TEXT, "row_factory": dict_row}
)


async def connect(conninfo: str) -> AsyncConnection[Row]:
    """A connection in autocommit mode whose rows are dicts of text. Raises psycopg.OperationalError."""
    return await AsyncConnection.connect(conninfo, **CONNECTION)


@contextlib.asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Raises psycopg.OperationalError when the server has not answered in time.

    The connection is not to be used again: psycopg cancels the query and closes the connection unless that is answered
    within ten seconds more.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise psycopg.OperationalError(f"the server did not answer within {seconds:g} s") from None


async def execute(conn: AsyncConnection[Row], statement: Statement, values: Values) -> list[Row]:
    """The rows of a statement, none where it returns none. Raises psycopg.Error."""
    async with within(CHANGE_SECONDS):
        cursor = AsyncRawCursor(conn)
        await cursor.execute(statement.text, [values[name] for name in statement.parameters])
        return await cursor.fetchall() if cursor.description else []


async def first(
    conn: AsyncConnection[Row], statement: Statement, values: Values, seconds: float = CHANGE_SECONDS, *, traced: bool = False
) -> Row:
    """The first row of a statement, all null where no row came, empty where it returns none.

    `traced` runs it on the connection's own cursor, which is instrumented where traces are made. Raises psycopg.Error, after
    `seconds` at the latest.
    """
    async with within(seconds):
        cursor = conn.cursor() if traced else AsyncRawCursor(conn)
        await cursor.execute(statement.text, [values[name] for name in statement.parameters])
        if not cursor.description:
            return {}
        return await cursor.fetchone() or dict.fromkeys(column.name for column in cursor.description)


async def run(conn: AsyncConnection[Row], section: Section, /, **values: object) -> list[Row]:
    """The rows of a section's last statement, its parameters given by name. Raises psycopg.Error."""
    texts = {name: as_text(value) for name, value in values.items()}
    rows: list[Row] = []
    for statement in section.statements:
        rows = await execute(conn, statement, texts)
    return rows


async def ask(conn: AsyncConnection[Row], section: str, /, **values: object) -> list[Row]:
    """As `run`, for a section of `control.sql`: these take milliseconds, so no answer for a while means a lost server."""
    async with within(ANSWER_SECONDS):
        return await run(conn, queries("control.sql")[section], **values)


def as_text(value: object) -> str | None:
    """PostgreSQL's input text for a Python constant."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


@functools.cache
def queries(name: str) -> Mapping[str, Section]:
    """The sections of one of the daemon's own files, `control.sql` for instance, by name."""
    path = sql_directory() / name
    return MappingProxyType({section.name: section for section in parse_sections(path.read_text(encoding="utf-8"), path)})


def sentence(error: BaseException) -> str:
    """What the driver or the server said, on one line."""
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        said = (error.diag.message_primary, error.diag.message_detail, error.diag.message_hint)
        return "; ".join(part for part in said if part)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) or type(error).__name__


def unreachable(error: psycopg.OperationalError) -> ServerError:
    """The sentence for a server that cannot be connected to."""
    return ServerError(f"cannot connect to the database: {sentence(error)}: check --dsn or the PG* variables, and that it runs")
