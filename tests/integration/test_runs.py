"""Runs that do not go as planned, and loads that must not take the control plane with them."""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import Daemon, Operator, eventually, running

from incidentd import database, guards
from incidentd.postgres import Cluster

ODD = Path(__file__).parents[1] / "incidents" / "odd"


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[Cluster]:
    with running(Cluster(scratch / "runs", durable=False)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def dsn(server: Cluster) -> str:
    return make_conninfo(**server.connection)


@pytest.fixture(scope="module")
def daemon(dsn: str, scratch: Path) -> Iterator[Daemon]:
    started = Daemon(("--dsn", dsn, "--payments", "1000", "--incidents", str(ODD)), scratch / "runs-daemon").start()
    yield started
    assert started.stop() == 0


@pytest.fixture
def person(dsn: str, daemon: Daemon) -> Iterator[Operator]:
    somebody = Operator(dsn)
    yield somebody
    somebody.set(mode="normal")
    eventually(
        lambda: not somebody.rows("SELECT FROM incidentd.incident_log WHERE outcome IS NULL"), "every run is finished", 60
    )
    somebody.close()


def story(person: Operator, mode: str) -> dict[str, object]:
    """Asks for a mode that ends by itself; its row."""
    last = person.last_run().get("id", 0)
    person.set(mode=mode)
    over = person.finished(last)
    eventually(lambda: person.control()["mode"] == "normal", "the row is back to normal")
    return over


def test_what_is_never_seen_is_not_witnessed(person: Operator) -> None:
    over = story(person, "unseen")
    assert (over["outcome"], over["error"], over["witnessed_at"]) == ("not_witnessed", "no evidence within 2s", None)


@pytest.mark.parametrize("mode", ["fails_whole", "fails_in_parts"])
def test_a_change_that_fails_half_way_is_undone(person: Operator, mode: str) -> None:
    before = person.fingerprint()
    over = story(person, mode)
    assert (over["outcome"], over["error"], over["residue"]) == ("failed", "division by zero", None)
    assert person.fingerprint() == before


def test_what_is_left_behind_is_named_in_the_row_the_log_and_the_metrics(person: Operator, daemon: Daemon) -> None:
    last = person.last_run().get("id", 0)
    person.set(mode="forgets")
    eventually(lambda: person.last_run()["witnessed_at"], "it is witnessed")
    person.set(mode="normal")
    over = person.finished(last)
    assert over["outcome"] == "failed" and "index public.forgotten_idx is new" in over["error"]
    assert "index public.forgotten_idx is new" in over["residue"]
    assert daemon.value("incidentd_residue") == len(over["residue"])
    assert any("public.forgotten_idx" in event["message"] for event in daemon.events("residue"))
    person.rows("DROP INDEX forgotten_idx")


def test_a_stop_condition_aborts_the_run(person: Operator) -> None:
    over = story(person, "stops")
    assert (over["outcome"], over["error"], over["residue"]) == ("aborted", "its stop condition came true", None)


def test_the_control_plane_works_without_connections_locks_and_cpu(person: Operator, daemon: Daemon) -> None:
    before, last = person.fingerprint(), person.last_run().get("id", 0)
    person.set(mode="smothers")
    eventually(lambda: person.last_run()["mode"] == "smothers" and person.last_run()["witnessed_at"], "it is witnessed", 20)
    eventually(lambda: daemon.events("session_lost"), "the server has no connection left")
    person.set(mode="normal")
    over = person.finished(last)
    assert (over["outcome"], over["error"], over["residue"]) == ("recovered", None, None)
    assert person.fingerprint() == before
    then = daemon.succeeded()
    eventually(lambda: daemon.succeeded() > then + 100, "payments succeed again")


def test_after_a_thousand_updates_from_four_sides_the_last_one_counts(person: Operator, daemon: Daemon, dsn: str) -> None:
    before, modes = person.fingerprint(), ["normal", "missing_index", "lock_contention", "pool_exhaustion"]

    def insist(seed: int) -> None:
        chance = random.Random(seed)
        with psycopg.connect(dsn, autocommit=True) as conn:
            for _ in range(250):
                conn.execute("UPDATE demo_control SET mode = %s", [chance.choice(modes)])

    sides = [threading.Thread(target=insist, args=[seed]) for seed in range(4)]
    for side in sides:
        side.start()
    for side in sides:
        side.join()
    wanted = person.control()["mode"]
    eventually(lambda: daemon.value("incidentd_mode", mode=wanted) == 1, f"the daemon is in {wanted}", 60)
    person.set(mode="normal")
    eventually(lambda: not person.rows("SELECT FROM incidentd.incident_log WHERE outcome IS NULL"), "every run is finished", 60)
    assert person.rows("SELECT mode, error FROM incidentd.incident_log WHERE residue IS NOT NULL AND mode <> 'forgets'") == []
    assert person.fingerprint() == before
    sessions = (
        "SELECT application_name AS name, count(*) AS n FROM pg_stat_activity WHERE backend_type = 'client backend' GROUP BY 1"
    )
    counts = {row["name"]: row["n"] for row in person.rows(sessions) if row["name"] not in ("", "payments-api")}
    assert counts == {"control-plane": 2, "outbox-publisher": 1, "settlement-worker": 1, "metabase": 1}


def test_hostile_values_are_refused_and_nothing_of_them_is_run(person: Operator) -> None:
    before = person.control()
    for value in (
        "'; DROP TABLE payments; --",
        "x" * 1_000_000,
        '"',
        "\\",
        "$$",
        "%s%n",
        "normal\n",
        "\u202enormal",
        "NULL",
        "NORMAL",
    ):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="there is no mode"):
            person.set(mode=value)
    with pytest.raises(psycopg.Error):
        person.rows("UPDATE demo_control SET mode = E'nor\\000mal'")
    with pytest.raises(psycopg.DataError):
        person.set(mode="nor\0mal")
    for value in ("-0", "1e-400", "-inf", "infinity", "nan", "1e308"):
        with pytest.raises(psycopg.Error):
            person.rows(f"UPDATE demo_control SET rate = '{value}'")
    for value in ("infinity", "-infinity", "1000000000 years"):
        with pytest.raises(psycopg.Error):
            person.rows(f"UPDATE demo_control SET ttl = '{value}'")
    assert person.control() == before
    assert person.rows("SELECT count(*) > 0 AS there FROM payments")[0]["there"]


def test_a_killed_daemon_leaves_no_session_behind(dsn: str, daemon: Daemon, person: Operator, scratch: Path) -> None:
    person.set(mode="lock_contention")
    eventually(lambda: person.last_run()["witnessed_at"], "payments wait for locks")
    daemon.stop(signal.SIGKILL)
    sessions = "SELECT FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    eventually(lambda: not person.rows(sessions), "the server has ended every session by itself", 10)
    daemon.start()


def test_the_guards_tell_of_growth_and_of_a_full_disk(dsn: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "GROWTH_BYTES", 1 << 20)

    async def grow() -> tuple[str | None, str | None]:
        async with await database.connect(dsn) as conn:
            watch = guards.Guards(None)
            assert await watch.begin(conn) is None
            calm = await watch.tripped(conn)
            await conn.execute("CREATE TABLE heavy AS SELECT repeat(md5(i::text), 30) FROM generate_series(1, 5000) AS i")
            grown = await watch.tripped(conn)
            await conn.execute("DROP TABLE heavy")
            return calm, grown

    calm, grown = asyncio.run(grow())
    assert calm is None and grown is not None and "the database has grown by" in grown

    async def fill() -> str | None:
        async with await database.connect(dsn) as conn:
            return await guards.Guards(scratch).begin(conn)

    assert asyncio.run(fill()) is None
    monkeypatch.setattr(guards, "FREE_BYTES", 1 << 60)
    assert "of disk are free" in (asyncio.run(fill()) or "")
