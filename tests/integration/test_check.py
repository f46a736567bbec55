"""`check`: what a real server finds wrong with a file beyond its grammar, and on which line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import incidentd

SOUND = """/*---
title    = "Somebody scores"
category = "locks"
severity = "low"
cause    = "A scorer."
fix      = "None."

[actor.scorer]
sessions         = 1
role             = "fraud_scorer"
application_name = "fraud-scorer"

[params]
least = 10
---*/

-- name: inject
SELECT count(*) AS before FROM payments;
ALTER TABLE payments SET (autovacuum_enabled = false);

-- name: recover
ALTER TABLE payments RESET (autovacuum_enabled);

-- name: scorer
BEGIN;
SELECT id AS found FROM payments WHERE amount > :least
   AND merchant_id = :merchant_id;
-- think: 1s
SELECT name FROM merchants WHERE id = :found;
COMMIT;

-- name: evidence
SELECT :before::bigint >= 0 AS visible;
"""


def check(tmp_path: Path, text: str) -> tuple[int, list[str]]:
    file = tmp_path / "scoring.sql"
    file.write_text(text)
    done = incidentd("check", str(file))
    assert "Traceback" not in done.stderr
    return done.returncode, [line.removeprefix(f"{file}:") for line in (done.stdout + done.stderr).splitlines()]


def test_the_built_in_catalog_is_sound() -> None:
    done = incidentd("check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3 incident files are sound\n", "")


def test_a_sound_file_is_sound(tmp_path: Path) -> None:
    assert check(tmp_path, SOUND) == (0, ["1 incident file is sound"])


# What is changed in the sound file, and the line and the words that tell of it.
CASES = [
    ("   AND merchant_id", "   AND merchant", 27, 'column "merchant" does not exist'),
    ("SELECT name FROM", "SELCT name FROM", 29, 'syntax error at or near "SELCT"'),
    (
        ":found;",
        ":lost;",
        29,
        ":lost is unknown here: it is neither supplied, nor in [params], nor a column of a statement before",
    ),
    ("BEGIN;\n", "BEGIN;\nDELETE FROM payments;\n", 26, "permission denied for table payments"),
    ("AS visible", "AS seen", 33, 'evidence must return one row with a boolean column "visible"'),
    (":before::bigint >= 0 AS", "1 AS", 33, 'evidence must return one row with a boolean column "visible"'),
    ('"fraud_scorer"', '"nobody_known"', 24, 'section scorer cannot run as its role: role "nobody_known" does not exist'),
    (
        "RESET (autovacuum_enabled)",
        "RESET (autovacuum_enabld)",
        21,
        "recover leaves something behind: table public.payments was",
    ),
    (
        "ALTER TABLE payments SET (",
        "ALTER TABLE paymens SET (",
        19,
        'inject fails when it runs: relation "paymens" does not exist',
    ),
    (
        "ALTER TABLE payments RESET (autovacuum_enabled);",
        "CREATE INDEX twice ON payments (amount);",
        22,
        "recover fails when it runs: relation",
    ),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What one `check` of all the cases' files says of each, by the file's stem."""
    directory = tmp_path_factory.mktemp("cases")
    for number, (old, new, _, _) in enumerate(CASES):
        assert SOUND.count(old) == 1, old
        (directory / f"case_{number}.sql").write_text(SOUND.replace(old, new))
    done = incidentd("check", str(directory))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said: dict[str, list[str]] = {}
    for line in done.stderr.splitlines():
        stem, _, words = line.removeprefix(f"{directory}/").partition(".sql:")
        said.setdefault(stem, []).append(words)
    return said


@pytest.mark.parametrize("number", range(len(CASES)), ids=[new.strip() for _, new, _, _ in CASES])
def test_what_is_wrong_is_told_with_its_line(told: dict[str, list[str]], number: int) -> None:
    _, _, line, words = CASES[number]
    (said,) = told[f"case_{number}"]
    assert said.startswith(f"{line}: {words}")


def test_every_file_is_told_of_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.sql").write_text(SOUND.replace("SELECT name", f"SELECT {name}"))
    done = incidentd("check", str(tmp_path))
    assert done.returncode == 1
    assert [line.split("/")[-1].split(":")[0] for line in done.stderr.splitlines()] == ["one.sql", "two.sql"]
