"""The daemon's life: refusals, losses, signals, kill -9, and what is left of each."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from support import Daemon, Operator, eventually, incidentd, refusal, running

from incidentd.postgres import Cluster

SMALL = "1000"


@pytest.fixture(scope="module")
def small(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server that tests may stop, kill and fill."""
    with running(Cluster(scratch / "small", durable=False)) as cluster:
        yield cluster


@pytest.fixture
def target(small: Cluster) -> str:
    small.start()
    return make_conninfo(**small.connection)


@pytest.fixture
def person(target: str) -> Iterator[Operator]:
    somebody = Operator(target)
    yield somebody
    somebody.close()


@pytest.fixture
def service(target: str, scratch: Path) -> Iterator[Daemon]:
    """A daemon with a thousand payments, ended by the test or after it."""
    daemon = Daemon(("--dsn", target, "--payments", SMALL), scratch / "service").start()
    eventually(lambda: daemon.value("payment_requests_total") > 0, "payments flow")
    yield daemon
    daemon.stop(signal.SIGKILL)


def enter(person: Operator, mode: str) -> int:
    """Asks for a mode; the id of its run, as soon as there is one."""
    last = person.last_run().get("id", 0)
    person.set(mode=mode)
    eventually(
        lambda: person.last_run().get("id", 0) > last and person.last_run()["injected_at"], f"{mode} is injected", every=0.02
    )
    return int(person.last_run()["id"])


def has_index(person: Operator) -> bool:
    return bool(person.rows("SELECT to_regclass('payments_reference_idx') IS NOT NULL AS there")[0]["there"])


# -- refusals ---------------------------------------------------------------------------------------------------------------


def test_a_dsn_that_is_none_is_refused_without_repeating_it() -> None:
    said = refusal(incidentd("--dsn", "postgresql://u:hunter2@h/d?sslmod=off", "--metrics-port", "0"))
    assert said.startswith("incidentd: --dsn is not a connection string") and "hunter2" not in said


@pytest.mark.parametrize("command", [[], ["recover"], ["check"]])
def test_an_unreachable_server_is_one_sentence(command: list[str]) -> None:
    said = refusal(incidentd("--dsn", "host=127.0.0.1 port=1 user=x dbname=y", "--metrics-port", "0", *command))
    assert "cannot connect to the database" in said and "check --dsn" in said


def test_a_port_in_use_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = refusal(incidentd("--metrics-port", str(taken.getsockname()[1]), "--state-dir", str(tmp_path / "state")))
    assert "in use" in said and "--metrics-port" in said
    assert not (tmp_path / "state").exists()


def test_a_database_of_somebody_else_is_refused_and_untouched(small: Cluster, target: str) -> None:
    with psycopg.connect(target, autocommit=True) as conn:
        conn.execute("DROP DATABASE IF EXISTS theirs")
        conn.execute("CREATE DATABASE theirs")
    theirs = make_conninfo(target, dbname="theirs")
    with psycopg.connect(theirs, autocommit=True) as conn:
        conn.execute("CREATE TABLE invoices (id int)")
        said = refusal(incidentd("--dsn", theirs, "--metrics-port", "0"))
        assert "holds tables of somebody else (public.invoices)" in said and "createdb" in said
        assert conn.execute("SELECT to_regnamespace('incidentd')").fetchone() == (None,)


def test_a_copy_of_a_claimed_database_is_refused(service: Daemon, target: str) -> None:
    assert service.stop() == 0
    with psycopg.connect(make_conninfo(target, dbname="postgres"), autocommit=True) as conn:
        conn.execute("DROP DATABASE IF EXISTS copied")
        conn.execute("CREATE DATABASE copied TEMPLATE demo")
    said = refusal(incidentd("--dsn", make_conninfo(target, dbname="copied"), "--metrics-port", "0"))
    assert "copy of one that was claimed" in said


def test_a_broken_incident_file_is_refused_with_its_line(target: str, service: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "broken.sql"
    text = (Path(__file__).parents[2] / "sql" / "incidents" / "missing_index.sql").read_text()
    file.write_text(text.replace("FROM pg_stat_user_tables AS payments", "FROM pg_stat_nothing AS payments"))
    line = file.read_text()[: file.read_text().index("pg_stat_nothing")].count("\n") + 1
    said = refusal(incidentd("--dsn", target, "--metrics-port", "0", "--incidents", str(tmp_path)))
    assert said == f'{file}:{line}: relation "pg_stat_nothing" does not exist'


def test_no_daemon_means_a_warning_and_the_change_waits_for_one(
    service: Daemon, person: Operator, target: str, scratch: Path
) -> None:
    assert service.stop() == 0
    person.set(mode="lock_contention")
    assert person.notices == ["WARNING: no daemon is connected: this takes effect when one starts"]
    last = person.last_run().get("id", 0)
    later = Daemon(service.arguments, scratch / "later").start()
    eventually(lambda: person.last_run().get("id", 0) > last, "the run is begun")
    assert person.last_run()["mode"] == "lock_contention"
    assert later.stop() == 0
    assert person.control()["mode"] == "normal"


def test_a_ttl_that_was_over_before_a_daemon_came_means_normal(service: Daemon, person: Operator, scratch: Path) -> None:
    assert service.stop() == 0
    last = person.last_run().get("id", 0)
    person.set(mode="missing_index", ttl="100 milliseconds")
    eventually(
        lambda: person.rows("SELECT requested_at + ttl < clock_timestamp() AS over FROM demo_control")[0]["over"],
        "the ttl is over",
    )
    later = Daemon(service.arguments, scratch / "later").start()
    eventually(lambda: person.control()["mode"] == "normal", "the row is back to normal")
    assert person.last_run().get("id", 0) == last
    person.set(ttl="15 minutes")
    assert later.stop() == 0


# -- ends -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("mode", ["missing_index", "lock_contention", "pool_exhaustion"])
def test_a_signal_ends_it_recovered_to_normal(service: Daemon, person: Operator, mode: str, number: int) -> None:
    before = person.fingerprint()
    run = enter(person, mode)
    begun = time.monotonic()
    assert service.stop(number, seconds=15) == 0
    assert time.monotonic() - begun < 5
    row = person.last_run()
    assert row["id"] == run and row["outcome"] in ("recovered", "not_witnessed") and row["residue"] is None
    assert person.control()["mode"] == "normal"
    assert person.fingerprint() == before
    assert "Traceback" not in service.errors.read_text()


@pytest.mark.parametrize("mode", ["missing_index", "lock_contention", "pool_exhaustion"])
def test_after_kill_9_the_next_start_undoes_what_was_left(
    service: Daemon, person: Operator, target: str, scratch: Path, mode: str
) -> None:
    before = person.fingerprint()
    run = enter(person, mode)
    service.stop(signal.SIGKILL)
    later = Daemon(service.arguments, scratch / "later").start()
    over = person.finished(run - 1)
    assert (over["outcome"], over["error"], over["residue"]) == ("interrupted", "the daemon died", None)
    assert person.fingerprint() == before
    eventually(lambda: person.control()["mode"] == "normal", "a request is served once")
    assert later.stop() == 0
    assert person.last_run()["id"] == run


def test_a_broken_file_does_not_keep_damage_in_place(service: Daemon, person: Operator, target: str, tmp_path: Path) -> None:
    run = enter(person, "missing_index")
    service.stop(signal.SIGKILL)
    assert not has_index(person)
    (tmp_path / "broken.sql").write_text("SELECT 1;")
    said = incidentd("--dsn", target, "--metrics-port", "0", "--incidents", str(tmp_path))
    assert said.returncode == 1 and "broken.sql:1: " in said.stderr
    assert has_index(person)
    assert person.last_run()["id"] == run and person.last_run()["outcome"] == "interrupted"


def test_recover_undoes_what_was_left_without_a_daemon(service: Daemon, person: Operator, target: str) -> None:
    before = person.fingerprint()
    enter(person, "missing_index")
    service.stop(signal.SIGKILL)
    assert not has_index(person)
    done = incidentd("recover", "--dsn", target)
    assert done.returncode == 0 and done.stdout.endswith("1 unfinished run recovered\n")
    assert person.fingerprint() == before
    assert incidentd("--dsn", target, "recover").stdout.endswith("nothing to recover\n")


def test_recover_leaves_a_running_daemon_its_work(service: Daemon, target: str) -> None:
    assert "a daemon is connected" in refusal(incidentd("recover", "--dsn", target))


# -- losses -----------------------------------------------------------------------------------------------------------------


def flows_again(daemon: Daemon) -> None:
    before = daemon.succeeded()
    eventually(lambda: daemon.succeeded() > before + 100, "payments succeed again", 60)


@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_server_that_goes_away_is_waited_for(service: Daemon, small: Cluster, target: str, how: str) -> None:
    person = Operator(target)
    before = person.fingerprint()
    run = enter(person, "missing_index")
    person.close()
    small._pg_ctl("stop", "--wait", f"--mode={how}")
    eventually(lambda: service.events("database_lost"), "the loss is told")
    small.start()
    eventually(lambda: service.events("database_back"), "the return is told")
    flows_again(service)
    person = Operator(target)
    over = person.finished(run - 1)
    assert (over["outcome"], over["residue"]) == ("aborted", None)
    assert person.fingerprint() == before and person.control()["mode"] == "normal"
    person.close()
    assert service.stop() == 0
    assert len(service.events("database_lost")) == 1, "one line when it goes"


def test_terminated_backends_are_replaced(service: Daemon, person: Operator) -> None:
    run = enter(person, "lock_contention")
    others = "pid <> pg_backend_pid() AND backend_type = 'client backend'"
    person.rows(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
    flows_again(service)
    assert person.finished(run - 1)["outcome"] == "aborted"
    assert service.stop() == 0


# -- servers of the user's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_server(scratch: Path) -> Iterator[str]:
    """A server whose database belongs to somebody who may create roles and is no superuser."""
    cluster = Cluster(scratch / "own-server", durable=False)
    cluster.start()
    with psycopg.connect(make_conninfo(**cluster.connection), autocommit=True) as conn:
        conn.execute("CREATE ROLE team LOGIN CREATEROLE")
        conn.execute("CREATE DATABASE payments_demo OWNER team")
    yield make_conninfo(**cluster.connection | {"user": "team", "dbname": "payments_demo"})
    cluster.stop()
    shutil.rmtree(cluster.directory)


def test_no_superuser_is_needed(own_server: str, scratch: Path) -> None:
    daemon = Daemon(("--dsn", own_server, "--payments", SMALL), scratch / "own").start()
    person = Operator(own_server)
    before = person.fingerprint()
    for mode in ("lock_contention", "missing_index"):
        run = enter(person, mode)
        eventually(lambda: person.last_run()["witnessed_at"], f"{mode} is witnessed")
        person.set(mode="normal")
        assert person.finished(run - 1)["outcome"] == "recovered"
    assert person.fingerprint() == before
    person.close()
    assert daemon.stop() == 0


def test_roles_of_somebody_else_are_refused_and_untouched(own_server: str) -> None:
    with psycopg.connect(own_server, autocommit=True) as conn:
        conn.execute("CREATE ROLE migrator LOGIN PASSWORD 'theirs'")
        said = refusal(incidentd("--dsn", own_server, "--metrics-port", "0"))
        assert "the server has roles of the names that the payment service uses (migrator)" in said
        assert conn.execute("SELECT to_regnamespace('incidentd')").fetchone() == (None,)


# -- several ----------------------------------------------------------------------------------------------------------------


def test_two_daemons_share_the_rate_and_one_takes_over_from_the_other(service: Daemon, person: Operator, scratch: Path) -> None:
    other = Daemon(service.arguments, scratch / "other").start()
    eventually(lambda: person.rows("SELECT incidentd.daemons() AS n")[0]["n"] == 2, "both are there")
    assert [service.value("incidentd_leading"), other.value("incidentd_leading")] == [1, 0]
    run = enter(person, "missing_index")
    service.stop(signal.SIGKILL)
    eventually(lambda: other.value("incidentd_leading") == 1, "the other leads", 10)
    assert person.finished(run - 1)["outcome"] == "interrupted"
    assert has_index(person)
    assert other.stop() == 0


# -- the embedded server ----------------------------------------------------------------------------------------------------


@pytest.fixture
def state(scratch: Path) -> Path:
    return scratch / "state"


def test_the_embedded_server_lives_and_ends_with_its_daemon(state: Path, scratch: Path) -> None:
    daemon = Daemon(("--state-dir", str(state), "--payments", SMALL), scratch / "embedded").start()
    asked = incidentd("psql", "--state-dir", str(state), "-XAtc", "SELECT current_user || '@' || current_database()")
    assert (asked.returncode, asked.stdout) == (0, "demo@demo\n")
    exports = dict(
        line.removeprefix("export ").split("=", 1) for line in incidentd("env", "--state-dir", str(state)).stdout.splitlines()
    )
    with psycopg.connect(
        host=exports["PGHOST"], port=int(exports["PGPORT"]), user=exports["PGUSER"], dbname=exports["PGDATABASE"]
    ) as conn:
        assert conn.execute("SELECT mode FROM demo_control").fetchone() == ("normal",)
    second = refusal(incidentd("--state-dir", str(state), "--metrics-port", "0"))
    assert f"another daemon (pid {daemon.process.pid}) uses {state}" in second
    assert state.stat().st_mode & 0o777 == 0o700
    assert daemon.stop() == 0
    assert not Cluster(state).running()
    assert "no embedded PostgreSQL runs" in refusal(incidentd("psql", "--state-dir", str(state)))


def test_the_embedded_server_that_a_killed_daemon_left_is_taken_over(state: Path, scratch: Path) -> None:
    daemon = Daemon(("--state-dir", str(state), "--payments", SMALL), scratch / "embedded").start()
    daemon.stop(signal.SIGKILL)
    assert Cluster(state).running()
    again = Daemon(daemon.arguments, scratch / "embedded").start(10)
    assert again.stop() == 0


def test_seeding_that_was_cut_short_is_begun_again(scratch: Path) -> None:
    state = scratch / "cut-short"
    daemon = Daemon(("--state-dir", str(state), "--payments", "400000"), scratch / "cut")
    seeding = "SELECT to_regclass('payments') IS NOT NULL AND (SELECT count(*) > 0 FROM incidentd.installation)"
    daemon.launch()

    def begun() -> bool:
        done = incidentd("psql", "--state-dir", str(state), "-XAtc", seeding)
        return done.stdout.strip() == "t"

    eventually(begun, "seeding has begun", 20)
    os.kill(daemon.process.pid, signal.SIGKILL)
    daemon.process.wait(5)
    again = Daemon(daemon.arguments, scratch / "cut").start()
    count = incidentd(
        "psql", "--state-dir", str(state), "-XAtc", "SELECT count(*) >= 400000 AND count(*) < 401000 FROM payments"
    )
    assert count.stdout == "t\n"
    assert again.stop() == 0
