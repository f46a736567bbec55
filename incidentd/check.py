"""Checking the catalog against a real server: every statement is parsed and planned, in the role that will run it.

Owns what "sound" means for a file beyond its grammar. Must not know where the server is. Nothing is run and everything is
rolled back; only on a server that nobody else uses are changes made, undone and undone again.
"""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
from psycopg import AsyncConnection, generators, pq

from incidentd import database, journal
from incidentd.catalog import SUPPLIED, Actor, Catalog, Incident, sql_directory
from incidentd.database import Row, ask
from incidentd.errors import Fault
from incidentd.sqltext import Section, Statement
from incidentd.workload import PAYMENT

_PLANNED = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "MERGE", "VALUES", "WITH", "TABLE"})
_TEMPORARY = re.compile(r"CREATE\s+((GLOBAL|LOCAL)\s+)?TEMP", re.IGNORECASE)
_BOOLEAN = 16
_ANY = "*"  # among the known names: a statement has come whose columns cannot be told beforehand
_UNNAMED = b""


class _Unsound(Exception):
    """What is wrong with a statement, and on which line of its file."""

    def __init__(self, line: int, message: str) -> None:
        self.line, self.message = line, message
        super().__init__(message)


async def check(conn: AsyncConnection[Row], catalog: Catalog, *, make_changes: bool) -> list[Fault]:
    """What a server that holds the payment service finds wrong with `catalog`, ordered by place.

    `make_changes` runs inject once and recover twice, each rolled back: for a server that nobody else uses. Raises
    psycopg.OperationalError when the connection is lost.
    """
    checker = _Checker(conn, catalog.normal[PAYMENT], make_changes)
    async with conn.transaction(force_rollback=True):
        await conn.execute("SET LOCAL statement_timeout = '30s'")
        await conn.execute("SET LOCAL lock_timeout = '2s'")
        for actor in catalog.normal.values():
            await checker.actor(sql_directory() / "normal.sql", actor)
        for incident in catalog.incidents.values():
            await checker.incident(incident, catalog)
    return sorted(checker.faults)


class _Checker:
    def __init__(self, conn: AsyncConnection[Row], payment: Actor, make_changes: bool) -> None:
        self._conn = conn
        self._payment = payment
        self._make_changes = make_changes
        self.faults: list[Fault] = []

    async def incident(self, incident: Incident, catalog: Catalog) -> None:
        before = len(self.faults)
        known = set(incident.params)
        if incident.inject:
            known |= await self._section(incident.path, incident.inject, "migrator", known)
        if incident.recover:
            await self._section(incident.path, incident.recover, "migrator", known)
        await self._section(incident.path, incident.evidence, None, known, answer="visible")
        if incident.stop:
            await self._section(incident.path, incident.stop, None, known, answer="stop")
        for name, actor in incident.cast.items():
            if catalog.normal.get(name) != actor:
                await self.actor(incident.path, actor)
        if self._make_changes and len(self.faults) == before:
            await self._try_changes(incident)

    async def actor(self, path: Path, actor: Actor) -> None:
        known = {*SUPPLIED, *actor.params}
        await self._section(path, actor.script, actor.role or self._payment.role, known)

    async def _section(
        self, path: Path, section: Section, role: str | None, known: set[str], answer: str | None = None
    ) -> set[str]:
        """Checks a section and returns the names known after it."""
        names = set(known)
        try:
            async with self._conn.transaction(force_rollback=True):
                await self._become(role, section)
                for statement in section.statements:
                    columns = await self._statement(statement, names)
                    names |= columns.keys()
                    if answer and columns.get(answer) != _BOOLEAN:
                        raise _Unsound(statement.line, f'{section.name} must return one row with a boolean column "{answer}"')
        except _Unsound as fault:
            self.faults.append(Fault(path, fault.line, fault.message))
        return names

    async def _become(self, role: str | None, section: Section) -> None:
        if role is None:
            return
        try:
            await ask(self._conn, "become", role=role)
        except psycopg.Error as error:
            raise _Unsound(section.line, f"section {section.name} cannot run as its role: {database.sentence(error)}") from None

    async def _statement(self, statement: Statement, known: set[str]) -> dict[str, int]:
        """The columns that a statement returns, by name, with the oid of their type."""
        for name in statement.parameters:
            if name not in known and _ANY not in known:
                raise _Unsound(
                    statement.line,
                    f":{name} is unknown here: it is neither supplied, nor in [params], nor a column of a statement before",
                )
        try:
            columns = await self._describe(statement)
            if statement.keyword in _PLANNED:
                await self._conn.execute(f"EXPLAIN {statement.text}", [None] * len(statement.parameters))
            elif _TEMPORARY.match(statement.text):
                await self._conn.execute(statement.text)
        except psycopg.Error as error:
            if self._conn.closed:
                raise
            raise _Unsound(_line(statement, error), database.sentence(error)) from None
        return {**columns, _ANY: 0} if statement.keyword in ("FETCH", "EXECUTE", "CALL") else columns

    async def _describe(self, statement: Statement) -> dict[str, int]:
        pgconn = self._conn.pgconn
        pgconn.send_prepare(_UNNAMED, statement.text.encode())
        await self._answer()
        pgconn.send_describe_prepared(_UNNAMED)
        result = await self._answer()
        return {(result.fname(n) or b"").decode(): result.ftype(n) for n in range(result.nfields)}

    async def _answer(self) -> pq.abc.PGresult:
        result: pq.abc.PGresult = (await self._conn.wait(generators.execute(self._conn.pgconn)))[-1]
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, encoding="utf-8")
        return result

    async def _try_changes(self, incident: Incident) -> None:
        """Inject, then recover, then recover again, for it may run twice: nothing may be left behind."""
        inject, recover = incident.inject, incident.recover
        if not (inject and recover and inject.transaction and recover.transaction):
            return
        known = {name: database.as_text(value) for name, value in incident.params.items()}
        try:
            async with self._conn.transaction(force_rollback=True):
                before = await journal.fingerprint(self._conn)
                await self._become("migrator", inject)
                for section in (inject, recover, recover):
                    for statement in section.statements:
                        known |= await self._run(statement, dict.fromkeys(statement.parameters) | known, section)
                await self._become("none", recover)
                if left := journal.differences(before, await journal.fingerprint(self._conn)):
                    raise _Unsound(recover.line, f"recover leaves something behind: {', '.join(left)}")
        except _Unsound as fault:
            self.faults.append(Fault(incident.path, fault.line, fault.message))

    async def _run(self, statement: Statement, values: dict[str, str | None], section: Section) -> Row:
        try:
            return await database.first(self._conn, statement, values)
        except psycopg.Error as error:
            if self._conn.closed:
                raise
            raise _Unsound(_line(statement, error), f"{section.name} fails when it runs: {database.sentence(error)}") from None


def _line(statement: Statement, error: psycopg.Error) -> int:
    """The line of the file that the server's error points at."""
    position = error.diag.statement_position
    if not position:
        return statement.line
    return statement.lines[min(statement.text.count("\n", 0, int(position) - 1), len(statement.lines) - 1)]
