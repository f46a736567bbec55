"""The journal: one row of `incident_log` for each run, written with the change that it describes.

Owns inject and recover, and the promise between them: what undoes a change is committed with the change, or before it
where it cannot run in a transaction. Must not know when a run begins or ends.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from psycopg import AsyncConnection

from incidentd import identity, script
from incidentd.catalog import Incident
from incidentd.control import Wanted
from incidentd.database import Row, Values, ask, first, queries, run
from incidentd.sqltext import Section, parse_section

Fingerprint = dict[str, str]

_SIZE = "size of table "
_GROWTH_BYTES = 64 << 20  # a table may grow by this, or to twice what it was: payments go on flowing during a run


@dataclass(slots=True)
class Run:
    """A run that is not finished: its row's id, what was asked for, and what is needed to undo it."""

    id: str
    mode: str
    requested_at: str
    undo: str | None
    parameters: dict[str, str | None]
    before: Fingerprint = field(repr=False)
    witnessed: bool = False


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an evidence query said: whether the incident is visible, and its other columns."""

    visible: bool
    details: Row


async def inject(conn: AsyncConnection[Row], incident: Incident, wanted: Wanted) -> Run:
    """Makes the incident's change and its journal row, both or neither.

    Raises psycopg.Error when the change fails: then nothing has changed, or, for a section without a transaction, the row
    is there and says how to undo what was done.
    """
    before = await fingerprint(conn)
    undo = incident.recover.source if incident.recover else None
    parameters = script.constants(dict(incident.params))
    new = Run("", incident.name, wanted.requested_at, undo, parameters, before)
    if incident.inject is None or incident.inject.transaction:
        async with conn.transaction():
            await _begin(conn, new, wanted)
            if incident.inject:
                async with identity.migrator(conn, local=True):
                    new.parameters = await _change(conn, incident.inject, new.parameters)
            await _injected(conn, new)
    else:
        await _begin(conn, new, wanted)
        async with identity.migrator(conn, local=False):
            await _change_by_steps(conn, incident.inject, new)
        await _injected(conn, new)
    return new


async def undo(conn: AsyncConnection[Row], old: Run) -> None:
    """Runs the recover script as it stood when the change was made. Raises psycopg.Error; may be called again."""
    if old.undo:
        section = parse_section("recover", old.undo, Path(f"incident_log:{old.id}"))
        parameters = {name: None for statement in section.statements for name in statement.parameters} | old.parameters
        if section.transaction:
            async with conn.transaction(), identity.migrator(conn, local=True):
                await _change(conn, section, parameters)
        else:
            async with identity.migrator(conn, local=False):
                await _change(conn, section, parameters)
    await ask(conn, "mitigated", id=old.id)


async def witness(conn: AsyncConnection[Row], of: Run, incident: Incident) -> Evidence:
    """What the evidence query says now. Raises psycopg.Error."""
    statement = incident.evidence.statements[0]
    known = dict.fromkeys(statement.parameters) | of.parameters
    row = await first(conn, statement, known)
    return Evidence(row.get("visible") == "t", {key: value for key, value in row.items() if key != "visible"})


async def stopped(conn: AsyncConnection[Row], of: Run, stop: Section) -> bool:
    """Whether the stop condition is true now. Raises psycopg.Error."""
    statement = stop.statements[0]
    return (await first(conn, statement, dict.fromkeys(statement.parameters) | of.parameters)).get("stop") == "t"


async def witnessed(conn: AsyncConnection[Row], of: Run, evidence: Evidence) -> None:
    """Notes that the evidence is visible, and what it says."""
    of.witnessed = True
    await ask(conn, "witnessed", id=of.id, evidence=json.dumps(evidence.details))


async def finish(conn: AsyncConnection[Row], old: Run, outcome: str, error: str | None, seen: list[str]) -> list[str]:
    """Compares the fingerprints and closes the row; the sentences say what was left behind, none on a clean run.

    `seen` is what is known to be left behind already.
    """
    after = await fingerprint(conn)
    residue = seen + differences(old.before, after)
    if residue:
        outcome, error = "failed", "; ".join(filter(None, (error, f"left behind: {', '.join(residue)}")))
    await ask(
        conn,
        "finish_run",
        id=old.id,
        outcome=outcome,
        error=error,
        clean=not residue,
        fingerprint=json.dumps(after),
        residue=json.dumps(residue) if residue else None,
    )
    return residue


async def failed(conn: AsyncConnection[Row], wanted: Wanted, error: str) -> None:
    """Notes a run that could not be begun."""
    await ask(
        conn,
        "failed_to_start",
        mode=wanted.mode,
        requested_at=wanted.requested_at,
        requested_by=wanted.requested_by,
        error=error,
    )


async def unfinished(conn: AsyncConnection[Row]) -> list[Run]:
    """The runs that have no outcome, the newest first."""
    return [
        Run(
            id=str(row["id"]),
            mode=str(row["mode"]),
            requested_at=str(row["requested_at"]),
            undo=row["undo"],
            parameters=json.loads(row["parameters"] or "{}"),
            before=json.loads(row["fingerprint_before"] or "{}"),
        )
        for row in await ask(conn, "unfinished_runs")
    ]


async def fingerprint(conn: AsyncConnection[Row]) -> Fingerprint:
    """Everything that an incident could leave behind: an object's name to its definition."""
    rows = await run(conn, queries("fingerprint.sql")["fingerprint"])
    found: Fingerprint = json.loads(rows[0]["fingerprint"] or "{}")
    return found


def differences(before: Fingerprint, after: Fingerprint) -> list[str]:
    """What differs, an object each: `index public.x is missing`, `... is new`, `... was (A) and is (B)`, `... grew by ...`."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            found.append(f"{name} is missing")
        elif name not in before:
            found.append(f"{name} is new")
        elif name.startswith(_SIZE):
            grown = int(after[name]) - int(before[name])
            if grown > max(_GROWTH_BYTES, int(before[name])):
                found.append(f"{name} grew by {grown >> 20} MB")
        elif before[name] != after[name]:
            found.append(f"{name} was ({before[name]}) and is ({after[name]})")
    return found


async def _begin(conn: AsyncConnection[Row], new: Run, wanted: Wanted) -> None:
    rows = await ask(
        conn,
        "begin_run",
        mode=new.mode,
        requested_at=new.requested_at,
        requested_by=wanted.requested_by,
        undo=new.undo,
        parameters=json.dumps(new.parameters),
        fingerprint=json.dumps(new.before),
    )
    new.id = str(rows[0]["id"])


async def _injected(conn: AsyncConnection[Row], new: Run) -> None:
    await ask(conn, "injected", id=new.id, parameters=json.dumps(new.parameters))


async def _change(conn: AsyncConnection[Row], section: Section, parameters: Values) -> dict[str, str | None]:
    """Plays the statements of inject or recover; unlike an actor's script, an open transaction stays the caller's."""
    known = dict(parameters)
    for statement in section.statements:
        known |= await first(conn, statement, known)
    return known


async def _change_by_steps(conn: AsyncConnection[Row], section: Section, new: Run) -> None:
    """As `_change`, with what each statement returned journaled before the next one runs."""
    for statement in section.statements:
        if row := await first(conn, statement, new.parameters):
            new.parameters |= row
            await identity.be_control(conn)
            await ask(conn, "keep_parameters", id=new.id, parameters=json.dumps(new.parameters))
            await identity.be_migrator(conn, local=False)
