"""A real Prometheus scrapes the daemon, exemplars included, and answers the questions that an investigator asks.

Needs a `prometheus` on the PATH; .ci/run gets one and sets INCIDENTD_REQUIRE_PROMETHEUS, so CI cannot skip this.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from otlp_receiver import Receiver
from psycopg.conninfo import make_conninfo
from support import Daemon, Operator, environment, eventually, running

from incidentd.postgres import Cluster

PROGRAM = shutil.which("prometheus")
REQUIRED = bool(os.environ.get("INCIDENTD_REQUIRE_PROMETHEUS"))
pytestmark = pytest.mark.skipif(PROGRAM is None and not REQUIRED, reason="there is no prometheus on the PATH")

CONFIGURATION = """
global: {scrape_interval: 1s}
scrape_configs:
  - job_name: sample-app
    static_configs: [{targets: ["%s"], labels: {service: payment-service}}]
"""


class Prometheus:
    """A running Prometheus."""

    def __init__(self, directory: Path, target: str) -> None:
        assert PROGRAM is not None, "INCIDENTD_REQUIRE_PROMETHEUS is set and there is no prometheus on the PATH"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "prometheus.yml").write_text(CONFIGURATION % target)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._process = subprocess.Popen(
            [
                PROGRAM,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={self._url.removeprefix('http://')}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, path: str, **parameters: object) -> Any:
        """The data of an answer of the HTTP interface, None while there is none."""
        try:
            with urllib.request.urlopen(f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=5) as answer:
                return json.load(answer)["data"]
        except OSError:
            return None

    def value(self, query: str) -> float:
        """A query's first value, NaN without one."""
        data = self.ask("query", query=query)
        return float(data["result"][0]["value"][1]) if data and data["result"] else float("nan")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver().start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(scratch: Path) -> Iterator[Cluster]:
    with running(Cluster(scratch / "scraped", durable=False)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def daemon(server: Cluster, scratch: Path, receiver: Receiver) -> Iterator[Daemon]:
    own = environment(OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{receiver.http_port}", OTEL_TRACES_SAMPLER="always_on")
    arguments = ("--dsn", make_conninfo(**server.connection), "--payments", "20000")
    started = Daemon(arguments, scratch / "scraped-daemon", own).start()
    yield started
    assert started.stop() == 0


@pytest.fixture(scope="module")
def prometheus(daemon: Daemon, scratch: Path) -> Iterator[Prometheus]:
    made = Prometheus(scratch / "prometheus", urllib.parse.urlsplit(daemon.url).netloc)
    yield made
    made.close()


def test_the_daemon_is_scraped_and_its_rate_is_what_demo_control_says(prometheus: Prometheus) -> None:
    eventually(lambda: prometheus.value('up{job="sample-app",service="payment-service"}') == 1, "the target is up")
    eventually(lambda: 40 < prometheus.value("sum(rate(payment_requests_total[10s]))") < 60, "about 50 payments a second", 40)
    p95 = "histogram_quantile(0.95, sum by (le) (rate(payment_duration_seconds_bucket[10s])))"
    eventually(lambda: 0 < prometheus.value(p95) < 0.1, "payments are fast", 40)


def test_exemplars_lead_to_traces_that_were_sent(prometheus: Prometheus, receiver: Receiver) -> None:
    def found() -> set[str]:
        now = time.time()
        data = prometheus.ask("query_exemplars", query="payment_duration_seconds_bucket", start=now - 60, end=now)
        return {one["labels"]["trace_id"] for series in data or () for one in series["exemplars"]}

    exemplars = eventually(found, "Prometheus has exemplars")
    eventually(lambda: exemplars <= {span.trace_id for span in list(receiver.spans)}, "each trace was sent")


def test_an_exhausted_pool_is_seen_in_prometheus(prometheus: Prometheus, server: Cluster) -> None:
    signal = "sum(db_client_connection_pending_requests) > 5"
    person = Operator(make_conninfo(**server.connection))
    assert prometheus.ask("query", query=signal)["result"] == []
    person.set(mode="pool_exhaustion")
    eventually(lambda: prometheus.ask("query", query=signal)["result"], "requests wait for connections")
    errors = 'sum(rate(payment_errors_total{reason="pool_timeout"}[10s]))'
    eventually(lambda: prometheus.value(errors) > 1, "payments fail")
    eventually(lambda: prometheus.value('incidentd_mode{mode="pool_exhaustion"}') == 1, "the harness says so too")
    person.set(mode="normal")
    eventually(lambda: not prometheus.ask("query", query=signal)["result"], "nobody waits any more")
    person.close()
