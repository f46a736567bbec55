"""Metrics: the names that dashboards rely on, and the server that shows them."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from psycopg_pool import AsyncConnectionPool

from incidentd.errors import SettingsError
from incidentd.metrics import Metrics

LOOPBACK = "127.0.0.1"

# DESIGN §6: family, type, labels.
CONTRACT = [
    ("payment_requests_total", "counter", set()),
    ("payment_errors_total", "counter", {"reason", "sqlstate"}),
    ("payment_skipped_total", "counter", set()),
    ("payment_duration_seconds_bucket", "histogram", {"le"}),
    ("payment_duration_seconds_count", "histogram", set()),
    ("payment_duration_seconds_sum", "histogram", set()),
    ("payment_schedule_lag_seconds_bucket", "histogram", {"le"}),
    ("db_client_connection_count", "gauge", {"state"}),
    ("db_client_connection_max", "gauge", set()),
    ("db_client_connection_pending_requests", "gauge", set()),
    ("db_client_connection_wait_time_seconds_bucket", "histogram", {"le"}),
    ("db_client_connection_timeouts_total", "counter", set()),
]


class BusyPool:
    """A pool that needs no server to be busy."""

    max_size = 10

    def get_stats(self) -> dict[str, int]:
        return {"pool_size": 8, "pool_available": 3, "requests_waiting": 4, "requests_errors": 5}


@pytest.fixture
def metrics() -> Metrics:
    """Metrics of a daemon that has seen everything once."""
    made = Metrics()
    made.payment_begun(0.003)
    made.payment_ended(0.02)
    made.payment_error("pool_timeout", "")
    made.payment_skipped()
    made.pool_wait(0.5)
    made.watch_pool(BusyPool())
    made.harness.entered("lock_contention", 0.4)
    return made


def exposition(metrics: Metrics) -> str:
    return generate_latest(metrics.registry).decode()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


@pytest.mark.parametrize(("name", "kind", "labels"), CONTRACT, ids=[row[0] for row in CONTRACT])
def test_a_metric_has_the_name_the_type_and_the_labels_of_the_contract(
    metrics: Metrics, name: str, kind: str, labels: set[str]
) -> None:
    found = [
        (family.type, set(sample.labels))
        for family in text_string_to_metric_families(exposition(metrics))
        for sample in family.samples
        if sample.name == name
    ]
    assert found and all(each == (kind, labels) for each in found)


def test_counters_without_labels_are_there_from_the_start() -> None:
    fresh = Metrics()
    names = (
        "payment_requests_total",
        "payment_skipped_total",
        "payment_duration_seconds_count",
        "payment_schedule_lag_seconds_count",
    )
    assert [value(fresh, name) for name in names] == [0.0] * 4


def test_no_name_ends_in_created(metrics: Metrics) -> None:
    assert "_created" not in exposition(metrics)


def test_what_happens_to_a_payment_is_counted(metrics: Metrics) -> None:
    metrics.payment_error("sql", "40P01")
    metrics.payment_error("sql", "40P01")
    assert value(metrics, "payment_requests_total") == 1
    assert value(metrics, "payment_errors_total", reason="pool_timeout", sqlstate="") == 1
    assert value(metrics, "payment_errors_total", reason="sql", sqlstate="40P01") == 2
    assert value(metrics, "payment_skipped_total") == 1
    assert value(metrics, "payment_schedule_lag_seconds_sum") == pytest.approx(0.003)
    assert value(metrics, "payment_duration_seconds_sum") == pytest.approx(0.02)
    assert value(metrics, "db_client_connection_wait_time_seconds_sum") == pytest.approx(0.5)


def test_a_pool_is_shown_by_its_own_figures(metrics: Metrics) -> None:
    assert value(metrics, "db_client_connection_count", state="idle") == 3
    assert value(metrics, "db_client_connection_count", state="used") == 5
    assert value(metrics, "db_client_connection_max") == 10
    assert value(metrics, "db_client_connection_pending_requests") == 4
    assert value(metrics, "db_client_connection_timeouts_total") == 5


def test_the_real_pool_has_the_figures_that_are_asked_of_it() -> None:
    metrics = Metrics()
    metrics.watch_pool(AsyncConnectionPool("", open=False, min_size=0, max_size=7))
    assert value(metrics, "db_client_connection_max") == 7
    assert value(metrics, "db_client_connection_count", state="idle") == 0
    assert value(metrics, "db_client_connection_timeouts_total") == 0


def test_durations_are_told_by_bucket_and_not_cumulated() -> None:
    metrics = Metrics()
    seconds = (0.0001, 0.02, 0.02, 0.02, 3.0, 1000.0)
    for each in seconds:
        metrics.payment_ended(each)
    counts = metrics.duration_counts()
    assert list(counts) == sorted(counts) and list(counts)[-1] == float("inf")
    for each in seconds:
        bound = min(bound for bound in counts if bound >= each)
        assert counts[bound] == sum(1 for other in seconds if min(b for b in counts if b >= other) == bound)
    assert sum(counts.values()) == len(seconds)


# -- the harness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        'incidentd_mode{mode="lock_contention"} 1.0',
        'incidentd_transitions_total{mode="lock_contention"} 1.0',
        "incidentd_evidence_visible ",
        "incidentd_residue ",
        "incidentd_control_connected ",
        "incidentd_event_loop_lag_seconds_count ",
    ],
)
def test_the_harness_shows_itself_under_its_own_prefix(metrics: Metrics, name: str) -> None:
    assert f"\n{name}" in exposition(metrics)


def test_only_the_mode_of_the_moment_is_shown(metrics: Metrics) -> None:
    metrics.harness.entered("normal", 0.1)
    assert value(metrics, "incidentd_mode", mode="normal") == 1
    assert value(metrics, "incidentd_mode", mode="lock_contention") is None
    assert value(metrics, "incidentd_transitions_total", mode="lock_contention") == 1


def test_a_blind_daemon_shows_nothing_of_the_harness_and_a_seeing_one_does_again(metrics: Metrics) -> None:
    seen = exposition(metrics)
    metrics.harness.blind = True
    hidden = exposition(metrics)
    assert "incidentd" not in hidden and "lock_contention" not in hidden
    assert "payment_requests_total 1.0" in hidden
    metrics.harness.blind = False
    names = [line.split(" ")[0] for line in seen.splitlines()]
    assert [line.split(" ")[0] for line in exposition(metrics).splitlines()] == names


# -- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield int(listener.getsockname()[1])


def test_port_0_serves_the_metrics_on_a_free_port_until_closed(metrics: Metrics) -> None:
    serving = metrics.serve(LOOPBACK, 0)
    try:
        assert serving.port > 0
        with urllib.request.urlopen(f"http://{LOOPBACK}:{serving.port}/metrics", timeout=5) as answer:
            assert answer.status == 200
            assert "payment_requests_total 1.0" in answer.read().decode()
    finally:
        serving.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((LOOPBACK, serving.port), timeout=5).close()


def test_two_daemons_do_not_share_a_count(metrics: Metrics) -> None:
    assert value(metrics, "payment_requests_total") == 1
    assert value(Metrics(), "payment_requests_total") == 0


def test_a_port_in_use_is_refused_with_the_remedy(taken: int) -> None:
    with pytest.raises(SettingsError) as caught:
        Metrics().serve(LOOPBACK, taken)
    told = str(caught.value)
    assert told.startswith(f"cannot serve metrics on {LOOPBACK}:{taken}: ") and "\n" not in told
    assert "--metrics-port" in told


# An address of the documentation's (RFC 5737), which no machine has, and names that are none; no name server is asked.
@pytest.mark.parametrize("address", ["192.0.2.1", "a..b", "a" * 64, "\udcff"])
def test_an_address_that_is_not_to_be_had_is_refused_with_the_remedy(address: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Metrics().serve(address, 0)
    assert "--metrics-addr" in str(caught.value) and "\n" not in str(caught.value)


def test_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="port"):
        Metrics().serve(LOOPBACK, 65536)
