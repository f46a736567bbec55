"""Kills the daemon at random moments of an incident and looks whether the next start has undone everything.

    python tests/kill_trials.py --trials 300 --seed 1

prints a row for each incident and phase; exit code 1 if anything was left behind in any trial. The phases: `inject` kills
within moments of the request, `run` while the incident is on, `recover` within moments of the request for normal.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import make_conninfo
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support import Daemon, Operator, eventually

from incidentd import catalog
from incidentd.postgres import Cluster

OWN_INCIDENTS = Path(__file__).parent / "incidents"
PAYMENTS = 500_000  # so many that an index takes long enough to be killed in
PHASES = {"inject": 0.06, "run": 2.0, "recover": 0.3}  # seconds within which the kill comes


@dataclass(frozen=True)
class Trial:
    """What was done, and what came of it: `left` names what differs afterwards, `outcome` is None if there was no run."""

    mode: str
    phase: str
    delay: float
    outcome: str | None
    left: tuple[str, ...]
    seconds: float


@dataclass
class Bench:
    """A server and the daemon on it that is alive now."""

    dsn: str
    directory: Path
    daemon: Daemon

    def start(self) -> None:
        """The next daemon, which recovers what the last one left."""
        self.daemon = Daemon(self.daemon.arguments, self.directory / "daemon").start()

    def trial(self, mode: str, phase: str, delay: float) -> Trial:
        """One kill: request, wait, SIGKILL, start again, compare."""
        person = Operator(self.dsn)
        with contextlib.closing(person):
            before, last = person.fingerprint(), person.last_run().get("id", 0)
            person.set(mode=mode)
            if phase != "inject":
                begun = "the incident is on"
                eventually(
                    lambda: person.last_run().get("id", 0) > last and person.last_run()["injected_at"], begun, every=0.01
                )
            if phase == "recover":
                person.set(mode="normal")
            time.sleep(delay)  # the random moment itself
            self.daemon.stop(signal.SIGKILL)
            query = "SELECT id FROM incidentd.incident_log WHERE id > %s"
            served = person.rows(query, last)
            begun_again = time.monotonic()
            self.start()
            unfinished = "EXISTS (SELECT FROM incidentd.incident_log WHERE outcome IS NULL)"
            done = f"SELECT mode = 'normal' AND NOT {unfinished} AS done FROM demo_control"
            if not served:  # killed before it had begun: the next daemon serves the request
                eventually(lambda: person.rows(query, last), "the request is served")
                person.set(mode="normal")
            eventually(lambda: person.rows(done)[0]["done"], "everything is recovered", 60)
            seconds = time.monotonic() - begun_again
            after, run = person.fingerprint(), person.last_run()
            changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
            return Trial(mode, phase, delay, run.get("outcome"), (*changed, *(run.get("residue") or ())), seconds)


@contextlib.contextmanager
def bench() -> Iterator[Bench]:
    """A server of its own with a daemon on it, both gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="incidentd-kill-"))
    directory.chmod(0o755)
    cluster = Cluster(directory / "server", durable=False)
    cluster.start()
    dsn = make_conninfo(**cluster.connection)
    arguments = ("--dsn", dsn, "--payments", str(PAYMENTS), "--incidents", str(OWN_INCIDENTS))
    made = Bench(dsn, directory, Daemon(arguments, directory / "daemon").start())
    try:
        yield made
    finally:
        made.daemon.stop()
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


def plan(trials: int, seed: int) -> list[tuple[str, str, float]]:
    """Modes and phases in turn, each with a random moment."""
    chance = random.Random(seed)
    modes = sorted(catalog.load(catalog.incident_files(catalog.incident_directories((OWN_INCIDENTS,)))).incidents)
    cases = [(mode, phase) for phase in PHASES for mode in modes]
    return [(*cases[n % len(cases)], chance.uniform(0, PHASES[cases[n % len(cases)][1]])) for n in range(trials)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    with bench() as made:
        trials = [
            made.trial(*case) for case in track(plan(chosen.trials, chosen.seed), "killing", console=Console(stderr=True))
        ]
    table = Table("incident", "phase", "trials", "clean", "outcomes", "slowest recovery")
    for mode, phase in dict.fromkeys((trial.mode, trial.phase) for trial in trials):
        own = [trial for trial in trials if (trial.mode, trial.phase) == (mode, phase)]
        outcomes = ", ".join(
            f"{count} {outcome}" for outcome, count in sorted(Counter(str(trial.outcome) for trial in own).items())
        )
        clean = sum(not trial.left for trial in own)
        table.add_row(mode, phase, str(len(own)), str(clean), outcomes, f"{max(trial.seconds for trial in own):.1f} s")
    Console(width=120).print(table)
    dirty = [trial for trial in trials if trial.left]
    for trial in dirty:
        print(trial)
    print(f"{len(trials) - len(dirty)} of {len(trials)} clean")
    return 1 if dirty else 0


if __name__ == "__main__":
    sys.exit(main())
