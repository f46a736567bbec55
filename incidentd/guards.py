"""Guards: the conditions that end any run, whatever its file says.

Owns their bounds. Must not know how a run is ended. Losing the server ends a run too; that is the conductor's own affair.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from psycopg import AsyncConnection

from incidentd.database import Row, ask

GROWTH_BYTES = 2 << 30  # more than any incident needs, less than a laptop's disk misses
FREE_BYTES = 512 << 20  # what is left for the server to recover with, and for everybody else on the disk


class Guards:
    """Watches one run. `disk` is a directory on the server's disk, None where that is another machine's."""

    def __init__(self, disk: Path | None) -> None:
        self._disk = disk
        self._size: int | None = None

    async def begin(self, conn: AsyncConnection[Row]) -> str | None:
        """Remembers how large the database is; a sentence if a run must not begin now. Raises psycopg.Error."""
        self._size = await _size(conn)
        return self._disk_full()

    async def tripped(self, conn: AsyncConnection[Row]) -> str | None:
        """Why the run must end now, None if it need not. Raises psycopg.Error."""
        grown = await _size(conn) - (self._size or 0)
        if self._size is not None and grown > GROWTH_BYTES:
            return f"the database has grown by {grown >> 20} MB, more than {GROWTH_BYTES >> 20}"
        return self._disk_full()

    def _disk_full(self) -> str | None:
        if self._disk is None:
            return None
        free = shutil.disk_usage(self._disk).free
        return f"only {free >> 20} MB of disk are free, less than {FREE_BYTES >> 20}" if free < FREE_BYTES else None


async def _size(conn: AsyncConnection[Row]) -> int:
    return int((await ask(conn, "database_size"))[0]["bytes"] or 0)
