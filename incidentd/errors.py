"""What can go wrong in a way the user can mend: one exception, one sentence, one remedy.

Owns the exception types that the command line turns into a sentence on stderr and exit code 1. Must not know
what raises them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class IncidentdError(Exception):
    """A sentence for the user: what is wrong, where, and what to do about it."""


class SettingsError(IncidentdError):
    """An option or environment variable has a value that cannot be used."""


class ServerError(IncidentdError):
    """The PostgreSQL server cannot be started, reached or used."""


class ForeignDatabaseError(IncidentdError):
    """The database holds somebody else's tables."""


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing that is wrong with one line of an SQL file."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


class SqlFileError(IncidentdError):
    """One or more SQL files are broken; `faults` says where, one entry a fault, ordered by place."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = sorted(set(faults))
        super().__init__("\n".join(map(str, self.faults)))
