"""Every incident of the catalog: quiet, injected, witnessed, felt by the payments, undone, quiet again."""

from __future__ import annotations

import json

import pytest
from support import Daemon, Operator, eventually

from incidentd import catalog

BUILT_IN = catalog.load(catalog.incident_files(catalog.incident_directories())).incidents
WINDOW = 4  # seconds of payments that a percentile is taken of: 200 of them at the default rate


@pytest.fixture(scope="module")
def healthy_p95(daemon: Daemon) -> float:
    """The slower of two windows of a healthy day."""
    return max(daemon.p95(WINDOW), daemon.p95(WINDOW))


@pytest.fixture(params=sorted(BUILT_IN))
def run(request: pytest.FixtureRequest, operator: Operator) -> str:
    return str(request.param)


def begin(operator: Operator, mode: str) -> int:
    """Asks for a mode and waits until it is witnessed; the id of the run."""
    last = operator.last_run().get("id", 0)
    operator.set(mode=mode)
    eventually(
        lambda: operator.last_run().get("id", 0) > last and operator.last_run()["witnessed_at"], f"{mode} is witnessed", 20
    )
    return last


def test_an_incident_is_witnessed_in_time_and_leaves_nothing_behind(
    run: str, daemon: Daemon, operator: Operator, healthy_p95: float
) -> None:
    incident, before = BUILT_IN[run], operator.fingerprint()
    last = begin(operator, run)
    witnessed = operator.last_run()
    assert (witnessed["witnessed_at"] - witnessed["injected_at"]).total_seconds() < incident.witness_within
    assert witnessed["outcome"] is None and witnessed["evidence"]
    if run != "pool_exhaustion":
        assert eventually(lambda: daemon.p95(WINDOW) > 20 * healthy_p95, "payments are 20 times slower", 20)

    operator.set(mode="normal")
    over = operator.finished(last)
    assert (over["outcome"], over["error"], over["residue"]) == ("recovered", None, None)
    assert over["requested_at"] <= over["injected_at"] <= over["witnessed_at"] <= over["mitigated_at"] <= over["recovered_at"]
    assert over["fingerprint_before"].keys() == over["fingerprint_after"].keys()
    assert operator.fingerprint() == before
    assert daemon.value("incidentd_evidence_visible") == 0
    eventually(lambda: daemon.p95(WINDOW) < 1.5 * healthy_p95, "payments are as fast as before", 60)


def test_pool_exhaustion_fails_payments_while_the_server_is_calm(daemon: Daemon, operator: Operator) -> None:
    last = begin(operator, "pool_exhaustion")
    eventually(lambda: daemon.value("payment_errors_total", reason="pool_timeout") > 20, "payments time out at the pool")
    assert daemon.value("db_client_connection_count", state="used") == daemon.value("db_client_connection_max") == 10
    assert daemon.value("db_client_connection_pending_requests") > 20
    assert daemon.value("db_client_connection_timeouts_total") > 20
    sessions = "SELECT count(*) AS n FROM pg_stat_activity WHERE usename = 'payments_app'"
    assert operator.rows(f"{sessions} AND wait_event_type = 'Lock'")[0]["n"] == 0
    assert operator.rows(f"{sessions} AND state = 'active'")[0]["n"] <= 2
    operator.set(mode="normal")
    assert operator.finished(last)["outcome"] == "recovered"


def test_one_incident_follows_another_without_a_normal_between(operator: Operator) -> None:
    last = begin(operator, "missing_index")
    second = begin(operator, "lock_contention")
    assert operator.finished(last)["outcome"] == "recovered"
    assert operator.rows("SELECT to_regclass('payments_reference_idx') IS NOT NULL AS there")[0]["there"]
    operator.set(mode="normal")
    assert operator.finished(second)["mode"] == "lock_contention"


def test_the_catalog_is_in_the_database_as_in_the_files(operator: Operator) -> None:
    rows = {row["name"]: row for row in operator.rows("TABLE incidentd.incident")}
    assert rows.keys() == BUILT_IN.keys()
    for name, incident in BUILT_IN.items():
        assert rows[name]["sha256"] == incident.sha256
        assert rows[name]["traps"] == incident.front.traps
        assert rows[name]["signals"]["promql"] == incident.front.signals.promql
        assert json.dumps(rows[name]["refusal"]) == "null"
