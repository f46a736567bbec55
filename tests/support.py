"""What tests of a running daemon need: the process, its metrics, and waiting with a bound."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from prometheus_client.parser import text_string_to_metric_families
from psycopg.rows import DictRow, dict_row

from incidentd.postgres import Cluster

T = TypeVar("T")

Buckets = dict[float, float]


def eventually(probe: Callable[[], T], what: str, seconds: float = 30, every: float = 0.1) -> T:
    """The first truthy answer of `probe`; fails, saying `what` did not happen, after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = probe()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}; last answer: {answer!r}"
        time.sleep(every)


def environment(**own: str) -> dict[str, str]:
    """This process's environment without anything that would choose a database."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PG", "INCIDENTD"))} | own


def incidentd(*arguments: str, timeout: float = 60, **own: str) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "incidentd", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**own),
        check=False,
    )


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one sentence with which a command refused; fails when it did anything else."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """A server for the time of a block."""
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


@dataclass
class Daemon:
    """A daemon in a process of its own, on a free metrics port."""

    arguments: tuple[str, ...]
    directory: Path
    environment: dict[str, str] = field(default_factory=environment)
    process: subprocess.Popen[bytes] = field(init=False)
    url: str = field(init=False, default="")

    def start(self, seconds: float = 60) -> Daemon:
        """Runs the daemon and waits until payments flow."""
        self.launch()
        try:
            eventually(self._announced, "the daemon says that payments flow", seconds)
        except BaseException:
            self.stop(signal.SIGKILL)
            raise
        return self

    def launch(self) -> None:
        """Runs the daemon."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.log, "wb") as out, open(self.errors, "wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "incidentd", "--metrics-port", "0", "--log-format", "json", *self.arguments],
                stdout=out,
                stderr=err,
                env=self.environment,
                start_new_session=True,
            )

    def _announced(self) -> bool:
        said = self.errors.read_text()
        assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}: {said}"
        found = re.search(r"metrics: (http://\S+)", said)
        self.url = found[1] if found else ""
        return bool(found)

    @property
    def log(self) -> Path:
        return self.directory / "stdout"

    @property
    def errors(self) -> Path:
        return self.directory / "stderr"

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log records of one event."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line.get("event") == name]

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """Every sample of the metrics, by name and labels."""
        with urllib.request.urlopen(self.url, timeout=5) as answer:
            text = answer.read().decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of one name that carry `labels`."""
        return sum(
            value for (found, of), value in self.samples().items() if found == name and labels.items() <= dict(of).items()
        )

    def succeeded(self) -> float:
        """Payments that did not fail so far."""
        return self.value("payment_requests_total") - self.value("payment_errors_total")

    def durations(self) -> Buckets:
        """payment_duration_seconds: upper bound to cumulated count."""
        return {
            float(dict(labels)["le"]): value
            for (name, labels), value in self.samples().items()
            if name == "payment_duration_seconds_bucket"
        }

    def p95(self, seconds: float) -> float:
        """The 95th percentile, in seconds, of the payments that end within the next `seconds`."""
        before = self.durations()
        time.sleep(seconds)  # a window of observation, not a hope
        return quantile(0.95, before, self.durations())

    def stop(self, number: int = signal.SIGTERM, seconds: float = 15) -> int:
        """Ends the daemon and returns its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


def quantile(part: float, before: Buckets, after: Buckets) -> float:
    """Prometheus's histogram_quantile of what came between two readings."""
    counts = {bound: after[bound] - before.get(bound, 0) for bound in sorted(after)}
    rank, low, below = part * counts[float("inf")], 0.0, 0.0
    assert rank > 0, "no payment ended"
    for bound, count in counts.items():
        if count >= rank:
            return low if bound == float("inf") else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    raise AssertionError("unreachable")


class Operator:
    """Somebody with psql: asks for modes and reads the ground truth."""

    def __init__(self, conninfo: str) -> None:
        self.notices: list[str] = []
        self.conn = psycopg.connect(conninfo, autocommit=True, row_factory=dict_row)
        self.conn.add_notice_handler(lambda notice: self.notices.append(f"{notice.severity}: {notice.message_primary}"))

    def rows(self, query: str, *values: object) -> list[DictRow]:
        cursor = self.conn.execute(query, values)  # type: ignore[call-overload]
        return [] if cursor.description is None else cursor.fetchall()

    def set(self, **columns: object) -> None:
        """UPDATE demo_control."""
        assignments = ", ".join(f"{name} = %s" for name in columns)
        self.conn.execute(f"UPDATE demo_control SET {assignments}", list(columns.values()))  # type: ignore[arg-type]

    def control(self) -> DictRow:
        return self.rows("TABLE demo_control")[0]

    def last_run(self) -> DictRow:
        rows = self.rows("SELECT * FROM incidentd.incident_log ORDER BY id DESC LIMIT 1")
        return rows[0] if rows else {}

    def finished(self, after: int, seconds: float = 60) -> DictRow:
        """The first run with an id above `after` that has an outcome."""
        query = "SELECT * FROM incidentd.incident_log WHERE id > %s AND outcome IS NOT NULL ORDER BY id LIMIT 1"
        return eventually(lambda: self.rows(query, after), f"a run after {after} is finished", seconds)[0]

    def fingerprint(self) -> dict[str, str]:
        """The database as it stands, by the project's own query; without the sizes, which grow with the payments."""
        query = (Path(__file__).parents[1] / "sql" / "fingerprint.sql").read_text()
        found = self.rows(query.partition("-- name: fingerprint")[2].replace("%", "%%"))[0]["fingerprint"]
        return {name: definition for name, definition in found.items() if not name.startswith("size of ")}

    def close(self) -> None:
        self.conn.close()
