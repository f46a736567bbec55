"""The grammar of the SQL files: statements, parameters, directives, and where every fault is."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incidentd.catalog import sql_directory
from incidentd.errors import SqlFileError
from incidentd.sqltext import Section, Statement, Step, Think, parse_duration, parse_section, parse_sections

FILE = Path("some.sql")
SHIPPED = sorted(sql_directory().rglob("*.sql"))

# The same examples on every run: a gate must not turn red by chance. Deadlines are in milliseconds.
STABLE = settings(derandomize=True, database=None, deadline=1000, max_examples=300)


def section(body: str) -> Section:
    """The one section of a file whose line 1 names it."""
    (only,) = parse_sections(f"-- name: a\n{body}", FILE)
    return only


def statement(body: str) -> Statement:
    (only,) = section(body).steps
    assert isinstance(only, Statement)
    return only


def texts(body: str) -> list[str]:
    return [each.text for each in section(body).statements]


def faults(text: str) -> list[tuple[int, str]]:
    with pytest.raises(SqlFileError) as caught:
        parse_sections(text, FILE)
    assert all(fault.path == FILE for fault in caught.value.faults)
    return [(fault.line, fault.message) for fault in caught.value.faults]


def fault(text: str) -> tuple[int, str]:
    (only,) = faults(text)
    return only


# -- what a statement is ----------------------------------------------------------------------------------------------

# One statement each, with no parameter and no comment: its text is what the file says, character for character.
VERBATIM = {
    "string": "SELECT ';', ':a', '--', '/*', '$$', '\"'",
    "doubled quote": "SELECT 'it''s; :a'",
    "doubled quote at the end": "SELECT 'a;''', ''';:a'",
    "empty string": "SELECT '', '', ';'",
    "backslash in a standard string": "SELECT 'C:\\dir\\'",
    "backslashes in a standard string": "SELECT '\\', ';', ':a'",
    "E string with an escaped quote": "SELECT E'it\\'s; :a -- \\\\'",
    "e string of one backslash": "SELECT e'\\\\', ';'",
    "E string with a doubled quote": "SELECT E'a'';:b'",
    "word that ends in e before a string": "SELECT date'2024-01-01\\', 'x'",
    "bit, hex, national and unicode strings": "SELECT B'01', x'1F', N':a', U&'\\0061;:a', u&';'",
    "quoted identifier": 'SELECT "a;b:c--d/*", U&"d;:a", "$$"',
    "doubled quote in an identifier": 'SELECT "say ""hi;"" :a"',
    "quote in an identifier": "SELECT \"it's;\", 'a \" ;'",
    "dollar quotes": "DO $$ BEGIN a := 1; b:=:c; RAISE ':x'; END; $$",
    "tagged dollar quotes": "DO $body$ SELECT '$$; it'; :a $other$; $Body$ -- $body$",
    "two dollar quotes": "SELECT $$;$$ || $a$:a;$a$",
    "dollar tag outside ASCII": "SELECT $é$;:a$é$",
    "dollar tag with digits": "SELECT $a1$;:a $a$ $1 $a1$",
    "dollar quotes over lines": "DO $$\nBEGIN\n\n  a := 1; -- stays\nEND\n$$",
    "dollar inside an identifier": "SELECT a$b$c, d$$ FROM t$x$",
    "cast": "SELECT a::int, '1'::text, (b)::c.d, e::int[]",
    "named arguments": "SELECT f(a := 1, b:=2, c => 3)",
    "slices": 'SELECT a[1:2], a[lo:hi], a[1:hi], a[lo:2], a[1 : 2], a[:], a["Lo":hi]',
    "slices of expressions": "SELECT a[f(x):y], a[(1):y], a[b[1]:y], a[x + 1:y], a[1:2][lo:hi], (ARRAY[1, 2])[1:n]",
    "slice up to a quoted identifier": 'SELECT a[lo:"Hi"]',
    "cast in a subscript": "SELECT a[x::int:y]",
    "time": "SELECT '12:30'::time, timestamp '2024-01-01 12:30:59'",
    "JSON": """SELECT '{"a":true,"b":[1,2],"c":{"d":null}}'::jsonb -> 'a'""",
    "JSON operators": "SELECT a->>'x:y', a #>> '{b,c}', a ?| b, a @> '{\"a\":1}', a @? '$.b ? (@ > 1)'",
    "operators": "SELECT 1 /2 * -3 - -4, a<-b, 5 !~ 6, a <=> b",
    "numbers": "SELECT 1.5e3, .5, 0x1F, 1_000",
    "string over lines": "SELECT 'first\n\n\n  second;  \n-- name: b\n\t:a\n'",
    "string that goes on in the next line": "SELECT 'a'\n       'b;'",
    "identifier over lines": 'SELECT "a\n\n;b"',
    "function body": "CREATE FUNCTION f() RETURNS integer BEGIN ATOMIC SELECT 1; SELECT 2; END",
    "function body with CASE": (
        "create or replace procedure f(x int)\nbegin atomic\n"
        "  insert into t values (case when x > 1 then case x when 2 then 3 end end);\n"
        "  delete from u;\nend"
    ),
    "function body with END in a string": "CREATE FUNCTION f() RETURNS text BEGIN ATOMIC SELECT 'END',  \"end\" FROM t; END",
    "function body in a string": "CREATE FUNCTION f() RETURNS integer LANGUAGE sql AS 'SELECT 1; SELECT 2;'",
    "rule": "CREATE RULE r AS ON INSERT TO t DO ALSO (DELETE FROM a; DELETE FROM b)",
    "rule with parentheses inside": "CREATE RULE r AS ON INSERT TO t DO ALSO (INSERT INTO a VALUES (1); DELETE FROM b)",
    "parenthesis in a string": "SELECT '(', '[', \"(\", $$($$",
    "escapes beyond Unicode": "SELECT E'\\UFFFFFFFF \\777 \\xF', U&'\\+FFFFFF'",
    "letters outside ASCII": "SELECT prénom, 名前 FROM été",
}


@pytest.mark.parametrize("text", VERBATIM.values(), ids=VERBATIM)
def test_a_statement_is_kept_as_it_stands_and_ends_where_it_ends(text: str) -> None:
    parsed = section(f"SELECT 0;{text};\nSELECT 2;")
    assert [each.text for each in parsed.statements] == ["SELECT 0", text, "SELECT 2"]
    assert [each.parameters for each in parsed.statements] == [(), (), ()]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("SELECT 1 -- one; it's :a\n     , 2;", "SELECT 1\n     , 2"),
        ("SELECT/**/1;", "SELECT 1"),
        ("SELECT 1--;\n;", "SELECT 1"),
        ("SELECT /* a /* nested ; */ it's :b */ 1;", "SELECT 1"),
        ("SELECT /* /* /* */ */; */ 1;", "SELECT 1"),
        ("SELECT /* ---*/ 1;", "SELECT 1"),
        ("-- before\n/* before; */ SELECT 1;", "SELECT 1"),
        ("SELECT 1 /* after */ ; -- after", "SELECT 1"),
        ("SELECT 2 */* c */ 3;", "SELECT 2 * 3"),
        ("SELECT 1\n\n\n-- gone\n\n  FROM t;", "SELECT 1\n  FROM t"),
        ("SELECT 'a' -- comment\n'b';", "SELECT 'a'\n'b'"),
        (";;SELECT 1;;;", "SELECT 1"),
    ],
)
def test_comments_and_empty_statements_leave_no_trace(body: str, text: str) -> None:
    assert texts(body) == [text]


@pytest.mark.parametrize(
    ("body", "text", "parameters"),
    [
        ("SELECT :a", "SELECT $1", "a"),
        ("SELECT :b, :a, :b, :a", "SELECT $1, $2, $1, $2", "b a"),
        ("SELECT :a, :A, :a_1", "SELECT $1, $2, $3", "a A a_1"),
        ("SELECT :a::int + (:b)::text", "SELECT $1::int + ($2)::text", "a b"),
        ("VALUES (:a,':b',:c)", "VALUES ($1,':b',$2)", "a c"),
        ("SELECT 1 WHERE x=:a AND y>:b", "SELECT 1 WHERE x=$1 AND y>$2", "a b"),
        ("SELECT '12:30', :t", "SELECT '12:30', $1", "t"),
        ("SELECT f(x := :a, y:=:b, z => :c)", "SELECT f(x := $1, y:=$2, z => $3)", "a b c"),
        ("SELECT a[:x]", "SELECT a[$1]", "x"),
        ("SELECT a[:lo:hi]", "SELECT a[$1:hi]", "lo"),
        ("SELECT a[:lo : :hi]", "SELECT a[$1 : $2]", "lo hi"),
        ("SELECT a[(:lo):(:hi)]", "SELECT a[($1):($2)]", "lo hi"),
        ("SELECT a[f(:x):hi]", "SELECT a[f($1):hi]", "x"),
        ("SELECT a[:x::int]", "SELECT a[$1::int]", "x"),
        ("SELECT ARRAY[:a,:b, :c]", "SELECT ARRAY[$1,$2, $3]", "a b c"),
        ("SELECT a[1:2], (:x), a[b] = :y", "SELECT a[1:2], ($1), a[b] = $2", "x y"),
        ("SELECT :a -- :b\n", "SELECT $1", "a"),
        ("SELECT /* :b; */ :a", "SELECT $1", "a"),
        ("SELECT $$ :a $$ || :b", "SELECT $$ :a $$ || $1", "b"),
        ("SELECT '{\"a\":true}'::jsonb -> :key", "SELECT '{\"a\":true}'::jsonb -> $1", "key"),
        ("CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT :a; END", None, "a"),
        ("CREATE RULE r AS ON INSERT TO t DO (DELETE FROM a WHERE b = :a; NOTIFY c)", None, "a"),
        ("SELECT :a\n     , :b", "SELECT $1\n     , $2", "a b"),
    ],
)
def test_parameters_are_bound_by_position_in_order_of_first_appearance(body: str, text: str | None, parameters: str) -> None:
    parsed = statement(f"{body};")
    assert parsed.parameters == tuple(parameters.split())
    assert parsed.text == (text or body.replace(":a", "$1"))


@pytest.mark.parametrize("body", ["SELECT:a;", "SELECT 1 LIMIT:a;", "SELECT 1 WHERE x IS NULL OR:a;", "SELECT 1 OFFSET/**/:a;"])
def test_a_parameter_directly_after_a_word_does_not_become_a_part_of_it(body: str) -> None:
    # PostgreSQL allows $ within identifiers: SELECT$1 would be one word.
    parsed = statement(body)
    assert parsed.parameters == ("a",)
    assert re.search(r"\s\$1$", parsed.text)


def test_numbering_of_parameters_begins_again_with_each_statement() -> None:
    first, second = section("SELECT :a, :b; SELECT :b;").statements
    assert (first.text, first.parameters) == ("SELECT $1, $2", ("a", "b"))
    assert (second.text, second.parameters) == ("SELECT $1", ("b",))


@pytest.mark.parametrize(
    ("body", "keyword"),
    [
        ("select 1;", "SELECT"),
        ("/* c */ Begin;", "BEGIN"),
        ("((SELECT 1));", "SELECT"),
        ("(\n\tSELECT 1);", "SELECT"),
        ("CREATE INDEX ON t (a);", "CREATE"),
        ("'a';", ""),
    ],
)
def test_the_keyword_is_the_first_word_in_upper_case(body: str, keyword: str) -> None:
    assert statement(body).keyword == keyword


# -- lines ------------------------------------------------------------------------------------------------------------


def test_each_line_of_a_statement_knows_its_line_in_the_file() -> None:
    body = """
SELECT 1, -- a comment
-- a line of its own

       'two
lines', /* a
comment */ :a
  FROM t; SELECT $$

$$;
"""
    first, second = section(body).statements
    assert first.text == "SELECT 1,\n       'two\nlines', $1\n  FROM t"
    assert first.lines == (3, 6, 7, 9)
    assert first.line == 3
    assert second.text == "SELECT $$\n\n$$"
    assert second.lines == (9, 10, 11)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_line_of_a_shipped_statement_begins_on_the_line_that_it_names(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    file = text.split("\n")
    for each in parse_sections(text, path):
        assert file[each.line - 1].startswith(f"-- name: {each.name}")
        for parsed in each.statements:
            assert len(parsed.lines) == parsed.text.count("\n") + 1
            for line, number in zip(parsed.text.split("\n"), parsed.lines, strict=True):
                unbound = re.match(r"[^$]*", line)
                assert unbound is not None and unbound.group().strip() in file[number - 1]


# -- sections and directives ------------------------------------------------------------------------------------------


def test_sections_come_in_the_order_of_the_file_with_their_lines_and_sources() -> None:
    text = "/* front */\n-- a file\n\n-- name: b\nSELECT 1;\n\n-- name: a_2\n-- think: 1s\nSELECT 2;\n"
    first, second = parse_sections(text, FILE)
    assert (first.name, first.line, first.source) == ("b", 4, "SELECT 1;\n\n")
    assert (second.name, second.line, second.source) == ("a_2", 7, "-- think: 1s\nSELECT 2;\n")
    assert second.steps == (Think(1.0, 1.0, 8), Statement("SELECT 2", (), (9,)))
    assert second.statements == second.steps[1:]


def test_what_is_parsed_cannot_be_changed() -> None:
    parsed = section("-- think: 1s\nSELECT 1;")
    for each in (parsed, *parsed.steps):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, dataclasses.fields(each)[0].name, None)


def test_a_file_without_sections_has_none() -> None:
    assert parse_sections("", FILE) == []
    assert parse_sections("-- nothing\n/* at all */\n;\n", FILE) == []


@pytest.mark.parametrize(
    "line", ["-- name: b", "--name:b", "  -- name : b  ", "\t--\tname:\tb\t", "-- NAME: b", "-- name: b\r"]
)
def test_a_directive_may_be_spaced_and_cased_in_any_way(line: str) -> None:
    assert [each.name for each in parse_sections(f"-- name: a\nSELECT 1;\n{line}\nSELECT 2;", FILE)] == ["a", "b"]


@pytest.mark.parametrize("body", ["SELECT '\n-- name: b\n';", "/*\n-- name: b\n*/ SELECT 1;", "DO $$\n-- think: 2s\n$$;"])
def test_a_directive_within_a_literal_or_a_block_comment_is_none(body: str) -> None:
    assert len(section(body).steps) == 1


def test_a_section_runs_in_a_transaction_unless_it_says_otherwise() -> None:
    text = "-- name: a\nSELECT 1;\n-- name: b\n-- transaction: none\nSELECT 1;\n-- name: c\nSELECT 1;"
    assert [each.transaction for each in parse_sections(text, FILE)] == [True, False, True]


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("2s", 2, 2),
        ("250ms", 0.25, 0.25),
        ("1.5min", 90, 90),
        ("0s", 0, 0),
        ("2s..6s", 2, 6),
        ("500ms..2s", 0.5, 2),
        ("2s .. 1min", 2, 60),
        ("2 s..2 s", 2, 2),
        ("0.5s..1.5s", 0.5, 1.5),
    ],
)
def test_think_time_is_in_any_unit_and_may_be_a_range(value: str, low: float, high: float) -> None:
    (think, _) = section(f"-- think: {value}\nSELECT 1;").steps
    assert isinstance(think, Think)
    assert think.low == pytest.approx(low) and think.high == pytest.approx(high)
    assert think.line == 2


@pytest.mark.parametrize("text", ["", "2", "s", "2h", "-1s", "1e3s", "2s3", ".5s", "5.s", "2ss", "2s..3s", "inf", "2 0s"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration: write it as 250ms, 2s or 1\.5min"):
        parse_duration(text)


# -- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "statement before any section": ("\nSELECT 1;\n", 2, "a statement before the first -- name: line"),
    "statement of many lines before any section": ("\nSELECT\n1,\n:a;\n", 2, "a statement before the first -- name: line"),
    "think before any section": ("-- think: 2s\n-- name: a\nSELECT 1;", 1, "stands before the first -- name: line"),
    "transaction before any section": ("\n\n-- transaction: none", 3, "stands before the first -- name: line"),
    "no ; at the end of the file": ("-- name: a\nSELECT 1;\n\nSELECT\n1\n\n", 4, "does not end: add a ;"),
    "no ; at the end of a section": ("-- name: a\nSELECT\n1\n-- name: b\nSELECT 2;", 2, "does not end: add a ;"),
    "open parenthesis": ("-- name: a\n\nSELECT (1;\n", 3, "does not end"),
    "open function body": ("-- name: a\nCREATE FUNCTION f() BEGIN ATOMIC SELECT 1;\n", 2, "does not end"),
    "empty section": ("-- name: b\nSELECT 1;\n-- name: a\n-- a comment\n;", 3, "section a has no statement"),
    "section of think times": ("-- name: a\n-- think: 1s\n", 1, "section a has no statement"),
    "name with a blank": ("-- name: a b\nSELECT 1;", 1, '"a b" is not a section name'),
    "name in upper case": ("\n-- name: A\nSELECT 1;", 2, '"A" is not a section name'),
    "name that begins with a digit": ("-- name: 1a\nSELECT 1;", 1, '"1a" is not a section name'),
    "name that is missing": ("-- name:\nSELECT 1;", 1, '"" is not a section name'),
    "name too long for PostgreSQL": (f"-- name: {'a' * 64}\nSELECT 1;", 1, "is not a section name"),
    "section twice": ("-- name: a\nSELECT 1;\n-- name: a\nSELECT 1;", 3, "section a is there twice"),
    "think inside a statement": ("-- name: a\nSELECT\n-- think: 2s\n1;", 3, "-- think: stands inside a statement"),
    "transaction inside a statement": ("-- name: a\nSELECT (\n-- transaction: none\n1);", 3, "stands inside a statement"),
    "think time in words": ("-- name: a\n-- think: soon\nSELECT 1;", 2, '"soon" is not a think time'),
    "think time without unit": ("-- name: a\n-- think: 2\nSELECT 1;", 2, '"2" is not a think time'),
    "think time with a comment": ("-- name: a\n-- think: 2s (gateway)\nSELECT 1;", 2, "is not a think time"),
    "think time without end": ("-- name: a\n-- think: 2s..\nSELECT 1;", 2, '"2s.." is not a think time'),
    "think time without beginning": ("-- name: a\n-- think: ..2s\nSELECT 1;", 2, '"..2s" is not a think time'),
    "think time with three dots": ("-- name: a\n-- think: 1s...2s\nSELECT 1;", 2, "is not a think time"),
    "think time backwards": ("-- name: a\n-- think: 2s..500ms\nSELECT 1;", 2, "ends before it begins"),
    "unknown transaction mode": ("-- name: a\nSELECT 1;\n-- transaction: off\n", 3, '"-- transaction: off" is unknown'),
    "open string": ("-- name: a\nSELECT 1,\n'open;\n\n", 3, "the string that begins here is not closed"),
    "open string after a doubled quote": (
        "-- name: a\nSELECT\n'it\ngo''es on;\n",
        3,
        "the string that begins here is not closed",
    ),
    "open E string": ("-- name: a\nSELECT E'open;\n", 2, "the string that begins here is not closed"),
    "E string with an escaped end": ("-- name: a\n\nSELECT E'it\\';\n", 3, "the string that begins here is not closed"),
    "open E string after an escaped quote": ("-- name: a\nSELECT e'a\n\\'b;\n", 2, "the string that begins here is not closed"),
    "open identifier": ('-- name: a\nSELECT\n"open;\n', 3, "the quoted identifier that begins here is not closed"),
    "open identifier after a doubled quote": ('-- name: a\nSELECT "a\n""b;\n', 2, "the quoted identifier that begins here"),
    "open dollar quotes": ("-- name: a\nDO $$ BEGIN\nEND;\n", 2, "the dollar-quoted string that begins here is not closed"),
    "other tag": ("-- name: a\n\nDO $a$ BEGIN\nEND $A$;\n", 3, "the dollar-quoted string that begins here is not closed"),
    "open comment": ("-- name: a\nSELECT 1;\n/* open\n", 3, "the comment that begins here is not closed"),
    "open nested comment": ("-- name: a\nSELECT 1;\n\n/* /* */\n", 4, "the comment that begins here is not closed"),
    "psql string variable": ("-- name: a\nSELECT\n:'a';", 3, "psql's :'a' is not part of the file format"),
    "psql identifier variable": ('-- name: a\nSELECT :"a";', 2, 'psql\'s :"a" is not part of the file format'),
    "psql test": ("-- name: a\nSELECT :{?a};", 2, "psql's :{?a} is not part of the file format"),
    "psql command": ("-- name: a\nSELECT 1 \\gset\n;", 2, "psql's backslash commands are not part of the file format"),
    "positional parameter": ("-- name: a\nSELECT :a,\n $2;", 3, "$2 is a positional parameter: write :name"),
    "NUL between tokens": ("-- name: a\nSELECT\n \0;", 3, "a NUL character cannot be part of SQL"),
    "NUL in a string": ("-- name: a\nSELECT\n'a\0b';", 3, "a NUL character cannot be part of SQL"),
    "NUL in an E string": ("-- name: a\nSELECT\nE'a\0b';", 3, "a NUL character cannot be part of SQL"),
    "NUL in an identifier": ('-- name: a\nSELECT "a\0b";', 2, "a NUL character cannot be part of SQL"),
    "NUL in dollar quotes": ("-- name: a\nSELECT 1;\nDO $$ \0 $$;", 3, "a NUL character cannot be part of SQL"),
    # The source of a section is stored by the server, comments included, and no text of PostgreSQL can hold a NUL.
    "NUL in a comment": ("-- name: a\nSELECT 1; -- \0\n", 2, "a NUL character cannot be part of SQL"),
}


@pytest.mark.parametrize(("text", "line", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_once_with_its_line_and_its_cause(text: str, line: int, words: str) -> None:
    found, message = fault(text)
    assert (found, words in message) == (line, True), (found, message)


def test_every_fault_of_a_file_is_told_in_the_order_of_its_lines() -> None:
    text = "SELECT 0;\n-- name: A\n-- think: soon\nSELECT $1, :'a';\n-- name: a\n-- thnik: 2s\nSELECT pg_sleep(1);\n\nSELECT 'x"
    assert [line for line, _ in faults(text)] == [1, 2, 3, 4, 4, 6, 7, 9]


def test_every_empty_section_is_told() -> None:
    assert [line for line, _ in faults("-- name: a\n\n-- name: b\nSELECT 1;\n-- name: c\n")] == [1, 5]


def test_an_error_is_printed_as_file_line_and_message() -> None:
    with pytest.raises(SqlFileError) as caught:
        parse_sections("-- name: A\nSELECT 1;\n-- name: b\nSELECT", FILE)
    first, second = str(caught.value).splitlines()
    assert first.startswith('some.sql:1: "A" is not')
    assert second.startswith("some.sql:4: the statement does not end")


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("-- nmae: a", "name"),
        ("-- names: a", "name"),
        ("-- Nam: a", "name"),
        ("-- thinks: 2s", "think"),
        ("--tihnk: 2s", "think"),
        ("-- THINC: 2s", "think"),
        ("-- transction: none", "transaction"),
        ("-- transactions: none", "transaction"),
        ("-- transaktion: none", "transaction"),
    ],
)
def test_a_misspelt_directive_is_told_with_the_one_that_was_meant(line: str, meant: str) -> None:
    found, message = fault(f"-- name: a\nSELECT 1;\n  {line}\nSELECT 2;")
    assert found == 3
    assert f'did you mean "-- {meant}:"?' in message


@pytest.mark.parametrize(
    "line", ["-- Note: names are long", "-- see https://example.org/name: it", "-- 12:30", "--", "-- a: b: c"]
)
def test_prose_with_a_colon_is_a_comment(line: str) -> None:
    assert texts(f"{line}\nSELECT 1;\n{line}") == ["SELECT 1"]


# -- pg_sleep ---------------------------------------------------------------------------------------------------------

SLEEPS = {
    "plain": "SELECT pg_sleep(1)",
    "upper case": "SELECT PG_SLEEP(1)",
    "mixed case": "SELECT Pg_Sleep (1)",
    "qualified": "SELECT pg_catalog.pg_sleep(1)",
    "qualified with blanks": "SELECT pg_catalog . /* c */ pg_sleep(1)",
    "qualified and quoted": 'SELECT "pg_catalog"."pg_sleep"(1)',
    "quoted": 'SELECT "pg_sleep"(1)',
    "pg_sleep_for": "SELECT pg_sleep_for('1 s')",
    "pg_sleep_until": "SELECT pg_sleep_until(now())",
    "unicode identifier": r'SELECT U&"pg\005fsleep"(1)',
    "unicode identifier, six digits": r'SELECT u&"\0070g_\+000073leep"(1)',
    "unicode identifier, another escape": "SELECT U&\"pg!005fsleep\" UESCAPE '!' (1)",
    "string body": "DO 'BEGIN PERFORM pg_sleep(1); END'",
    "string body in string body": "DO 'BEGIN EXECUTE ''SELECT pg_sleep(1)''; END'",
    "string body over two literals": "DO 'BEGIN PERFORM pg_'\n   'sleep(1); END'",
    "unicode string body": r"DO U&'BEGIN PERFORM pg\005fsleep(1); END'",
    "hexadecimal escape": r"DO E'BEGIN PERFORM pg\x5fsleep(1); END'",
    "octal escape": r"DO e'BEGIN PERFORM pg\137sleep(1); END'",
    "octal escape beyond a byte": r"DO E'BEGIN PERFORM pg\537sleep(1); END'",
    "short unicode escape": r"DO E'BEGIN PERFORM pg\u005fsleep(1); END'",
    "long unicode escape": r"DO E'BEGIN PERFORM \U00000070g_sleep(1); END'",
    "needless escape": r"DO E'BEGIN PERFORM pg\_sleep(1); END'",
    "dollar body": "DO $$ BEGIN PERFORM pg_sleep(1); END $$",
    "tagged dollar body": "DO $do$ BEGIN PERFORM PG_SLEEP(1); END $do$",
    "escape in a dollar body": r"DO $$ BEGIN EXECUTE E'SELECT p\x67_sleep(1)'; END $$",
    "unicode identifier in a dollar body": r'DO $$ BEGIN PERFORM U&"pg\005fsleep"(1); END $$',
    "dollar body in dollar body": "DO $a$ BEGIN EXECUTE $b$ SELECT pg_sleep(1) $b$; END $a$",
    "function body": "CREATE FUNCTION f() RETURNS void BEGIN ATOMIC SELECT pg_sleep(1); END",
}


@pytest.mark.parametrize("sleep", SLEEPS.values(), ids=SLEEPS)
def test_pg_sleep_is_refused_in_every_spelling(sleep: str) -> None:
    line, message = fault(f"-- name: a\nSELECT 1;\n{sleep};")
    assert 3 <= line <= 4
    assert "pg_sleep is refused" in message and "-- think: 2s" in message


@pytest.mark.parametrize(
    "body",
    ["-- pg_sleep(1)\nSELECT 1;", "SELECT /* no pg_sleep /* here */ */ 1;", "SELECT 'PgSleep', 'pg_',\n'sleep', pg_slee;"],
)
def test_pg_sleep_may_be_spoken_of_in_comments(body: str) -> None:
    assert len(texts(body)) == 1


# -- a section read back from its source ------------------------------------------------------------------------------


def moved(step: Step, lines: int) -> Step:
    if isinstance(step, Think):
        return dataclasses.replace(step, line=step.line + lines)
    return dataclasses.replace(step, lines=tuple(line + lines for line in step.lines))


def assert_reads_back(original: Section) -> None:
    again = parse_section(original.name, original.source, FILE)
    assert (again.name, again.transaction, again.source) == (original.name, original.transaction, original.source)
    assert again.steps == tuple(moved(step, 1 - original.line) for step in original.steps)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_section_reads_back_from_its_source(path: Path) -> None:
    for each in parse_sections(path.read_text(encoding="utf-8"), path):
        assert_reads_back(each)


@pytest.mark.parametrize("text", VERBATIM.values(), ids=VERBATIM)
def test_any_statement_reads_back_from_its_source(text: str) -> None:
    before, after = "-- name: b\nSELECT 1;\n\n  -- name: a", "-- think: 1s..2s\n-- transaction: none\n\n-- name: c\nSELECT 3;"
    for each in parse_sections(f"{before}\n{text};\n{after}", FILE):
        assert_reads_back(each)


def test_a_stored_section_that_is_broken_is_refused_like_a_file() -> None:
    with pytest.raises(SqlFileError, match=r"some\.sql:3: the statement does not end"):
        parse_section("a", "SELECT 1;\nSELECT 2", FILE)


# -- any text at all --------------------------------------------------------------------------------------------------

FRAGMENTS = (
    *("-- name: a\n", "\n-- name: b2\n", "\n-- name: C\n", "-- think: 2s\n", "\n-- think: 1s..x\n", "\n-- transaction: none\n"),
    *("\n-- thnik: 2s\n", "SELECT 1;\n", "SELECT ", "BEGIN ATOMIC ", " CASE ", " END", "x", "é", "pg_sleep(1)", "1.5", ","),
    *(":a", ":b", "::int", ":=", ":", ":'", ':"', ":{", "{", "}", "[", "]", "(", ")", ";", "$1", "$", "$$", "$t$", "\\", "\\'"),
    *("'", "''", "'x;:y'", "E'", "E'\\''", "U&'", '"', 'U&"', '"x;"', "/*", "*/", "/**/", "--", "-- c\n"),
    *("\n", "\n\n", "\r\n", "\r", " ", "\t", "\f", "\x0b", "\x85", "\xa0", "\u2028", "\ufeff", "\0"),
)
CLOSED = (
    *VERBATIM.values(),
    " ",
    "\n",
    "\t\n\n",
    ":a",
    " :b::int ",
    ";",
    ";\n",
    "/* c; */",
    "-- c;\n",
    ";\n-- think: 1s..2s\n",
    ";\r\n",
)
ANYTHING = st.one_of(
    st.text(),
    st.lists(st.sampled_from(CLOSED), max_size=20).map(lambda parts: f"-- name: z\nSELECT {''.join(parts)};"),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=60).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=60).map(lambda parts: "-- name: z\n" + "".join(parts)),
)


def assert_sound(parsed: Section, lines: int) -> None:
    for each in parsed.statements:
        assert each.text.strip() == each.text != ""
        assert len(set(each.parameters)) == len(each.parameters)
        assert len(each.lines) == each.text.count("\n") + 1
        assert list(each.lines) == sorted(set(each.lines))
        assert parsed.line <= each.lines[0] and each.lines[-1] <= lines
    assert parsed.statements


@given(ANYTHING)
@STABLE
def test_any_text_is_sections_or_a_file_error_with_lines_that_exist(text: str) -> None:
    lines = text.count("\n") + 1
    try:
        sections = parse_sections(text, FILE)
    except SqlFileError as error:
        assert error.faults
        assert all(1 <= each.line <= lines and "\n" not in each.message for each in error.faults)
        return
    assert len({each.name for each in sections}) == len(sections)
    for each in sections:
        assert_sound(each, lines)
        assert_reads_back(each)


# What a long file may hold, each about as long as a long file is.
LONG = {
    "insert of many rows": "INSERT INTO t VALUES\n" + ",\n".join(f"({n}, '{'x' * 200}')" for n in range(32000)) + ";",
    "directive with blanks": f"-- think: a{' ' * 100000}x\nSELECT 1;",
    "braces": ":{" * 100000,
    "quotes": "SELECT " + "'" * 400001,
    "comments": "SELECT 1;" + "/* /* */ */ -- c\n" * 20000,
    "open parentheses": "SELECT " + "(" * 200000,
    "parameters": "SELECT " + ", ".join(f":p{n}" for n in range(1000)) + ";",
    "faults": "-- think: x\n" * 20000,
}


@pytest.mark.parametrize("body", LONG.values(), ids=LONG)
def test_a_long_file_is_read_in_a_moment(body: str) -> None:
    begun = time.process_time()
    try:
        section(body)
    except SqlFileError as error:
        assert error.faults
    assert time.process_time() - begun < 5  # linear: under a second; quadratic: a minute


# -- generated statements ---------------------------------------------------------------------------------------------

# Tokens that no parameter is in.
INERT = (
    *("':z'", "'it'':z;'", "E'\\':z;'", "$$:z;$$", "$t$ ':z $$ $t$", '":z;"', 'U&":z"', "'{\"a\":true}'", "'12:30'"),
    *("x::int", "f(a := 1)", "x[1:2]", "x[lo:hi]", "x[f(1):hi]", "(1; 2)", "-", "*", "=", ",", "word", "1.5", "a$b$"),
)
# Tokens that a parameter is in, where @ stands.
BINDING = ("@", "(@)", "x[@]", "x[@:hi]", "@::int", "f(a := @)", "f(a:=@)", "ARRAY[1,@]", "(@; 2)")
GAPS = (" ", "\n", "\t", "\r\n", "\n\n  ", "/**/", " /* :z ; ' */ ", " -- :z ; '\n", "\n/* /* $$ */ \n */")

TOKEN = st.one_of(
    st.tuples(st.sampled_from(INERT), st.none()),
    st.tuples(st.sampled_from(BINDING), st.sampled_from(["a", "b", "B", "c_1", "merchant_id"])),
)


@given(st.lists(st.tuples(st.sampled_from(GAPS), TOKEN), max_size=30))
@STABLE
def test_parameters_of_a_generated_statement_come_in_order_and_nothing_else_is_touched(
    parts: list[tuple[str, tuple[str, str | None]]],
) -> None:
    source, tokens, names = "SELECT", ["SELECT"], list[str]()
    for gap, (token, name) in parts:
        if name is not None and name not in names:
            names.append(name)
        source += gap + token.replace("@", f":{name}")
        tokens.append(token.replace("@", f"${names.index(name) + 1}" if name else ""))
    parsed = statement(f"{source};")
    assert parsed.parameters == tuple(names)
    rest = parsed.text
    for token in tokens:
        assert rest.startswith(token), (parsed.text, token)
        rest = rest.removeprefix(token).lstrip()
    assert rest == ""


@pytest.mark.parametrize(
    ("comment", "said"),
    [
        ("COMMIT; -- think: 2s", "-- think: stands behind something else"),
        ("COMMIT;\n-- think 2s", '"-- think" is no directive without its colon'),
        ("COMMIT;\n-- name b", '"-- name" is no directive without its colon'),
    ],
)
def test_a_directive_that_would_be_taken_for_a_comment_is_told(comment: str, said: str) -> None:
    with pytest.raises(SqlFileError, match=said):
        parse_sections(f"-- name: a\nBEGIN;\n{comment}\n", FILE)


@pytest.mark.parametrize("comment", ["-- think about it", "-- name of the merchant", "-- transaction of the day"])
def test_prose_is_a_comment(comment: str) -> None:
    (only,) = parse_sections(f"-- name: a\n{comment}\nSELECT 1;\n", FILE)
    assert only.statements[0].text == "SELECT 1"
