"""demo_control: what it takes, what it refuses and why, and how the daemon follows it."""

from __future__ import annotations

import psycopg
import pytest
from support import Daemon, Operator, eventually


@pytest.mark.parametrize("mode", ["nonsense", "", "NORMAL", "missing_index ", "x'; DROP TABLE payments; --", "é" * 100_000])
def test_an_unknown_mode_is_refused_with_the_valid_ones(operator: Operator, mode: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="there is no mode") as refused:
        operator.set(mode=mode)
    assert refused.value.diag.message_hint == "The modes are: normal, lock_contention, missing_index, pool_exhaustion"
    assert len(refused.value.diag.message_primary or "") < 200
    assert operator.control()["mode"] == "normal"


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("mode", None, "there is no mode null"),
        ("rate", 0, "rate must be payments per second"),
        ("rate", -1, "rate must be payments per second"),
        ("rate", float("nan"), "rate must be payments per second"),
        ("rate", float("inf"), "rate must be payments per second"),
        ("rate", None, "rate must be payments per second"),
        ("ttl", "0", "ttl must be more than 0"),
        ("ttl", "-1 minute", "ttl must be more than 0"),
        ("ttl", "2 years", "ttl must be more than 0"),
        ("blind", None, "blind must be true or false"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_the_reason(
    operator: Operator, column: str, value: object, said: str
) -> None:
    before = operator.control()
    with pytest.raises(psycopg.Error, match=said):
        operator.set(**{column: value})
    assert operator.control() == before


@pytest.mark.parametrize(
    "statement", ["DELETE FROM demo_control", "TRUNCATE demo_control", "INSERT INTO demo_control DEFAULT VALUES"]
)
def test_the_row_can_only_be_updated(operator: Operator, statement: str) -> None:
    with pytest.raises(psycopg.Error, match="demo_control has exactly one row: UPDATE it"):
        operator.rows(statement)


def test_who_changed_it_and_when_is_kept(operator: Operator) -> None:
    operator.set(rate=51)
    first = operator.control()
    operator.rows("SET application_name = 'runbook'")
    operator.set(rate=52)
    second = operator.control()
    assert (first["updated_by"], second["updated_by"]) == ("demo", "demo via runbook")
    assert second["updated_at"] > first["updated_at"]
    assert second["requested_at"] == first["requested_at"], "a new rate is no new request for the mode"


def test_a_connected_daemon_means_no_warning(operator: Operator) -> None:
    operator.set(rate=50)
    assert operator.notices == []


def test_the_rate_is_followed_at_once(daemon: Daemon, operator: Operator) -> None:
    operator.set(rate=400)
    begun = daemon.value("payment_requests_total")
    eventually(lambda: daemon.value("payment_requests_total") - begun > 1000, "400 payments a second flow", 10)


def test_a_mode_ends_by_itself_after_its_ttl(operator: Operator) -> None:
    last = operator.last_run().get("id", 0)
    operator.set(mode="lock_contention", ttl="5 seconds")
    over = operator.finished(last, 30)
    assert over["outcome"] in ("recovered", "not_witnessed")
    lasted = (over["mitigated_at"] - over["requested_at"]).total_seconds()
    assert 5 <= lasted < 10
    eventually(lambda: operator.control()["mode"] == "normal", "the row is back to normal")


def test_a_run_that_ended_before_its_evidence_is_not_witnessed(operator: Operator) -> None:
    last = operator.last_run().get("id", 0)
    operator.set(mode="pool_exhaustion")
    eventually(lambda: operator.last_run().get("id", 0) > last, "the run is begun", every=0.01)
    operator.set(mode="normal")
    over = operator.finished(last)
    assert (over["outcome"], over["witnessed_at"], over["residue"]) == ("not_witnessed", None, None)


def test_modes_asked_for_in_quick_succession_end_in_the_last_one(operator: Operator) -> None:
    last = operator.last_run().get("id", 0)
    for mode in ["missing_index", "lock_contention", "normal"] * 10 + ["missing_index"]:
        operator.set(mode=mode)
    eventually(
        lambda: operator.last_run()["mode"] == "missing_index" and operator.last_run()["witnessed_at"], "the last mode is on"
    )
    runs = operator.rows("SELECT * FROM incidentd.incident_log WHERE id > %s ORDER BY id", last)
    assert all(run["outcome"] for run in runs[:-1]), "one run at a time"
    assert operator.control()["mode"] == "missing_index"


@pytest.mark.parametrize("role", ["investigator", "payments_app", "bi_reader", "migrator"])
def test_the_roles_of_the_story_see_the_payments_and_none_of_the_control_plane(operator: Operator, role: str) -> None:
    operator.rows(f"SET ROLE {role}")
    assert operator.rows("SELECT count(*) AS n FROM payments WHERE id < 10")[0]["n"] == 9
    for table in (
        "demo_control",
        "incidentd.demo_control",
        "incidentd.incident",
        "incidentd.incident_log",
        "incidentd.installation",
    ):
        with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable)):
            operator.rows(f"TABLE {table}")
    operator.rows("RESET ROLE")


def test_nobody_in_the_story_is_a_superuser(operator: Operator) -> None:
    applications = ["payments-api", "settlement-worker", "outbox-publisher", "metabase"]
    sessions = operator.rows("SELECT usename FROM pg_stat_activity WHERE application_name = ANY (%s)", applications)
    users = {row["usename"] for row in sessions}
    assert users == {"payments_app", "settlement_app", "outbox_publisher", "bi_reader"}
    assert operator.rows("SELECT rolname FROM pg_roles WHERE rolsuper AND rolname = ANY (%s)", list(users)) == []


def test_no_session_carries_the_name_of_the_tool(operator: Operator) -> None:
    names = {row["application_name"] for row in operator.rows("SELECT application_name FROM pg_stat_activity")}
    assert not [name for name in names if "incident" in name]
