"""The command line: what a person types, and what a person reads.

Owns the commands, the banner, the progress bar, and how an error is told: one sentence on stderr, exit code 1. Must not know
how any command does its work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psycopg
from psycopg import AsyncConnection
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import incidentd
from incidentd import catalog, check, daemon, database, install, logs, settings
from incidentd.conductor import recover_now
from incidentd.database import Row, Server
from incidentd.errors import Fault, IncidentdError, ServerError, SqlFileError
from incidentd.metrics import Metrics
from incidentd.postgres import Cluster
from incidentd.settings import Settings
from incidentd.telemetry import Telemetry

Command = Callable[[Settings, argparse.Namespace], int]

_SCRATCH_PAYMENTS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = _parser()
    arguments, arguments_of_psql = parser.parse_known_args(argv)
    if arguments_of_psql and arguments.command is not _psql:
        parser.error(f"unrecognized arguments: {' '.join(arguments_of_psql)}")
    arguments.rest = arguments_of_psql
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())  # until the daemon's own handler takes over
    try:
        if after := getattr(arguments, "incidents_after", None):
            arguments.incidents = [*(arguments.incidents or []), *after]
        chosen = settings.from_arguments(arguments, os.environ)
        code: int = arguments.command(chosen, arguments)
        return code
    except IncidentdError as error:
        print(f"incidentd: {error}" if not isinstance(error, SqlFileError) else error, file=sys.stderr)
        return 1
    except psycopg.Error as error:
        print(f"incidentd: the database refused or was lost: {database.sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as head(1) does
        sys.stderr.close()
        return 1


def _interrupt() -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    settings.add_options(options.add_argument_group("options of every command"))
    parser = argparse.ArgumentParser(
        prog="python -m incidentd",
        parents=[options],
        allow_abbrev=False,
        description=incidentd.__doc__,
        epilog="Without a command the daemon runs. Break something: UPDATE demo_control SET mode = 'lock_contention'",
    )
    parser.add_argument("--version", action="version", version=f"incidentd {incidentd.__version__}")
    parser.set_defaults(command=_run)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, function: Command, text: str, *, add_help: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, parents=[_inherited()], allow_abbrev=False, add_help=add_help
        )
        command.set_defaults(command=function)
        return command

    add("list", _list, "Lists the incidents that the catalog holds.")
    add(
        "check", _check, "Says of every incident file whether it is sound, on a PostgreSQL of its own or that of --dsn."
    ).add_argument("paths", nargs="*", type=Path, metavar="PATH", help="files or directories; default: the whole catalog")
    add("recover", _recover, "Undoes what unfinished incidents have left, when no daemon runs to do it.")
    add("psql", _psql, "Runs psql on the database; arguments are psql's.", add_help=False)
    add("env", _env, 'Prints exports for a shell: eval "$(python -m incidentd env)" makes psql find the database.')
    return parser


def _inherited() -> argparse.ArgumentParser:
    """The options again for a subcommand, so that they may stand before or after its name."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    settings.add_options(options, suffix="_after")
    return options


# -- the daemon -----------------------------------------------------------------------------------------------------------


def _run(chosen: Settings, _: argparse.Namespace) -> int:
    metrics = Metrics()
    serving = metrics.serve(chosen.metrics_addr, chosen.metrics_port)
    try:
        with (
            contextlib.closing(Telemetry(metrics, chosen.log_format)) as telemetry,
            _server(chosen) as server,
            _progress(chosen) as progress,
        ):
            ready = functools.partial(_banner, chosen, server, f"http://{chosen.metrics_addr}:{serving.port}/metrics")
            asyncio.run(daemon.run_until_stopped(server, chosen, telemetry, progress, ready))
    finally:
        serving.close()
    return 0


@contextlib.contextmanager
def _server(chosen: Settings) -> Iterator[Server]:
    """The server of --dsn or PG*; else the embedded one, started now and stopped at the end."""
    if chosen.server is not None:
        yield Server(chosen.server, chosen.role_password)
        return
    cluster = Cluster(chosen.state_dir)
    with cluster.locked():
        cluster.start()
        try:
            yield Server(cluster.connection)
        finally:
            cluster.stop()


def _banner(chosen: Settings, server: Server, url: str) -> None:
    if chosen.log_format == "json" or (chosen.log_format == "auto" and not sys.stdout.isatty()):
        out = Console(stderr=True, highlight=False, soft_wrap=True)
    else:
        out = Console(highlight=False, soft_wrap=True)
    where = f"embedded PostgreSQL in {chosen.state_dir}" if chosen.server is None else _described(server)
    out.print(f"\n[bold]payments flow[/bold] on {escape(where)}\nmetrics: {url}\n\nbreak something, in another terminal:\n")
    psql = _own_command("psql", chosen) if chosen.server is None else _psql_of(chosen.server)
    for mode in ("lock_contention", "normal"):
        out.print(f"  {psql} -c \"UPDATE demo_control SET mode = '{mode}'\"", markup=False)
    out.print(f"\nall modes: {_own_command('list', chosen)}\n", markup=False)


def _own_command(name: str, chosen: Settings) -> str:
    """The shell command that runs one of our commands from any directory, in this environment or out of it."""
    found = shutil.which("python")
    python = "python" if found and Path(found) == Path(sys.executable) else shlex.quote(sys.executable)
    command = f"{python} -m incidentd {name}"
    if chosen.server is None and chosen.state_dir != settings.default_state_dir():
        command += f" --state-dir {shlex.quote(str(chosen.state_dir))}"
    return command


def _psql_of(parameters: Mapping[str, str]) -> str:
    """psql on a server of the user's own, without the password, which psql asks for or finds where libpq does."""
    shown = {key: value for key, value in parameters.items() if "password" not in key}
    return f"psql {shlex.quote(psycopg.conninfo.make_conninfo(**shown))}" if shown else "psql"


def _described(server: Server) -> str:
    info = psycopg.conninfo.conninfo_to_dict(**server.parameters)
    place = info.get("host") or os.environ.get("PGHOST") or "the local server"
    return f"database {info.get('dbname') or os.environ.get('PGDATABASE') or 'of libpq'} at {place}"


@contextlib.contextmanager
def _progress(chosen: Settings) -> Iterator[install.Progress]:
    """A bar on a terminal, nothing elsewhere; it shows from the first call on."""
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with contextlib.ExitStack() as stack:
        tasks: list[TaskID] = []

        def show(doing: str, done: float) -> None:
            if not tasks:
                stack.enter_context(bar)
                tasks.append(bar.add_task(doing, total=1.0))
            bar.update(tasks[0], completed=done, description=f"{chosen.payments:,} payments: {doing}")
            if done >= 1:
                bar.stop()

        yield show


# -- the other commands ---------------------------------------------------------------------------------------------------


def _list(chosen: Settings, _: argparse.Namespace) -> int:
    loaded = catalog.load(catalog.incident_files(catalog.incident_directories(chosen.incidents)))
    table = Table(box=None, pad_edge=False)
    table.add_column("mode", no_wrap=True, min_width=max(map(len, loaded.incidents), default=0))
    for heading in ("severity", "category", "what happens"):
        table.add_column(heading)
    for incident in sorted(loaded.incidents.values(), key=lambda incident: incident.name):
        table.add_row(incident.name, incident.front.severity, incident.front.category, incident.front.title)
    Console(highlight=False, markup=False, emoji=False).print(table)
    return 0


def _check(chosen: Settings, arguments: argparse.Namespace) -> int:
    if arguments.paths:
        missing = [path for path in arguments.paths if not os.path.exists(path)]
        if missing:
            raise IncidentdError(f"there is no {missing[0]}: name incident files or directories of them")
        paths = [file for path in arguments.paths for file in (sorted(path.glob("*.sql")) if path.is_dir() else [path])]
    else:
        paths = catalog.incident_files(catalog.incident_directories(chosen.incidents))
    loaded = catalog.load(paths)
    with _scratch_server(chosen) as (server, own):
        faults = asyncio.run(_checked(server, loaded, make_changes=own))
    if faults:
        raise SqlFileError(faults)
    print(f"{len(loaded.incidents)} incident file{'s are' if len(loaded.incidents) != 1 else ' is'} sound")
    return 0


@contextlib.contextmanager
def _scratch_server(chosen: Settings) -> Iterator[tuple[Server, bool]]:
    """The server of --dsn or PG*; else one made for the moment, and true because nobody else uses it."""
    if chosen.server is not None:
        yield Server(chosen.server), False
        return
    directory = Path(tempfile.mkdtemp(prefix="incidentd-"))
    directory.chmod(0o755)
    cluster = Cluster(directory / "check", durable=False)
    try:
        cluster.start()
        yield Server(cluster.connection), True
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


async def _checked(server: Server, loaded: catalog.Catalog, *, make_changes: bool) -> list[Fault]:
    async with await _connect(server) as conn:
        if make_changes:
            await install.install(conn, _SCRATCH_PAYMENTS, lambda doing, done: None)
        else:
            await _require_installed(conn)
        return await check.check(conn, loaded, make_changes=make_changes)


def _recover(chosen: Settings, _: argparse.Namespace) -> int:
    logs.configure(chosen.log_format)
    with _server(chosen) as server:
        count = asyncio.run(_recovered(server))
    print(f"{count} unfinished run{'s' if count != 1 else ''} recovered" if count else "nothing to recover")
    return 0


async def _recovered(server: Server) -> int:
    async with await _connect(server) as conn:
        await _require_installed(conn)
        return await recover_now(conn)


def _psql(chosen: Settings, arguments: argparse.Namespace) -> int:
    if chosen.server is None:
        cluster = _running_cluster(chosen)
        program, parameters = str(cluster.psql()), cluster.connection
    else:
        found = shutil.which("psql")
        if not found:
            raise ServerError("there is no psql on the PATH: install PostgreSQL's client")
        program, parameters = found, dict(chosen.server)
    os.execve(program, ["psql", *arguments.rest], {**os.environ, **_variables(parameters)})


def _env(chosen: Settings, _: argparse.Namespace) -> int:
    parameters = _running_cluster(chosen).connection if chosen.server is None else dict(chosen.server)
    for name, value in _variables(parameters).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _running_cluster(chosen: Settings) -> Cluster:
    cluster = Cluster(chosen.state_dir)
    if not cluster.running():
        raise ServerError(
            f"no embedded PostgreSQL runs in {chosen.state_dir}: start it with python -m incidentd, or name a server with --dsn"
        )
    return cluster


def _variables(parameters: dict[str, str]) -> dict[str, str]:
    """libpq's environment variables for connection parameters."""
    known = {option.keyword.decode(): option.envvar.decode() for option in psycopg.pq.Conninfo.get_defaults() if option.envvar}
    return {known[name]: value for name, value in parameters.items() if name in known}


async def _connect(server: Server) -> AsyncConnection[Row]:
    try:
        return await database.connect(server.control())
    except psycopg.OperationalError as error:
        raise database.unreachable(error) from None


async def _require_installed(conn: AsyncConnection[Row]) -> None:
    if not await install.is_installed(conn):
        raise ServerError(f'database "{conn.info.dbname}" holds no payment service: start one there with python -m incidentd')
