"""The catalog: what front matter and sections mean, and what is refused, with its line."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incidentd import catalog
from incidentd.catalog import SUPPLIED, Cast, Catalog, Incident
from incidentd.errors import SqlFileError
from incidentd.sqltext import Think, parse_sections

BUILT_IN = sorted((catalog.sql_directory() / "incidents").glob("*.sql"))
NORMAL = catalog.sql_directory() / "normal.sql"

SOUND = """/*---
title    = "Somebody scores"
category = "locks"
severity = "high"
cause    = "A scorer."
fix      = "None."
traps    = ["waiting"]
witness_within = "2s"

[actor.scorer]
sessions         = 2
role             = "fraud_scorer"
application_name = "fraud-scorer"

[actor.settlement]
sessions = 3

[params]
least = 10

[signals]
promql = ["up > 0"]
logql  = []
---*/

-- name: inject
SELECT 1;

-- name: recover
SELECT 2;

-- name: evidence
SELECT true AS visible;

-- name: scorer
SELECT :least;
"""

# The least that an incident can be: its evidence shows or it does not.
LEAST = """/*---
title    = "Nothing"
category = "locks"
severity = "low"
cause    = "None."
fix      = "None."
{front}
---*/
-- name: evidence
SELECT true AS visible;
{sections}
"""


def least(front: str = "", sections: str = "") -> str:
    return LEAST.format(front=front, sections=sections)


def changed(old: str, new: str) -> str:
    """The sound file with one thing changed."""
    assert SOUND.count(old) == 1, old
    return SOUND.replace(old, new)


def load(directory: Path, text: str, name: str = "scoring.sql") -> Catalog:
    file = directory / name
    file.write_text(text, encoding="utf-8")
    return catalog.load([file])


def incident(directory: Path, text: str) -> Incident:
    return load(directory, text).incidents["scoring"]


def faults(directory: Path, text: str, name: str = "scoring.sql") -> list[tuple[int, str]]:
    with pytest.raises(SqlFileError) as caught:
        load(directory, text, name)
    assert {fault.path for fault in caught.value.faults} == {directory / name}
    return [(fault.line, fault.message) for fault in caught.value.faults]


def fault(directory: Path, text: str, name: str = "scoring.sql") -> tuple[int, str]:
    (only,) = faults(directory, text, name)
    return only


@pytest.fixture(scope="module")
def normal() -> Cast:
    return catalog.load([]).normal


# -- what is loaded ---------------------------------------------------------------------------------------------------


def test_the_built_in_catalog_loads() -> None:
    loaded = catalog.load(catalog.incident_files(catalog.incident_directories()))
    assert {"lock_contention", "missing_index", "pool_exhaustion"} <= set(loaded.incidents)
    for name, each in loaded.incidents.items():
        assert name == each.name == each.path.stem
        assert each.evidence.statements
        assert set(loaded.normal) <= set(each.cast)


def test_the_healthy_day_has_the_actors_of_normal_sql_and_nothing_else(normal: Cast) -> None:
    sections = {section.name: section for section in parse_sections(NORMAL.read_text(encoding="utf-8"), NORMAL)}
    assert {name: actor.script for name, actor in normal.items()} == sections
    assert {"payment", "lookup", "outbox", "settlement", "report"} <= set(normal)
    assert (normal["payment"].share, normal["payment"].sessions) == (1.0, None)


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.name)
def test_every_actor_of_a_built_in_incident_bears_a_name_of_the_story(path: Path) -> None:
    for actor in catalog.load([path]).incidents[path.stem].cast.values():
        assert (actor.sessions is None) != (actor.share is None)
        assert "incident" not in f"{actor.role} {actor.application_name}"


def test_front_matter_and_sections_become_the_incident(tmp_path: Path) -> None:
    got = incident(tmp_path, SOUND)
    assert (got.name, got.path) == ("scoring", tmp_path / "scoring.sql")
    assert (got.front.title, got.front.category, got.front.severity) == ("Somebody scores", "locks", "high")
    assert (got.front.cause, got.front.fix, got.front.traps) == ("A scorer.", "None.", ["waiting"])
    assert (got.front.signals.promql, got.front.signals.logql, got.front.signals.traceql) == (["up > 0"], [], [])
    assert got.witness_within == 2.0
    assert got.params == {"least": 10}
    assert got.inject is not None and got.recover is not None and got.stop is None
    assert [section.name for section in (got.inject, got.recover, got.evidence)] == ["inject", "recover", "evidence"]


def test_what_an_incident_leaves_out_has_a_default(tmp_path: Path) -> None:
    got = incident(tmp_path, least())
    assert got.inject is got.recover is got.stop is None
    assert (got.witness_within, dict(got.params)) == (5.0, {})
    assert (got.front.scope, got.front.requires, got.front.traps) == ("database", [], [])


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    got = incident(tmp_path, SOUND.replace("Somebody", "Quelqu'un à côté"))
    assert got.sha256 == hashlib.sha256(got.path.read_bytes()).hexdigest()


def test_scope_and_requirements_are_kept(tmp_path: Path) -> None:
    got = incident(tmp_path, least('scope = "cluster"\nrequires = ["pg_checkpoint", "replication"]'))
    assert (got.front.scope, got.front.requires) == ("cluster", ["pg_checkpoint", "replication"])


def test_a_file_with_windows_line_ends_loads(tmp_path: Path) -> None:
    file = tmp_path / "scoring.sql"
    file.write_bytes(SOUND.replace("\n", "\r\n").encode())
    got = catalog.load([file]).incidents["scoring"]
    assert [statement.text for statement in got.cast["scorer"].script.statements] == ["SELECT $1"]
    assert got.evidence.statements[0].line == 33


def test_a_stop_section_is_kept(tmp_path: Path) -> None:
    got = incident(tmp_path, least(sections="-- name: stop\nSELECT false AS stop;"))
    assert got.stop is not None and got.stop.statements[0].text == "SELECT false AS stop"


# -- the cast of an incident ------------------------------------------------------------------------------------------


def test_the_cast_is_the_baseline_with_what_the_incident_changes(tmp_path: Path, normal: Cast) -> None:
    loaded = load(tmp_path, SOUND)
    cast = loaded.incidents["scoring"].cast
    assert set(cast) == {*normal, "scorer"}
    assert {name for name in loaded.normal if cast[name] is not loaded.normal[name]} == {"settlement"}
    scorer = cast["scorer"]
    assert (scorer.sessions, scorer.share, scorer.role, scorer.application_name, scorer.connect) == (
        *(2, None, "fraud_scorer", "fraud-scorer", "keep"),
    )
    assert scorer.params["least"] == 10


def test_a_table_without_a_section_changes_an_actor_and_keeps_its_script(tmp_path: Path) -> None:
    loaded = load(tmp_path, SOUND)
    was, becomes = loaded.normal["settlement"], loaded.incidents["scoring"].cast["settlement"]
    assert (was.sessions, becomes.sessions) == (1, 3)
    assert becomes.script is was.script
    assert (becomes.role, becomes.application_name, becomes.connect) == (was.role, was.application_name, was.connect)
    assert becomes.params == {**was.params, "least": 10}


def test_a_section_without_a_table_changes_a_script_and_keeps_the_rest(tmp_path: Path) -> None:
    loaded = load(tmp_path, least(sections="-- name: settlement\n-- think: 3s\nSELECT 7;"))
    was, becomes = loaded.normal["settlement"], loaded.incidents["scoring"].cast["settlement"]
    assert [type(step) for step in becomes.script.steps][:1] == [Think]
    assert [statement.text for statement in becomes.script.statements] == ["SELECT 7"]
    assert (becomes.sessions, becomes.role, becomes.application_name) == (was.sessions, was.role, was.application_name)


def test_sessions_of_a_baseline_actor_can_become_a_share_and_the_other_way_round(tmp_path: Path) -> None:
    front = '[actor.outbox]\nshare = 0.5\n[actor.lookup]\nsessions = 4\nrole = "payments_app"\napplication_name = "office"'
    cast = incident(tmp_path, least(front)).cast
    assert (cast["outbox"].sessions, cast["outbox"].share) == (None, 0.5)
    assert (cast["lookup"].sessions, cast["lookup"].share) == (4, None)


@pytest.mark.parametrize("connect", ["keep", "each"])
def test_an_actor_with_sessions_may_connect_for_each_run(tmp_path: Path, connect: str) -> None:
    text = changed("[actor.settlement]\nsessions = 3", f'[actor.settlement]\nconnect = "{connect}"')
    assert incident(tmp_path, text).cast["settlement"].connect == connect


def test_a_mode_has_the_cast_of_its_incident_and_any_other_the_healthy_one(tmp_path: Path) -> None:
    loaded = load(tmp_path, SOUND)
    assert loaded.cast("scoring") is loaded.incidents["scoring"].cast
    assert loaded.cast("normal") is loaded.normal
    assert loaded.cast("gone") is loaded.normal


def test_nothing_of_a_loaded_catalog_can_be_changed(tmp_path: Path) -> None:
    loaded = load(tmp_path, SOUND)
    for mapping in (loaded.normal, loaded.incidents, loaded.incidents["scoring"].cast, loaded.incidents["scoring"].params):
        with pytest.raises(TypeError):
            mapping["x"] = None  # type: ignore[index]
    for each in (loaded, loaded.incidents["scoring"], loaded.normal["payment"]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, dataclasses.fields(each)[0].name, None)


# -- files and directories --------------------------------------------------------------------------------------------


def test_the_files_of_a_directory_come_in_the_order_of_their_names_and_only_sql(tmp_path: Path) -> None:
    for name in ("b.sql", "a.sql", "c.txt", "d.sql.bak"):
        (tmp_path / name).touch()
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "e.sql").touch()
    assert [path.name for path in catalog.incident_files((tmp_path,))] == ["a.sql", "b.sql"]


def test_the_built_in_catalog_comes_before_the_users_own(tmp_path: Path) -> None:
    built_in, *own = catalog.incident_directories((tmp_path, tmp_path / "more"))
    assert built_in == catalog.sql_directory() / "incidents"
    assert own == [tmp_path, tmp_path / "more"]


@pytest.mark.parametrize("name", ["missing", "a_file"])
def test_a_directory_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(SqlFileError, match=f"{name}:1: there is no such directory: name one"):
        catalog.incident_files((tmp_path, tmp_path / name))


def test_an_incident_that_two_directories_define_is_refused_with_both_places(tmp_path: Path) -> None:
    mine, yours = tmp_path / "mine", tmp_path / "yours"
    for directory in (mine, yours):
        directory.mkdir()
        (directory / "scoring.sql").write_text(SOUND)
    (yours / "other.sql").write_text(SOUND)
    with pytest.raises(SqlFileError) as caught:
        catalog.load(catalog.incident_files((mine, yours)))
    (only,) = caught.value.faults
    assert (only.path, only.line) == (yours / "scoring.sql", 1)
    assert f"incident scoring is defined in {mine / 'scoring.sql'} too" in only.message


def test_an_own_incident_may_not_take_the_name_of_a_built_in_one(tmp_path: Path) -> None:
    (tmp_path / BUILT_IN[0].name).write_text(SOUND)
    with pytest.raises(SqlFileError, match=f"incident {BUILT_IN[0].stem} is defined in"):
        catalog.load(catalog.incident_files(catalog.incident_directories((tmp_path,))))


def test_the_faults_of_every_file_are_told_at_once_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.sql").write_text(changed('severity = "high"', 'severity = "huge"'))
    (tmp_path / "a.sql").write_text(changed("SELECT true AS visible;", "SELECT 1; SELECT pg_sleep(1);"))
    (tmp_path / "c.sql").write_text(SOUND)
    with pytest.raises(SqlFileError) as caught:
        catalog.load(catalog.incident_files((tmp_path,)))
    assert [(fault.path.name, fault.line) for fault in caught.value.faults] == [("a.sql", 33), ("b.sql", 4)]
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [f"{tmp_path}/a.sql:33", f"{tmp_path}/b.sql:4"]


@pytest.mark.parametrize("stem", ["Scoring", "1st", "two-words", "a.b", "normal", "a" * 64, "é", "_x"])
def test_a_file_whose_name_cannot_be_a_mode_is_refused(tmp_path: Path, stem: str) -> None:
    line, message = fault(tmp_path, SOUND, f"{stem}.sql")
    assert line == 1
    assert message.startswith(f'"{stem}" cannot name an incident')


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scoring.sql").mkdir()
    with pytest.raises(SqlFileError, match=r"scoring\.sql:1: cannot be read: Is a directory"):
        catalog.load([tmp_path / "scoring.sql"])
    with pytest.raises(SqlFileError, match=r"gone\.sql:1: cannot be read: No such file"):
        catalog.load([tmp_path / "gone.sql"])


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scoring.sql"
    file.write_bytes(SOUND.replace("A scorer", "Un marqué").encode("latin-1"))
    with pytest.raises(SqlFileError, match=r"scoring\.sql:1: is not UTF-8 text"):
        catalog.load([file])


# -- faults of the front matter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["title", "category", "severity", "cause", "fix"])
def test_a_missing_key_is_told_where_the_front_matter_begins(tmp_path: Path, key: str) -> None:
    lines = [line for line in SOUND.splitlines(keepends=True) if not line.startswith(f"{key} ")]
    line, message = fault(tmp_path, "".join(lines))
    assert line == 1
    assert "missing" in message and f"`{key}`" in message


WRONG_VALUES = {
    "title of the wrong type": ('"Somebody scores"', "3", 2, "title"),
    "title that is empty": ('"Somebody scores"', '""', 2, "title"),
    "title that is too long": ('"Somebody scores"', f'"{"x" * 2001}"', 2, "title"),
    # PostgreSQL keeps the title, and no text of its can hold a NUL.
    "title with a NUL": ('"Somebody scores"', '"Some\\u0000body"', 2, "title"),
    "category in words": ('"locks"', '"Lock waits"', 3, "category"),
    "severity that there is not": ('"high"', '"huge"', 4, "severity"),
    "cause of the wrong type": ('"A scorer."', '["A scorer."]', 5, "cause"),
    "fix of the wrong type": ('"None."', "true", 6, "fix"),
    "traps in one string": ('["waiting"]', '"waiting"', 7, "traps"),
    "trap of the wrong type": ('["waiting"]', '["waiting", 1]', 7, "traps"),
    "witness_within of the wrong type": ('"2s"', "2", 8, "witness_within"),
    "witness_within without unit": ('"2s"', '"2"', 8, '"2" is not a duration'),
    "witness_within in words": ('"2s"', '"soon"', 8, '"soon" is not a duration'),
    "scope that there is not": ('witness_within = "2s"', 'scope = "world"', 8, "scope"),
    "requires in one string": ('witness_within = "2s"', 'requires = "replication"', 8, "requires"),
    "sessions in words": ("sessions         = 2", 'sessions         = "two"', 11, "sessions"),
    "no sessions": ("sessions         = 2", "sessions         = 0", 11, "sessions"),
    "too many sessions": ("sessions         = 2", "sessions         = 1001", 11, "sessions"),
    "half a session": ("sessions         = 2", "sessions         = 1.5", 11, "sessions"),
    "no share": ("sessions         = 2", "share            = 0", 11, "share"),
    "too large a share": ("sessions         = 2", "share            = 100.5", 11, "share"),
    "role of the wrong type": ('"fraud_scorer"', "1", 12, "role"),
    "application_name that PostgreSQL would cut": ('"fraud-scorer"', f'"{"x" * 64}"', 13, "application_name"),
    "no sessions in the second table": ("sessions = 3", "sessions = 0", 16, "sessions"),
    "connect that there is not": ("sessions = 3", 'connect = "often"', 16, "connect"),
    "parameter that is a list": ("least = 10", "least = [10]", 19, "least"),
    "parameter that is a date": ("least = 10", "most = 11\nleast = 2024-01-01", 20, "least"),
    "parameter with a NUL": ("least = 10", 'least = "\\u0000"', 19, "least"),
    "signal that is empty": ('["up > 0"]', '[""]', 22, "promql"),
    "signal in one string": ('["up > 0"]', '"up > 0"', 22, "promql"),
    "actor that is no table": ("[actor.settlement]\nsessions = 3", "[actor]\nsettlement = 3", 16, "settlement"),
}


@pytest.mark.parametrize(("old", "new", "line", "word"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_wrong_value_is_told_on_the_line_that_sets_it(tmp_path: Path, old: str, new: str, line: int, word: str) -> None:
    found, message = fault(tmp_path, changed(old, new))
    assert (found, word in message) == (line, True), (found, message)


@pytest.mark.parametrize(
    ("old", "new", "line", "key"),
    [
        ("traps    =", "trap     =", 7, "trap"),
        ("[actor.settlement]", "[actr.settlement]", 15, "actr"),
        ("sessions         = 2", "sesions          = 2", 11, "sesions"),
        ("sessions = 3", "sesions = 3", 16, "sesions"),
        ("logql  =", "lokiql =", 23, "lokiql"),
        ("[signals]", "[signal]", 21, "signal"),
    ],
)
def test_an_unknown_key_is_told_on_its_line(tmp_path: Path, old: str, new: str, line: int, key: str) -> None:
    found, message = fault(tmp_path, changed(old, new))
    assert (found, "unknown" in message, f"`{key}`" in message) == (line, True, True), (found, message)


NOT_TOML = {
    "value without quotes": ('"A scorer."', "A scorer.", 5),
    "string that is not closed": ('"Somebody scores"', '"Somebody scores', 2),
    "key twice": ("fix      =", "title    =", 6),
    "table twice": ("[actor.settlement]", "[actor.scorer]", 15),
    "table that is not closed": ("[params]", "[params", 18),
    "value that is missing": ("least = 10", "least =", 19),
    "line that is no TOML": ("[signals]", "SIGNALS", 21),
    "array that is not closed": ("logql  = []", "logql  = [", 23),
    "escape that there is not": ('"None."', '"\\None."', 6),
}


@pytest.mark.parametrize(("old", "new", "line"), NOT_TOML.values(), ids=NOT_TOML)
def test_front_matter_that_is_no_toml_is_told_on_its_line(tmp_path: Path, old: str, new: str, line: int) -> None:
    found, message = fault(tmp_path, changed(old, new))
    assert (found, message.startswith("the front matter is not TOML: ")) == (line, True), (found, message)
    assert "(at " not in message, "tomllib counts the lines of the front matter, not of the file"


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, "{a=" * 5000], ids=["arrays", "digits", "tables"])
def test_front_matter_that_is_too_much_for_the_toml_parser_is_refused_like_any_other(tmp_path: Path, value: str) -> None:
    line, message = fault(tmp_path, changed("least = 10", f"least = {value}"))
    assert 1 <= line <= 24 and message.startswith("the front matter is not TOML: ")


def test_lines_are_right_where_the_front_matter_does_not_begin_on_the_first_line(tmp_path: Path) -> None:
    assert fault(tmp_path, "\n\n" + changed('"A scorer."', "A scorer."))[0] == 7
    assert fault(tmp_path, "\n\n" + changed('"high"', '"huge"'))[0] == 6


@pytest.mark.parametrize("text", ["", "-- nothing\n", "/* a comment */\n", "-- first\n" + SOUND, SOUND.replace("/*---", "/*")])
def test_a_file_that_does_not_begin_with_front_matter_is_refused(tmp_path: Path, text: str) -> None:
    assert (1, True) in [(line, "must begin with its front matter" in message) for line, message in faults(tmp_path, text)]


def test_front_matter_that_is_not_closed_is_refused(tmp_path: Path) -> None:
    told = faults(tmp_path, SOUND.replace("---*/", ""))
    assert {line for line, _ in told} == {1}
    assert any("must begin with its front matter: a block comment from /*--- to ---*/" in message for _, message in told)


def test_faults_of_the_front_matter_and_of_the_sections_are_told_together(tmp_path: Path) -> None:
    text = changed('"high"', '"huge"').replace("SELECT :least;", "SELECT $1;")
    assert [line for line, _ in faults(tmp_path, text)] == [4, 36]


# -- faults of meaning ------------------------------------------------------------------------------------------------


def test_an_incident_without_evidence_is_refused(tmp_path: Path) -> None:
    line, message = fault(tmp_path, changed("-- name: evidence\nSELECT true AS visible;\n", ""))
    assert line == 1 and 'there is no section "evidence"' in message


def test_inject_without_recover_is_refused_on_the_line_of_inject(tmp_path: Path) -> None:
    line, message = fault(tmp_path, changed("-- name: recover\nSELECT 2;\n", ""))
    assert line == 26 and '"inject" without "recover"' in message


def test_recover_without_inject_is_allowed(tmp_path: Path) -> None:
    assert incident(tmp_path, changed("-- name: inject\nSELECT 1;\n", "")).inject is None


@pytest.mark.parametrize("steps", ["SELECT 1; SELECT 2;", "-- think: 1s\nSELECT 1;", "SELECT 1;\n-- think: 1s"])
@pytest.mark.parametrize("name", ["evidence", "stop"])
def test_evidence_and_stop_are_exactly_one_query(tmp_path: Path, name: str, steps: str) -> None:
    text = changed("-- name: evidence\nSELECT true AS visible;\n", f"-- name: {name}\n{steps}\n")
    text += "-- name: evidence\nSELECT true AS visible;\n" if name == "stop" else ""
    assert fault(tmp_path, text) == (32, f'"{name}" must be exactly one query')


@pytest.mark.parametrize("command", ["BEGIN", "COMMIT", "rollback", "START TRANSACTION", "SAVEPOINT a", "END"])
@pytest.mark.parametrize(("name", "line"), [("inject", 28), ("recover", 31)])
def test_a_change_leaves_its_transaction_to_the_daemon(tmp_path: Path, name: str, line: int, command: str) -> None:
    old = {"inject": "SELECT 1;\n", "recover": "SELECT 2;\n"}[name]
    found, message = fault(tmp_path, changed(old, f"{old}{command};\n"))
    assert found == line and command.split(maxsplit=1)[0].upper() in message


def test_an_actors_script_may_hold_transactions(tmp_path: Path) -> None:
    text = changed("SELECT :least;", "BEGIN; SELECT :least; SAVEPOINT a; ROLLBACK;")
    assert len(incident(tmp_path, text).cast["scorer"].script.steps) == 4


def test_a_section_that_is_neither_reserved_nor_an_actor_is_refused_on_its_line(tmp_path: Path) -> None:
    line, message = fault(tmp_path, SOUND + "\n-- name: scoerr\nSELECT 1;\n")
    assert (line, message) == (38, "section scoerr is neither reserved nor an actor: add a table [actor.scoerr]")


def test_an_actor_without_a_script_is_refused_on_the_line_of_its_table(tmp_path: Path) -> None:
    line, message = fault(tmp_path, changed("[actor.settlement]", "[actor.setlement]"))
    assert (line, message) == (15, 'actor setlement has no script: add a section "-- name: setlement"')


@pytest.mark.parametrize("name", sorted(SUPPLIED))
def test_a_constant_may_not_take_the_name_of_a_supplied_parameter(tmp_path: Path, name: str) -> None:
    line, message = fault(tmp_path, changed("least = 10", f"least = 10\n{name} = 1"))
    assert line == 20 and message.startswith(f'"{name}" is supplied by the daemon')


ACTORS = {
    "both": ("sessions = 1\nshare = 0.1", "has both sessions and share"),
    "neither": ('role = "bi_reader"\napplication_name = "x"', "needs sessions (connections of its own) or share"),
    "sessions without role": ('sessions = 1\napplication_name = "x"', "needs a role and an application_name"),
    "sessions without application_name": ('sessions = 1\nrole = "bi_reader"', "needs a role and an application_name"),
    "share with connect": ('share = 0.1\nconnect = "each"', "connect is only for actors with sessions"),
}


@pytest.mark.parametrize(("table", "words"), ACTORS.values(), ids=ACTORS)
def test_an_actor_that_does_not_fit_together_is_refused_on_the_line_of_its_table(
    tmp_path: Path, table: str, words: str
) -> None:
    line, message = fault(tmp_path, least(f"[actor.teller]\n{table}", "-- name: teller\nSELECT 1;"))
    assert (line, message.startswith("actor teller "), words in message) == (7, True, True), (line, message)


@pytest.mark.parametrize(
    ("front", "words"),
    [
        ("[actor.outbox]\nsessions = 1\nshare = 0.1", "has both sessions and share"),
        ("[actor.lookup]\nsessions = 1", "needs a role and an application_name"),
        ('[actor.payment]\nconnect = "each"', "connect is only for actors with sessions"),
        ('[actor.outbox]\nshare = 0.1\nconnect = "each"', "connect is only for actors with sessions"),
    ],
)
def test_the_same_rules_hold_for_a_changed_baseline_actor(tmp_path: Path, front: str, words: str) -> None:
    line, message = fault(tmp_path, least(front))
    assert (line, words in message) == (7, True), (line, message)


def test_all_faults_of_meaning_are_told_at_once(tmp_path: Path) -> None:
    text = least("[actor.nobody]\nsessions = 1\n[params]\namount = 1", "-- name: lost\nSELECT 1;\n-- name: inject\nSELECT 1;")
    assert [line for line, _ in faults(tmp_path, text)] == [7, 10, 14, 16]


# -- mutilated files --------------------------------------------------------------------------------------------------

SLIPS = (
    "'",
    '"',
    "$$",
    ";",
    "/*",
    "*/",
    "---*/",
    "/*---\n",
    "[",
    "]",
    "=",
    "\n",
    "-- name: x\n",
    "-- think: 1s\n",
    ":a",
    "\0",
    "é",
)


def mutilated(text: str, chance: random.Random) -> str:
    """`text` after a few slips of the hand."""
    for _ in range(chance.randint(1, 4)):
        begin = chance.randrange(len(text) + 1)
        end = begin + chance.choice((1, 2, 5, 20, 100))
        later = end + chance.randrange(200)
        match chance.choice(("delete", "insert", "duplicate", "swap")):
            case "delete":
                text = text[:begin] + text[end:]
            case "insert":
                text = text[:begin] + chance.choice(SLIPS) + text[begin:]
            case "duplicate":
                text = text[:later] + text[begin:end] + text[later:]
            case "swap":
                text = text[:begin] + text[end:later] + text[begin:end] + text[later:]
    return text


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutilated") / "victim.sql"


@given(st.sampled_from([path.read_text(encoding="utf-8") for path in BUILT_IN] + [SOUND]), st.randoms(use_true_random=False))
@settings(derandomize=True, database=None, deadline=1000, max_examples=250)
def test_a_mutilated_file_loads_or_is_refused_on_lines_that_it_has(victim: Path, text: str, chance: random.Random) -> None:
    text = mutilated(text, chance)
    victim.write_text(text, encoding="utf-8", newline="")
    try:
        loaded = catalog.load([victim])
    except SqlFileError as error:
        assert error.faults
        for each in error.faults:
            assert each.path == victim
            assert 1 <= each.line <= text.count("\n") + 1
            assert each.message and "\n" not in each.message
    else:
        assert set(loaded.incidents) == {"victim"}


def test_a_file_saved_on_windows_is_the_same_incident(tmp_path: Path) -> None:
    built_in = catalog.incident_files(catalog.incident_directories())[0]
    saved = tmp_path / built_in.name
    saved.write_bytes(b"\xef\xbb\xbf" + built_in.read_bytes().replace(b"\n", b"\r\n"))
    there, here = (next(iter(catalog.load([path]).incidents.values())) for path in (built_in, saved))
    assert here.front == there.front and here.evidence.statements == there.evidence.statements
    assert here.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
