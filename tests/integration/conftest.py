"""Servers to test against: the embedded PostgreSQL everywhere, the system's 15, 16 and 17 where there are any.

INCIDENTD_TEST_BINARIES adds further `bin` directories, separated like PATH.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo
from support import Daemon, Operator, eventually, running

from incidentd.postgres import Cluster, bundled_binaries

SYSTEM = sorted(
    path
    for version in (15, 16, 17)
    for path in Path(f"/usr/lib/postgresql/{version}").glob("bin")
    if (path / "initdb").exists()
)
ADDED = [Path(path) for path in os.environ.get("INCIDENTD_TEST_BINARIES", "").split(os.pathsep) if path]
SERVERS = {
    "embedded": bundled_binaries(),
    **{f"system-{path.parent.name}": path for path in SYSTEM},
    **{f"added-{number}": path for number, path in enumerate(ADDED, 1)},
}


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A directory that the server's own user can enter, which pytest's tmp_path of root is not."""
    directory = Path(tempfile.mkdtemp(prefix="incidentd-test-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session", params=list(SERVERS), ids=list(SERVERS))
def cluster(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Cluster]:
    """A running server."""
    with running(Cluster(scratch / request.param, binaries=SERVERS[request.param], durable=False)) as made:
        yield made


@pytest.fixture(scope="session")
def dsn(cluster: Cluster) -> str:
    """Its database, as its owner."""
    return make_conninfo(**cluster.connection)


@pytest.fixture(scope="module")
def daemon(dsn: str, scratch: Path) -> Iterator[Daemon]:
    """A daemon on that database, with the default two million payments, at the default rate, in the mode `normal`."""
    started = Daemon(("--dsn", dsn), scratch / "daemon").start()
    eventually(lambda: started.value("payment_requests_total") > 0, "payments flow")
    yield started
    assert started.stop() == 0


@pytest.fixture
def operator(dsn: str, daemon: Daemon) -> Iterator[Operator]:
    """An operator who leaves the service in `normal` at the default rate."""
    person = Operator(dsn)
    yield person
    person.set(mode="normal", rate=50, ttl="15 minutes", blind=False)
    eventually(lambda: not person.rows("SELECT FROM incidentd.incident_log WHERE outcome IS NULL"), "every run is finished", 60)
    person.close()
