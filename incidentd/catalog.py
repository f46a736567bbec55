"""The catalog: what `sql/normal.sql` and the incident files say, as immutable objects.

Owns the meaning of front matter and sections: which are reserved, which are actors, what an incident changes about a
healthy day. Must not know how anything is executed, nor that a server exists.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import msgspec

from incidentd.errors import Fault, SqlFileError
from incidentd.sqltext import Section, parse_duration, parse_sections

NORMAL = "normal"
RESERVED = ("inject", "recover", "evidence", "stop")

# What the daemon binds by itself for an actor's script (DESIGN §4); scripts may not redefine them in [params].
SUPPLIED = frozenset({"amount", "account_id", "merchant_id", "hot_merchant_id", "reference", "session", "session_count"})

_FRONT_MATTER = re.compile(r"\s*/\*---\n(?P<toml>.*?)---\*/", re.DOTALL)
_INCIDENT_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_TOML_PLACE = re.compile(r" \(at (?:line (?P<line>\d+), column \d+|end of document)\)$")
_MSGSPEC_PLACE = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `(?P<key>[^`]*)`")
_HEADER = re.compile(r"\s*\[([^\[\]]+)\]")

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=2000, pattern=r"^[^\x00]*$")]
Parameter = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]*$")] | int | float | bool


class ActorFront(msgspec.Struct, forbid_unknown_fields=True):
    """One `[actor.NAME]` table."""

    sessions: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    share: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    role: Text | None = None
    application_name: Annotated[str, msgspec.Meta(min_length=1, max_length=63)] | None = None
    connect: Literal["keep", "each"] | None = None


class SignalsFront(msgspec.Struct, forbid_unknown_fields=True):
    """The `[signals]` table: queries that are false on a healthy day and true in the incident."""

    promql: list[Text] = []
    logql: list[Text] = []
    traceql: list[Text] = []


class NormalFront(msgspec.Struct, forbid_unknown_fields=True):
    """The front matter of `normal.sql`."""

    actor: dict[str, ActorFront]
    params: dict[str, Parameter] = {}


class IncidentFront(msgspec.Struct, forbid_unknown_fields=True):
    """The front matter of an incident file (DESIGN §4)."""

    title: Text
    category: Annotated[str, msgspec.Meta(pattern="^[a-z][a-z_]*$")]
    severity: Literal["low", "medium", "high", "critical"]
    cause: Text
    fix: Text
    traps: list[Text] = []
    scope: Literal["database", "cluster"] = "database"
    requires: list[Text] = []
    witness_within: str = "5s"
    actor: dict[str, ActorFront] = {}
    params: dict[str, Parameter] = {}
    signals: SignalsFront = msgspec.field(default_factory=SignalsFront)


@dataclass(frozen=True, slots=True)
class Actor:
    """Somebody who talks to the database: a script, and either sessions of its own or a share of the payment rate.

    Exactly one of `sessions` (a count) and `share` (a part of `rate`, through the payment pool) is set.
    """

    name: str
    script: Section
    role: str
    application_name: str
    sessions: int | None
    share: float | None
    connect: Literal["keep", "each"]
    params: MappingProxyType[str, Parameter]


Cast = MappingProxyType[str, Actor]


@dataclass(frozen=True, slots=True)
class Incident:
    """One incident file: its front matter, its reserved sections, and the actors of its day, baseline included.

    `witness_within` is in seconds.
    """

    name: str
    path: Path
    sha256: str
    front: IncidentFront
    witness_within: float
    evidence: Section
    inject: Section | None
    recover: Section | None
    stop: Section | None
    cast: Cast
    params: MappingProxyType[str, Parameter]


@dataclass(frozen=True, slots=True)
class Catalog:
    """The healthy day, and every incident by name."""

    normal: Cast
    incidents: MappingProxyType[str, Incident]

    def actors(self) -> list[Actor]:
        """Every actor of every mode."""
        casts = (self.normal, *(incident.cast for incident in self.incidents.values()))
        return [actor for cast in casts for actor in cast.values()]

    def cast(self, mode: str) -> Cast:
        """Who acts in `mode`; `normal` for a mode that is not in the catalog."""
        incident = self.incidents.get(mode)
        return incident.cast if incident else self.normal


def sql_directory() -> Path:
    """Where `sql/` is: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(str(resources.files("incidentd")))
    inside = package / "sql"
    return inside if inside.is_dir() else package.parent / "sql"


def incident_directories(own: tuple[Path, ...] = ()) -> tuple[Path, ...]:
    """The built-in catalog and the user's `own`, in the order in which they are read."""
    return (sql_directory() / "incidents", *own)


def incident_files(directories: tuple[Path, ...]) -> list[Path]:
    """Every `*.sql` of `directories`. Raises SqlFileError for a directory that cannot be read."""
    paths: list[Path] = []
    for directory in directories:
        try:
            paths.extend(sorted(path for path in directory.iterdir() if path.suffix == ".sql"))
        except (FileNotFoundError, NotADirectoryError):
            message = "there is no such directory: name one that holds incident files"
            raise SqlFileError([Fault(directory, 1, message)]) from None
        except OSError as error:
            raise SqlFileError([Fault(directory, 1, f"cannot be read: {error.strerror}")]) from None
    return paths


def load(paths: list[Path]) -> Catalog:
    """The catalog made of `normal.sql` and the incident files `paths`. Raises SqlFileError with every fault in them."""
    normal = _load_normal(sql_directory() / "normal.sql")
    incidents: dict[str, Incident] = {}
    faults: list[Fault] = []
    for path in paths:
        try:
            incident = _load_incident(path, normal)
        except SqlFileError as error:
            faults.extend(error.faults)
            continue
        if other := incidents.get(incident.name):
            faults.append(Fault(path, 1, f"incident {incident.name} is defined in {other.path} too: rename one of them"))
        incidents[incident.name] = incident
    if faults:
        raise SqlFileError(faults)
    return Catalog(normal, MappingProxyType(incidents))


@dataclass(slots=True)
class _File:
    """A file on its way to an incident: its text, its sections, and the faults found so far."""

    path: Path
    bytes: bytes = b""
    text: str = ""
    front: Any = None
    sections: dict[str, Section] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def fault(self, message: str, line: int = 1) -> None:
        self.faults.append(Fault(self.path, line, message))

    def line_of(self, key: str) -> int:
        """The line of the front matter that sets `key` (`title`, `actor.settlement.sessions`), or the nearest above."""
        parts = key.split(".")
        for depth in range(len(parts), 0, -1):
            table: list[str] = []
            for number, line in enumerate(self.text.partition("---*/")[0].split("\n"), 1):
                if header := _HEADER.match(line):
                    table = [part.strip(" \t\"'") for part in header[1].split(".")]
                    if table[:depth] == parts[:depth]:
                        return number
                elif table == parts[: depth - 1] and re.match(rf"\s*[\"']?{re.escape(parts[depth - 1])}[\"']?\s*[=.]", line):
                    return number
        return 1

    def raise_faults(self) -> None:
        if self.faults:
            raise SqlFileError(self.faults)


def _read(path: Path, shape: type[msgspec.Struct]) -> _File:
    file = _File(path)
    try:
        file.bytes = path.read_bytes()
        file.text = file.bytes.decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        file.fault(f"cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        file.fault("is not UTF-8 text: save it as UTF-8")
    file.raise_faults()
    _read_front_matter(file, shape)
    try:
        file.sections = {section.name: section for section in parse_sections(file.text, path)}
    except SqlFileError as error:
        file.faults.extend(error.faults)
    file.raise_faults()
    return file


def _read_front_matter(file: _File, shape: type[msgspec.Struct]) -> None:
    found = _FRONT_MATTER.match(file.text)
    if not found:
        file.fault("the file must begin with its front matter: a block comment from /*--- to ---*/ that holds TOML")
        return
    first = file.text.count("\n", 0, found.start("toml"))
    try:
        raw = tomllib.loads(found["toml"])
        file.front = msgspec.convert(raw, shape)
    except msgspec.ValidationError as error:
        key = _key(str(error), raw)
        message = _MSGSPEC_PLACE.sub("", str(error))
        file.fault(f"front matter, {key}: {message}" if key else f"front matter: {message}", file.line_of(key))
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.search(str(error))
        line = int(place["line"]) if place and place["line"] else found["toml"].count("\n")
        file.fault(f"the front matter is not TOML: {_TOML_PLACE.sub('', str(error))}", first + line)
    except (RecursionError, ValueError):  # from tomllib: values nested too deeply, numbers of thousands of digits
        file.fault("the front matter is not TOML: it holds a value that is too deep or too long", first + 1)


def _key(message: str, raw: dict[str, Any]) -> str:
    """The key that msgspec complains of, `actor.settlement.sessions`; msgspec itself leaves out the names of tables."""
    place, unknown = _MSGSPEC_PLACE.search(message), _UNKNOWN.search(message)
    path = re.sub(r"\[\d+\]", "", place["path"]) if place else ""
    table, dots, rest = path.partition("[...]")
    if dots:
        kind: Any = ActorFront if table == "actor" else Parameter
        path = f"{table}.{_first_unfit(raw[table], kind)}{rest}"
    return ".".join(part for part in (path, unknown["key"] if unknown else "") if part)


def _first_unfit(table: dict[str, Any], kind: Any) -> str:
    for name, value in table.items():
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            return name
    return ""


def _load_normal(path: Path) -> Cast:
    file = _read(path, NormalFront)
    cast = _cast(file, dict(file.sections), MappingProxyType({}))
    file.raise_faults()
    return cast


def _load_incident(path: Path, normal: Cast) -> Incident:
    file = _read(path, IncidentFront)
    front: IncidentFront = file.front
    _check_name(file)
    _check_reserved(file)
    within = _witness_within(file)
    scripts = {name: section for name, section in file.sections.items() if name not in RESERVED}
    cast = _cast(file, scripts, normal)
    file.raise_faults()
    return Incident(
        name=path.stem,
        path=path,
        sha256=hashlib.sha256(file.bytes).hexdigest(),
        front=front,
        witness_within=within,
        evidence=file.sections["evidence"],
        inject=file.sections.get("inject"),
        recover=file.sections.get("recover"),
        stop=file.sections.get("stop"),
        cast=cast,
        params=MappingProxyType(front.params),
    )


def _check_name(file: _File) -> None:
    if not _INCIDENT_NAME.fullmatch(file.path.stem) or file.path.stem == NORMAL:
        file.fault(f'"{file.path.stem}" cannot name an incident: use lower-case letters, digits and _, and not "{NORMAL}"')


def _check_reserved(file: _File) -> None:
    if "evidence" not in file.sections:
        file.fault('there is no section "evidence": add a query of one row with a boolean column "visible"')
    if "inject" in file.sections and "recover" not in file.sections:
        file.fault('"inject" without "recover": add a section that undoes the change', file.sections["inject"].line)
    for name in ("evidence", "stop"):
        if name in file.sections and len(file.sections[name].steps) != 1:
            file.fault(f'"{name}" must be exactly one query', file.sections[name].line)
    for name in RESERVED:
        for statement in file.sections[name].statements if name in file.sections else ():
            if statement.controls_transaction:
                file.fault(f'"{name}" holds no {statement.keyword}: its transaction is the daemon\'s', statement.line)


def _witness_within(file: _File) -> float:
    try:
        return parse_duration(file.front.witness_within)
    except ValueError as error:
        file.fault(str(error), file.line_of("witness_within"))
        return 0.0


def _cast(file: _File, scripts: dict[str, Section], normal: Cast) -> Cast:
    """The baseline with every actor of `file` put in its place."""
    front, cast = file.front, dict(normal)
    for name in sorted(front.params.keys() & SUPPLIED):
        file.fault(f'"{name}" is supplied by the daemon: name the constant differently', file.line_of(f"params.{name}"))
    for name in front.actor:
        if name not in scripts and name not in normal:
            file.fault(f'actor {name} has no script: add a section "-- name: {name}"', file.line_of(f"actor.{name}"))
        elif name not in scripts:
            scripts[name] = normal[name].script
    for name, section in scripts.items():
        line = file.line_of(f"actor.{name}") if name in front.actor else section.line
        actor = _actor(name, section, front, normal.get(name))
        if isinstance(actor, str):
            file.fault(actor, line)
        else:
            cast[name] = actor
    return MappingProxyType(cast)


def _actor(name: str, script: Section, front: Any, base: Actor | None) -> Actor | str:
    """The actor that a section and its table describe, or the sentence that says why they do not."""
    table: ActorFront | None = front.actor.get(name)
    if table is None and base is None:
        return f"section {name} is neither reserved nor an actor: add a table [actor.{name}]"
    table = table or ActorFront()
    if table.sessions is not None and table.share is not None:
        return f"actor {name} has both sessions and share: keep one"
    connect = table.connect
    if base and table.sessions is None and table.share is None:
        table = _replace_unset(table, sessions=base.sessions, share=base.share)
    if base:
        table = _replace_unset(table, role=base.role, application_name=base.application_name, connect=base.connect)
    if table.sessions is None and table.share is None:
        return f"actor {name} needs sessions (connections of its own) or share (a part of the payment rate)"
    if table.share is not None and connect is not None:
        return f"actor {name} goes through the payment pool: connect is only for actors with sessions"
    if table.sessions is not None and not (table.role and table.application_name):
        return f"actor {name} needs a role and an application_name: the story's own, never the tool's"
    params = {**(base.params if base else {}), **front.params}
    return Actor(
        name=name,
        script=script,
        role=table.role or "",
        application_name=table.application_name or "",
        sessions=table.sessions,
        share=table.share,
        connect=table.connect or "keep",
        params=MappingProxyType(params),
    )


def _replace_unset(table: ActorFront, **defaults: Any) -> ActorFront:
    """`table` with the fields that it leaves out taken from `defaults`."""
    return msgspec.structs.replace(table, **{key: value for key, value in defaults.items() if getattr(table, key) is None})
