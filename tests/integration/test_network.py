"""The network to the server, cut and frozen: the daemon notices in bounded time, waits, recovers, and payments resume.

The server here is one of the user's own kind: over TCP, with passwords.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from proxy import Proxy
from psycopg.conninfo import make_conninfo
from support import Daemon, Operator, environment, eventually, incidentd, refusal

from incidentd.postgres import Cluster

PORT = 54329
PASSWORD = "correct horse"
HBA = "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[Cluster]:
    cluster = Cluster(scratch / "tcp", durable=False, port=PORT, settings={"listen_addresses": "127.0.0.1"})
    cluster.start()
    with psycopg.connect(**cluster.connection, autocommit=True) as conn:  # type: ignore[arg-type]
        conn.execute(f"ALTER ROLE demo PASSWORD '{PASSWORD}'")
        (cluster.data / "pg_hba.conf").write_text(HBA)
        conn.execute("SELECT pg_reload_conf()")
    yield cluster
    cluster.stop()


@pytest.fixture
def proxy(server: Cluster) -> Iterator[Proxy]:
    made = Proxy(("127.0.0.1", PORT))
    yield made
    made.close()


@pytest.fixture
def person(server: Cluster) -> Iterator[Operator]:
    somebody = Operator(make_conninfo(**server.connection))
    yield somebody
    somebody.close()


@pytest.fixture
def daemon(proxy: Proxy, scratch: Path) -> Iterator[Daemon]:
    dsn = f"host=127.0.0.1 port={proxy.port} user=demo dbname=demo password='{PASSWORD}'"
    started = Daemon(("--dsn", dsn, "--payments", "1000"), scratch / "network").start()
    yield started
    started.stop(signal.SIGKILL)


@pytest.mark.parametrize(
    ("mode", "how"),
    [("missing_index", "cut"), ("lock_contention", "cut"), ("pool_exhaustion", "cut"), ("missing_index", "freeze")],
)
def test_the_network_fails_in_the_middle_of_an_incident(
    daemon: Daemon, proxy: Proxy, person: Operator, mode: str, how: str
) -> None:
    before, last = person.fingerprint(), person.last_run().get("id", 0)
    person.set(mode=mode)
    eventually(lambda: person.last_run().get("id", 0) > last and person.last_run()["injected_at"], f"{mode} is injected")

    getattr(proxy, how)()
    eventually(lambda: daemon.events("database_lost"), "the loss is noticed and told", 30)
    proxy.restore()
    eventually(lambda: daemon.events("database_back"), "the return is told", 30)

    over = person.finished(last)
    assert (over["outcome"], over["residue"]) == ("aborted", None)
    assert person.fingerprint() == before
    assert person.control()["mode"] == "normal"
    then = daemon.succeeded()
    eventually(lambda: daemon.succeeded() > then + 100, "payments succeed again", 60)
    assert daemon.stop() == 0


def test_a_frozen_network_does_not_keep_the_daemon_from_ending(daemon: Daemon, proxy: Proxy, person: Operator) -> None:
    last = person.last_run().get("id", 0)
    person.set(mode="missing_index")
    eventually(lambda: person.last_run().get("id", 0) > last and person.last_run()["injected_at"], "the run is begun")
    proxy.freeze()
    assert daemon.stop(seconds=40) == 0
    assert daemon.events("not_recovered")
    proxy.restore()
    done = incidentd("recover", "--dsn", f"host=127.0.0.1 port={PORT} user=demo dbname=demo", PGPASSWORD=PASSWORD)
    assert done.stdout.endswith("1 unfinished run recovered\n"), done.stderr


def test_passwords_are_in_no_log_and_on_no_command_line_of_the_server(
    daemon: Daemon, server: Cluster, person: Operator
) -> None:
    kept = person.rows("SELECT role_password FROM incidentd.installation")[0]["role_password"]
    assert len(kept) >= 24
    logs = "".join(path.read_text(errors="replace") for path in server.log_directory.iterdir())
    for text in (logs, daemon.log.read_text(), daemon.errors.read_text()):
        assert kept not in text and PASSWORD not in text
    with psycopg.connect(host="127.0.0.1", port=PORT, user="payments_app", password=kept, dbname="demo") as conn:
        assert conn.execute("SELECT current_user").fetchone() == ("payments_app",)


def test_the_password_of_the_roles_comes_from_a_file(daemon: Daemon, server: Cluster, scratch: Path, tmp_path: Path) -> None:
    assert daemon.stop() == 0
    secret = tmp_path / "secret"
    secret.write_text("from a file\n")
    dsn = f"host=127.0.0.1 port={PORT} user=demo dbname=demo password='{PASSWORD}'"
    again = Daemon(("--dsn", dsn), scratch / "again", environment(INCIDENTD_ROLE_PASSWORD_FILE=str(secret))).start()
    eventually(lambda: again.value("payment_requests_total") > 10, "payments flow")
    with psycopg.connect(host="127.0.0.1", port=PORT, user="bi_reader", password="from a file", dbname="demo") as conn:
        assert conn.execute("SELECT current_user").fetchone() == ("bi_reader",)
    assert again.stop() == 0


def test_a_wrong_password_is_one_sentence_without_it(server: Cluster) -> None:
    said = refusal(
        incidentd("--dsn", f"host=127.0.0.1 port={PORT} user=demo dbname=demo password=hunter2", "--metrics-port", "0")
    )
    assert "password authentication failed" in said and "hunter2" not in said
