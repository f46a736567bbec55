"""SIGKILL at random moments: a seeded sample of what `python tests/kill_trials.py` does as often as it is asked to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kill_trials import Bench, bench, plan

SEED = 20261124
TRIALS = 24


@pytest.fixture(scope="module")
def made() -> Iterator[Bench]:
    with bench() as one:
        yield one


@pytest.mark.parametrize(("mode", "phase", "delay"), plan(TRIALS, SEED))
def test_the_next_start_undoes_everything(made: Bench, mode: str, phase: str, delay: float) -> None:
    trial = made.trial(mode, phase, delay)
    assert trial.left == ()
    assert trial.outcome in ("interrupted", "recovered", "not_witnessed")
