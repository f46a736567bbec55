"""Settings: every option of the command line, its environment variable and its default.

Owns where a value comes from and what values are good. Must not know what is done with them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import psycopg
from psycopg.conninfo import conninfo_to_dict

from incidentd import logs
from incidentd.errors import SettingsError

# libpq's variables that say where a server is; any of them means "not the embedded one".
_LIBPQ = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user has chosen. `server` holds libpq parameters, or is None for the embedded server."""

    server: Mapping[str, str] | None
    state_dir: Path
    incidents: tuple[Path, ...]
    payments: int
    metrics_addr: str
    metrics_port: int
    pool_size: int
    log_format: str
    allow_cluster_scope: bool
    role_password: str | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Option:
    flag: str
    variable: str
    default: str
    help: str
    parse: Callable[[str], Any]
    shown: str = ""


def _between(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().isdecimal() or len(text) > 20 or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text

    return parse


def _flag(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off", ""):
        raise ValueError("1 or 0")
    return text.lower() in ("1", "true", "yes", "on")


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _directories(text: str) -> tuple[Path, ...]:
    return tuple(Path(part) for part in text.split(os.pathsep) if part)


def default_state_dir() -> Path:
    """The platform's state directory; root's is the machine's, which the server's own user can reach."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    name = "incidentd"
    return Path(platformdirs.site_state_dir(name) if root else platformdirs.user_state_dir(name))


OPTIONS = (
    _Option(
        "--dsn",
        "INCIDENTD_DSN",
        "",
        "the database, as a libpq connection string or URL; without one, libpq's PG* variables count",
        str,
        "an embedded PostgreSQL",
    ),
    _Option("--state-dir", "INCIDENTD_STATE_DIR", "", "home of the embedded server", _path, str(default_state_dir())),
    _Option(
        "--incidents",
        "INCIDENTD_INCIDENTS",
        "",
        "a directory of incident files of your own; may be repeated",
        _directories,
        "the built-in catalog only",
    ),
    _Option("--payments", "INCIDENTD_PAYMENTS", "2000000", "payments seeded when the tables are made", _between(1000, 10**9)),
    _Option("--metrics-addr", "INCIDENTD_METRICS_ADDR", "127.0.0.1", "address of the metrics", str),
    _Option(
        "--metrics-port",
        "INCIDENTD_METRICS_PORT",
        "8000",
        "port of the metrics; 0: a free one, printed",
        _between(0, 65535),
    ),
    _Option("--pool-size", "INCIDENTD_POOL_SIZE", "10", "connections of the payment pool", _between(1, 1000)),
    _Option(
        "--log-format",
        "INCIDENTD_LOG_FORMAT",
        "auto",
        "json, text, or auto: text on a terminal",
        _one_of(*logs.FORMATS),
    ),
    _Option(
        "--allow-cluster-scope",
        "INCIDENTD_ALLOW_CLUSTER_SCOPE",
        "",
        "allow incidents that affect other databases of the server; always on for the embedded one",
        _flag,
        "off",
    ),
)


def add_options(parser: argparse._ActionsContainer, suffix: str = "") -> None:
    """Adds every option to `parser`, with its variable and default in the help."""
    for option in OPTIONS:
        text = f"{option.help} (environment: {option.variable}; default: {option.shown or option.default})".replace("%", "%%")
        if option.parse is _flag:
            parser.add_argument(option.flag, action="store_const", const="1", help=text)
        elif option.parse is _directories:
            dest = option.flag.lstrip("-") + suffix
            parser.add_argument(option.flag, action="append", metavar="DIR", help=text, dest=dest)
        else:
            parser.add_argument(option.flag, metavar=option.flag.rpartition("-")[2].upper(), help=text)


def from_arguments(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """The settings: the command line first, the environment second. Raises SettingsError, naming what is wrong."""
    values = {option.flag: _value(option, arguments, environment) for option in OPTIONS}
    server = _server(values["--dsn"], environment, "--dsn" if getattr(arguments, "dsn", None) is not None else "INCIDENTD_DSN")
    return Settings(
        server=server,
        state_dir=values["--state-dir"] or default_state_dir(),
        incidents=values["--incidents"],
        payments=values["--payments"],
        metrics_addr=values["--metrics-addr"],
        metrics_port=values["--metrics-port"],
        pool_size=values["--pool-size"],
        log_format=values["--log-format"],
        allow_cluster_scope=values["--allow-cluster-scope"] or server is None,
        role_password=_secret("INCIDENTD_ROLE_PASSWORD", environment),
    )


def _value(option: _Option, arguments: argparse.Namespace, environment: Mapping[str, str]) -> Any:
    given = getattr(arguments, option.flag.lstrip("-").replace("-", "_"), None)
    source = option.flag if given is not None else option.variable
    if isinstance(given, list):
        return tuple(map(Path, given))
    text = given if given is not None else environment.get(option.variable) or option.default
    try:
        return option.parse(text)
    except ValueError as error:
        raise SettingsError(f'{source} must be {error}, not "{text}"') from None


def _secret(variable: str, environment: Mapping[str, str]) -> str | None:
    """A password from `variable`, or from the file that `variable`_FILE names."""
    path = environment.get(f"{variable}_FILE")
    if not path:
        return environment.get(variable) or None
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{variable}_FILE names {path}, which cannot be read: {error}") from None


def _server(dsn: str, environment: Mapping[str, str], source: str) -> Mapping[str, str] | None:
    if not dsn:
        return {} if any(environment.get(name) for name in _LIBPQ) else None
    try:
        return {key: str(value) for key, value in conninfo_to_dict(dsn).items()}
    except (psycopg.ProgrammingError, UnicodeError):  # its message would repeat the text, which may hold a password
        raise SettingsError(
            f'{source} is not a connection string: write it as "host=... dbname=... user=..." or postgresql://user@host/dbname'
        ) from None
