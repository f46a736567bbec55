"""Preparation: what a daemon does before payments can flow.

Owns the order: what a dead daemon has left is undone first, then the catalog is read, the database filled, the catalog checked
and published. Must not know how payments are made.
"""

from __future__ import annotations

import contextlib
import json
from types import MappingProxyType

import psycopg
from psycopg import AsyncConnection

from incidentd import catalog, check, conductor, database, identity, install, journal
from incidentd.catalog import Catalog
from incidentd.database import Row, Server, ask
from incidentd.errors import ServerError, SqlFileError
from incidentd.install import Progress
from incidentd.settings import Settings


async def prepare(server: Server, settings: Settings, progress: Progress) -> tuple[Server, Catalog]:
    """Brings the database and its catalog to where payments can flow; returns the server with the roles' password.

    Raises IncidentdError with the reason why they cannot.
    """
    try:
        conn = await database.connect(server.control())
    except psycopg.OperationalError as error:
        raise database.unreachable(error) from None
    async with conn:
        await identity.be_unseen(conn)
        await install.check_ours(conn)
        if await install.is_installed(conn):
            await _recover(conn)  # before the catalog is read: a broken file must not keep damage in place
        loaded = catalog.load(catalog.incident_files(catalog.incident_directories(settings.incidents)))
        await install.install(conn, settings.payments, progress)
        if settings.server is not None:
            server = Server(server.parameters, await install.share_password(conn, settings.role_password))
        if faults := await check.check(conn, await _unchecked(conn, loaded), make_changes=False):
            raise SqlFileError(faults)
        await _publish(conn, loaded, settings.allow_cluster_scope)
    return server, loaded


async def _recover(conn: AsyncConnection[Row]) -> None:
    """Undoes what a daemon that died has left; a daemon that leads does that by itself."""
    if await journal.unfinished(conn):
        with contextlib.suppress(ServerError):
            await conductor.recover_now(conn)


async def _unchecked(conn: AsyncConnection[Row], loaded: Catalog) -> Catalog:
    """The part of the catalog that has to be checked: all of it, except while another daemon has an incident going.

    Then the database is not as the files expect it, and those that are published already were found sound before.
    """
    if not await journal.unfinished(conn):
        return loaded
    published = {str(row["sha256"]) for row in await ask(conn, "list_incidents")}
    new = {name: incident for name, incident in loaded.incidents.items() if incident.sha256 not in published}
    return Catalog(loaded.normal, MappingProxyType(new))


async def _publish(conn: AsyncConnection[Row], loaded: Catalog, allow_cluster_scope: bool) -> None:
    """Tells the control plane what modes there are, and which of them this server cannot have."""
    async with conn.transaction():
        for incident in loaded.incidents.values():
            front = incident.front
            requires = json.dumps(front.requires)
            missing = [str(row["name"]) for row in await ask(conn, "missing_requirements", requires=requires)]
            refusal = None
            if front.scope == "cluster" and not allow_cluster_scope:
                refusal = "it affects other databases of the server: start the daemon with --allow-cluster-scope"
            elif missing:
                refusal = f"the server does not offer what it requires: {', '.join(missing)}"
            await ask(
                conn,
                "publish_incident",
                name=incident.name,
                title=front.title,
                category=front.category,
                severity=front.severity,
                cause=front.cause,
                fix=front.fix,
                traps=json.dumps(front.traps),
                requires=requires,
                scope=front.scope,
                sha256=incident.sha256,
                refusal=refusal,
                signals=json.dumps(
                    {"promql": front.signals.promql, "logql": front.signals.logql, "traceql": front.signals.traceql}
                ),
            )
        await ask(conn, "forget_incidents", names="{" + ",".join(loaded.incidents) + "}")
