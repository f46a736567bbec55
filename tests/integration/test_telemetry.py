"""Traces, logs and exemplars, as a real OTLP endpoint receives them; and payments that do not care whether one does."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from otlp_receiver import Receiver, Span
from psycopg.conninfo import make_conninfo
from support import Daemon, Operator, environment, eventually, running

from incidentd import catalog
from incidentd.postgres import Cluster

MODES = sorted(catalog.load(catalog.incident_files(catalog.incident_directories())).incidents)
STATEMENTS = ["BEGIN", "SELECT", "SELECT", "INSERT", "UPDATE", "INSERT", "COMMIT"]


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[Cluster]:
    with running(Cluster(scratch / "telemetry", durable=False)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def dsn(server: Cluster) -> str:
    return make_conninfo(**server.connection)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver().start()
    yield made
    made.close()


@pytest.fixture
def start(dsn: str, scratch: Path, receiver: Receiver) -> Iterator[Callable[..., Daemon]]:
    """Starts a daemon that sends to the receiver, with further variables of the environment."""
    started: list[Daemon] = []

    def run(protocol: str = "http/protobuf", **variables: str) -> Daemon:
        port = receiver.grpc_port if protocol == "grpc" else receiver.http_port
        own = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
        daemon = Daemon(("--dsn", dsn, "--payments", "20000"), scratch / "telemetry-daemon", environment(**(own | variables)))
        started.append(daemon.start())
        eventually(lambda: daemon.value("payment_requests_total") > 0, "payments flow")
        return daemon

    yield run
    for daemon in started:
        assert daemon.stop() == 0


@pytest.fixture
def person(dsn: str, start: object) -> Iterator[Operator]:
    made = Operator(dsn)
    made.rows("SELECT set_config('track_activities', 'off', false), set_config('pg_stat_statements.track', 'none', false)")
    made.rows("SET search_path = public, incidentd")  # connected before the database has its own
    yield made
    made.close()


def enter(person: Operator, mode: str) -> None:
    last = person.last_run().get("id", 0) if person.rows("SELECT to_regclass('incidentd.incident_log') AS t")[0]["t"] else 0
    person.set(mode=mode)
    eventually(lambda: person.last_run().get("id", 0) > last and person.last_run()["witnessed_at"], f"{mode} is witnessed")


def roots(receiver: Receiver, name: str = "create_payment") -> list[Span]:
    return [span for span in list(receiver.spans) if span.name == name and not span.parent_id]


def below(receiver: Receiver, root: Span) -> list[Span]:
    """The children of a span, in the order in which they began."""
    children = [span for span in list(receiver.spans) if span.parent_id == root.span_id and span.trace_id == root.trace_id]
    return sorted(children, key=lambda span: span.begun)


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_sampled_payment_is_a_tree_of_spans(start: Callable[..., Daemon], receiver: Receiver, protocol: str) -> None:
    start(protocol, OTEL_TRACES_SAMPLER="always_on")
    complete = lambda: [root for root in roots(receiver) if len(below(receiver, root)) == len(STATEMENTS) + 1]  # noqa: E731
    root = eventually(complete, "a payment arrives with all of its spans")[0]
    wait, *statements = below(receiver, root)
    assert (wait.name, [span.name for span in statements]) == ("pool.acquire", STATEMENTS)
    assert all(root.begun <= span.begun <= span.ended <= root.ended for span in (wait, *statements))
    assert (root.service, root.kind, root.failed) == ("payment-service", 2, False)
    assert root.attributes["incident.mode"] == "normal"
    assert int(root.attributes["payment.id"]) > 0 and float(root.attributes["payment.amount"]) > 0
    insert = statements[3]
    assert insert.attributes["db.system.name"] == "postgresql" and insert.attributes["db.namespace"] == "demo"
    assert (
        insert.attributes["db.query.text"].startswith("INSERT INTO payments") and "/*" not in insert.attributes["db.query.text"]
    )
    assert root.resource["service"] == "payment-service"


def test_of_unsampled_requests_the_slow_and_the_failed_are_traced(
    start: Callable[..., Daemon], receiver: Receiver, person: Operator
) -> None:
    daemon = start(OTEL_TRACES_SAMPLER="always_off")
    eventually(lambda: daemon.value("payment_requests_total") > 100, "payments flow")
    healthy = [root for root in roots(receiver) if root.ended - root.begun < 0.05]
    assert healthy == []

    enter(person, "lock_contention")
    # The lock is FOR UPDATE, so it is the INSERT with its foreign key that waits, before any UPDATE.
    waited = lambda: [  # noqa: E731
        span for span in list(receiver.spans) if span.name == "INSERT" and span.parent_id and span.ended - span.begun > 0.5
    ]
    insert = eventually(waited, "an INSERT that waited arrives")[0]
    root = next(root for root in roots(receiver) if root.trace_id == insert.trace_id)
    assert root.attributes["incident.mode"] == "lock_contention" and root.attributes["incident.type"] == "locks"
    settlement = eventually(lambda: roots(receiver, "settlement"), "the settlement's own trace arrives")[0]
    assert settlement.service == "settlement-worker"
    locking, working = [span for span in below(receiver, settlement) if span.name in ("SELECT", "UPDATE")]
    assert working.begun - locking.ended > 1.5, "the gap in which it holds its locks"

    enter(person, "pool_exhaustion")
    failed = eventually(lambda: [root for root in roots(receiver) if root.failed], "a failed payment arrives", 20)[0]
    assert failed.attributes["error.type"] == "PoolTimeout" and failed.events == ("exception",)
    assert [span.name for span in below(receiver, failed)] == ["pool.acquire"]
    person.set(mode="normal")


def test_graph_trace_and_log_lines_lead_to_each_other(
    start: Callable[..., Daemon], receiver: Receiver, person: Operator, server: Cluster
) -> None:
    daemon = start(OTEL_TRACES_SAMPLER="always_on")
    person.rows("ALTER ROLE payments_app SET statement_timeout = '1500ms'")
    person.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'payments_app'")
    enter(person, "lock_contention")
    record = eventually(
        lambda: [one for one in list(receiver.records) if one.attributes.get("sqlstate") == "57014"],
        "a cancelled payment is logged",
    )[0]
    person.set(mode="normal")
    person.rows("ALTER ROLE payments_app SET statement_timeout = '8s'")
    assert (record.severity, record.resource["service"], record.attributes["reason"]) == (
        "WARN",
        "payment-service",
        "statement_timeout",
    )

    known = lambda: {root.trace_id for root in roots(receiver)}  # noqa: E731
    eventually(lambda: record.trace_id in known(), "the record's trace arrives")
    root = next(root for root in roots(receiver) if root.trace_id == record.trace_id)
    assert root.failed and root.attributes["db.response.status_code"] == "57014"
    (line,) = [event for event in daemon.events("payment_failed") if event.get("trace_id") == record.trace_id]
    assert line["message"] == record.body

    logged = "".join(path.read_text(errors="replace") for path in server.log_directory.glob("*.json"))
    commented = set(re.findall(r"traceparent='00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}'", logged))
    assert record.trace_id in commented, "the server's own log leads to the trace"

    asked = urllib.request.Request(daemon.url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    with urllib.request.urlopen(asked, timeout=5) as answer:
        exemplars = set(re.findall(r'payment_duration_seconds_bucket.* # \{trace_id="(\w+)"\}', answer.read().decode()))
    assert exemplars
    eventually(lambda: exemplars <= known(), "every exemplar's trace arrives")


@pytest.mark.parametrize("sampler", ["always_on", "always_off"])
def test_traced_or_not_a_payment_does_the_same_to_the_database(
    start: Callable[..., Daemon], person: Operator, sampler: str
) -> None:
    daemon = start(OTEL_TRACES_SAMPLER=sampler)
    person.set(rate=0.001)
    eventually(lambda: daemon.value("db_client_connection_count", state="used") == 0, "no payment is on its way")
    state = """SELECT (SELECT count(*) FROM payments) AS payments, (SELECT sum(amount) FROM payments) AS amount,
                      (SELECT sum(balance) FROM accounts) + (SELECT coalesce(sum(amount), 0) FROM settlements) AS held,
                      (SELECT last_value FROM outbox_id_seq) AS events"""
    before, begun = person.rows(state)[0], daemon.value("payment_requests_total")
    person.set(rate=100)
    eventually(lambda: daemon.value("payment_requests_total") - begun > 200, "payments are made")
    person.set(rate=0.001)
    eventually(lambda: daemon.value("db_client_connection_count", state="used") == 0, "no payment is on its way")
    time.sleep(0.2)  # the last one counts before its connection is back
    after, made = person.rows(state)[0], daemon.value("payment_requests_total") - begun
    assert after["payments"] - before["payments"] == made
    assert after["events"] - before["events"] == made
    assert after["held"] - before["held"] == after["amount"] - before["amount"]
    person.set(rate=50)


@pytest.mark.parametrize("trouble", ["nobody", "refusing", "silent"])
def test_payments_do_not_care_whether_telemetry_is_taken(
    start: Callable[..., Daemon], receiver: Receiver, person: Operator, trouble: str
) -> None:
    receiver.refusing, receiver.silent = trouble == "refusing", trouble == "silent"
    variables = {"OTEL_TRACES_SAMPLER": "always_on", "OTEL_EXPORTER_OTLP_TIMEOUT": "2"}
    if trouble == "nobody":
        variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"
    daemon = start(**variables)
    eventually(lambda: daemon.value("incidentd_telemetry_dropped_total", signal="traces") > 100, "spans are dropped", 40)
    samples = daemon.samples()
    in_time = samples["payment_schedule_lag_seconds_bucket", (("le", "0.1"),)]
    assert in_time == samples["payment_schedule_lag_seconds_count", ()] > 0, "no payment was late"
    assert daemon.value("payment_errors_total") == daemon.value("payment_skipped_total") == 0
    assert len([event for event in daemon.events("telemetry_lost") if event["message"].startswith("nobody takes traces")]) == 1
    if trouble != "nobody":
        receiver.refusing = receiver.silent = False
        eventually(lambda: daemon.events("telemetry_back"), "the return is told", 40)
    begun = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("mode", MODES)
def test_a_blind_run_tells_nobody_what_it_is(
    start: Callable[..., Daemon], receiver: Receiver, person: Operator, server: Cluster, dsn: str, mode: str
) -> None:
    daemon = start(OTEL_TRACES_SAMPLER="always_on")
    person.set(blind=True)
    eventually(lambda: daemon.value("incidentd_leading") == 0, "the harness has left the metrics")
    logged, spans, records = len(daemon.log.read_text()), len(receiver.spans), len(receiver.records)
    written = {path: path.stat().st_size for path in server.log_directory.glob("*.json")}
    enter(person, mode)
    eventually(lambda: len(receiver.spans) > spans + 500, "spans arrive")

    with urllib.request.urlopen(daemon.url, timeout=5) as answer:
        seen = [
            answer.read().decode(),
            daemon.log.read_text()[logged:],
            repr(receiver.spans[spans:]),
            repr(receiver.records[records:]),
        ]
    with psycopg.connect(make_conninfo(dsn, user="investigator")) as conn:
        views = [
            "pg_stat_activity",
            "pg_stat_statements",
            "pg_locks",
            "pg_settings",
            "pg_description",
            "pg_shdescription",
            "pg_roles",
        ]
        seen += [repr(conn.execute(f"SELECT * FROM {view}").fetchall()) for view in views]
    seen += [path.read_text(errors="replace")[written.get(path, 0) :] for path in server.log_directory.glob("*.json")]
    person.set(mode="normal")
    person.finished(person.last_run()["id"] - 1)
    person.set(blind=False)

    title = catalog.load(catalog.incident_files(catalog.incident_directories())).incidents[mode].front.title
    for text in seen:
        assert mode not in text and title not in text
        # That there is a schema of this name may be seen, and the test's own directory has it in its name.
        told = re.findall(r".{0,80}incidentd.{0,40}", re.sub(r"public, incidentd|/incidentd-test-", "", text))
        assert not told
