"""The command line, as far as it needs no server: help, refusals, `list`, and what `check` says of broken files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import incidentd
from incidentd import catalog, cli
from incidentd.settings import default_state_dir

# DESIGN §7: flag, variable, default.
OPTIONS = [
    ("--dsn", "INCIDENTD_DSN", "embedded"),
    ("--state-dir", "INCIDENTD_STATE_DIR", str(default_state_dir())),
    ("--incidents", "INCIDENTD_INCIDENTS", "built-in"),
    ("--payments", "INCIDENTD_PAYMENTS", "2000000"),
    ("--metrics-addr", "INCIDENTD_METRICS_ADDR", "127.0.0.1"),
    ("--metrics-port", "INCIDENTD_METRICS_PORT", "8000"),
    ("--pool-size", "INCIDENTD_POOL_SIZE", "10"),
    ("--log-format", "INCIDENTD_LOG_FORMAT", "auto"),
    ("--allow-cluster-scope", "INCIDENTD_ALLOW_CLUSTER_SCOPE", "off"),
]
COMMANDS = ("list", "check", "recover", "psql", "env")
BUILT_IN = sorted(path.stem for path in (catalog.sql_directory() / "incidents").glob("*.sql"))

SOUND = """/*---
title    = "{title}"
category = "locks"
severity = "low"
cause    = "None."
fix      = "None."
---*/

-- name: evidence
SELECT true AS visible;
"""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def refusal(self) -> str:
        """The one sentence with which it refused; fails when it did anything else."""
        assert (self.code, self.out) == (1, ""), self
        (sentence,) = self.err.splitlines()
        return sentence


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command in this process, where an exception that nobody catches is a failure of the test."""
    for name in os.environ:
        if name.startswith(("PG", "INCIDENTD")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")
    handler = signal.getsignal(signal.SIGTERM)

    def command(*arguments: str, **environment: str) -> Done:
        capsys.readouterr()
        with monkeypatch.context() as context:
            for name, value in environment.items():
                context.setenv(name, value)
            try:
                code = cli.main(arguments)
            except SystemExit as left:  # argparse's way out
                code = left.code if isinstance(left.code, int) else 0
        out, err = capsys.readouterr()
        return Done(code, out, err)

    yield command
    signal.signal(signal.SIGTERM, handler)


def in_a_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PG", "INCIDENTD"))}
    command = [sys.executable, "-m", "incidentd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=own | environment, check=False)


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), ("list",), ("check",), ("recover",), ("env",)], ids=" ".join)
@pytest.mark.parametrize(("flag", "variable", "default"), OPTIONS, ids=[row[0] for row in OPTIONS])
def test_help_shows_each_option_with_its_variable_and_its_default(
    run: Run, command: tuple[str, ...], flag: str, variable: str, default: str
) -> None:
    done = run(*command, "--help", COLUMNS="1000")
    assert (done.code, done.err) == (0, "")
    (line,) = re.findall(rf"^ +{flag}\b.*(?:\n {{20,}}.*)*", done.out, re.MULTILINE)
    assert f"environment: {variable};" in line
    assert default in line.partition("default: ")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_each_command(run: Run, command: str) -> None:
    assert re.search(rf"^ +{command} +[A-Z]", run("--help", COLUMNS="1000").out, re.MULTILINE)


def test_help_and_version_are_told_by_the_module_itself() -> None:
    told, version = in_a_process("--help"), in_a_process("--version")
    assert (told.returncode, told.stderr) == (0, "") and "usage: python -m incidentd" in told.stdout
    assert (version.returncode, version.stdout) == (0, f"incidentd {incidentd.__version__}\n")


# -- refusals ---------------------------------------------------------------------------------------------------------

UNUSABLE = {
    "unknown option": ("--nonsense",),
    "unknown option of a command": ("list", "--nonsense"),
    "abbreviated option": ("--pay", "1000"),
    "abbreviated option of a command": ("list", "--pay", "1000"),
    "unknown command": ("lisst",),
    "argument too many": ("list", "more"),
    "value that is missing": ("--payments",),
    "value that is missing after a command": ("list", "--dsn"),
    "value for a switch": ("--allow-cluster-scope=1",),
}


@pytest.mark.parametrize("arguments", UNUSABLE.values(), ids=UNUSABLE)
def test_a_command_line_that_makes_no_sense_is_refused_with_the_usage(run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    usage, sentence = done.err.split("error: ")
    assert usage.startswith("usage: python -m incidentd")
    assert re.fullmatch(r".+\n", sentence)


BAD_VALUES = [
    ("--payments", "INCIDENTD_PAYMENTS", "many"),
    ("--payments", "INCIDENTD_PAYMENTS", "-5"),
    ("--metrics-port", "INCIDENTD_METRICS_PORT", "65536"),
    ("--pool-size", "INCIDENTD_POOL_SIZE", "0"),
    ("--log-format", "INCIDENTD_LOG_FORMAT", "xml"),
    ("--dsn", "INCIDENTD_DSN", "nonsense"),
]


@pytest.mark.parametrize("command", ["list", "check", "recover", "env", "psql", None])
@pytest.mark.parametrize(("flag", "variable", "value"), BAD_VALUES, ids=[" ".join(row[::2]) for row in BAD_VALUES])
def test_a_bad_value_is_refused_by_every_command_before_it_does_anything(
    run: Run, command: str | None, flag: str, variable: str, value: str
) -> None:
    words = [command] if command else []
    assert run(*words, flag, value).refusal.startswith(f"incidentd: {flag} ")
    assert run(flag, value, *words).refusal.startswith(f"incidentd: {flag} ")
    assert run(*words, **{variable: value}).refusal.startswith(f"incidentd: {variable} ")


def test_a_bad_dsn_is_refused_without_its_password(run: Run) -> None:
    assert "hunter2" not in run("list", "--dsn", "host=db password=hunter2 nonsense").refusal


def test_an_option_after_the_command_beats_the_same_before_it(run: Run) -> None:
    assert run("--payments", "1000", "list").code == 0
    assert run("--payments", "many", "list", "--payments", "1000").code == 0
    assert '"few"' in run("--payments", "many", "list", "--payments", "few").refusal


LONG = "x" * 300  # no file system of ours has longer names than 255 bytes


@pytest.mark.parametrize("name", ["missing.sql", "missing", f"{LONG}.sql", LONG], ids=["file", "directory", "long", "longer"])
def test_check_of_a_path_that_is_not_there_is_refused_in_one_sentence(run: Run, tmp_path: Path, name: str) -> None:
    assert str(tmp_path / name) in run("check", str(tmp_path / name)).refusal


def test_check_of_a_name_that_is_no_text_is_refused_in_one_sentence(tmp_path: Path) -> None:
    done = in_a_process("check", f"{tmp_path}/\udcff.sql")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["list", "check"])
@pytest.mark.parametrize("name", ["missing", LONG], ids=["missing", "long"])
def test_a_directory_of_incidents_that_is_not_there_is_refused_in_one_sentence(
    run: Run, tmp_path: Path, command: str, name: str
) -> None:
    directory = str(tmp_path / name)
    assert directory in run(command, "--incidents", directory).refusal
    assert directory in run(command, INCIDENTD_INCIDENTS=directory).refusal


@pytest.mark.parametrize("command", ["env", "psql"])
def test_a_command_that_needs_the_embedded_server_says_that_none_runs(run: Run, tmp_path: Path, command: str) -> None:
    told = run(command, "--state-dir", str(tmp_path / "none")).refusal
    assert told.startswith(f"incidentd: no embedded PostgreSQL runs in {tmp_path / 'none'}")


def test_psql_is_missed_with_a_remedy(run: Run, tmp_path: Path) -> None:
    assert "install PostgreSQL's client" in run("psql", "--dsn", "host=db", "-c", "SELECT 1", PATH=str(tmp_path)).refusal


# -- check, as far as the files themselves are broken -----------------------------------------------------------------

EVIDENCE = SOUND.format(title="Nothing")
BROKEN: dict[str, bytes] = {
    "nothing": b"",
    "a comment": b"-- only a comment\n",
    "every byte": bytes(range(256)) * 3,
    "NULs": bytes(1000),
    "UTF-16": EVIDENCE.encode("utf-16"),
    "Latin-1": EVIDENCE.replace("None", "Né").encode("latin-1"),
    "half a file": EVIDENCE[: len(EVIDENCE) // 2].encode(),
    "front matter only": EVIDENCE.partition("-- name")[0].encode(),
    "no front matter": EVIDENCE.partition("---*/")[2].encode(),
    "no TOML": EVIDENCE.replace('"low"', "low").encode(),
    "deep TOML": EVIDENCE.replace('"low"', "[" * 5000).encode(),
    "endless number": EVIDENCE.replace('"low"', "9" * 5000).encode(),
    "wrong value": EVIDENCE.replace('"low"', '"lowest"').encode(),
    "unknown key": EVIDENCE.replace("severity", "seriousness").encode(),
    "no evidence": EVIDENCE.replace("evidence", "evidenz").encode(),
    "open string": EVIDENCE.replace("true", "'true").encode(),
    "no semicolon": EVIDENCE.replace(";", "").encode(),
    "sleep": EVIDENCE.replace("true", "pg_sleep(1)").encode(),
    "psql command": EVIDENCE.replace(";", "\\gset").encode(),
    "carriage returns": EVIDENCE.replace("\n", "\r").replace("true", "$1").encode(),
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "markup": EVIDENCE.replace("evidence", "[/b] [red]").encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_check_tells_of_a_broken_file_by_line_and_sentence(run: Run, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.sql"
    file.write_bytes(content)
    done = run("check", str(file))
    assert (done.code, done.out) == (1, "")
    lines = max(content.count(b"\n"), content.count(b"\r")) + 1
    for told in done.err.rstrip("\n").split("\n"):
        found = re.fullmatch(rf"{re.escape(str(file))}:(\d+): \S.*", told)
        assert found is not None, told
        assert 1 <= int(found[1]) <= lines


def test_check_tells_of_every_broken_file_of_a_directory_at_once(run: Run, tmp_path: Path) -> None:
    for name, text in (("b.sql", EVIDENCE.replace("low", "lowest")), ("a.sql", ""), ("c.txt", "")):
        (tmp_path / name).write_text(text)
    done = run("check", str(tmp_path))
    assert (done.code, done.out) == (1, "")
    assert [line.split(": ")[0] for line in done.err.splitlines()] == [f"{tmp_path}/a.sql:1", f"{tmp_path}/b.sql:4"]


def test_check_refuses_a_directory_that_is_named_like_a_file_and_a_link_to_itself(run: Run, tmp_path: Path) -> None:
    (tmp_path / "deep.sql").mkdir()
    (tmp_path / "loop.sql").symlink_to("loop.sql")
    done = run("check", str(tmp_path))
    assert (done.code, done.out) == (1, "")
    assert [line.removeprefix(f"{tmp_path}/")[:25] for line in done.err.splitlines()] == [
        "deep.sql:1: cannot be rea",
        "loop.sql:1: cannot be rea",
    ]


def test_check_of_a_broken_file_leaves_no_traceback_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "broken.sql"
    file.write_text(EVIDENCE.replace("true", "'true"))
    done = in_a_process("check", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"{file}:10: the string that begins here is not closed\n"


# -- list -------------------------------------------------------------------------------------------------------------


def own_incident(directory: Path, name: str, title: str = "Nothing") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.sql").write_text(SOUND.format(title=title), encoding="utf-8")
    return directory


def listed(done: Done) -> list[str]:
    """The modes that `list` has listed, one a line; a line that goes on is indented."""
    assert (done.code, done.err) == (0, "")
    heading, *lines = done.out.splitlines()
    assert heading.split() == ["mode", "severity", "category", "what", "happens"]
    return [line.split()[0] for line in lines if not line.startswith(" ")]


def test_list_lists_the_built_in_incidents_in_order_with_their_titles(run: Run) -> None:
    done = run("list", COLUMNS="300")
    assert listed(done) == BUILT_IN
    for incident in catalog.load(catalog.incident_files(catalog.incident_directories())).incidents.values():
        assert re.search(
            rf"^{incident.name} +{incident.front.severity} +{incident.front.category} +.*{incident.front.title}", done.out, re.M
        )


@pytest.mark.parametrize("arguments", [("--incidents", "{0}", "list"), ("list", "--incidents", "{0}")])
def test_list_lists_the_users_own_incidents_too(run: Run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    own = str(own_incident(tmp_path, "mine"))
    assert listed(run(*(word.format(own) for word in arguments))) == sorted([*BUILT_IN, "mine"])
    assert listed(run("list", INCIDENTD_INCIDENTS=own)) == sorted([*BUILT_IN, "mine"])


def test_directories_before_and_after_the_command_count_alike(run: Run, tmp_path: Path) -> None:
    one, two = (str(own_incident(tmp_path / name, name)) for name in ("one", "two"))
    assert listed(run("list", "--incidents", one, "--incidents", two)) == sorted([*BUILT_IN, "one", "two"])
    assert listed(run("--incidents", one, "list", "--incidents", two)) == sorted([*BUILT_IN, "one", "two"])


@pytest.mark.parametrize("title", ["[red]Reads[/red] rows", "Reads [/etc] twice", "Reads a[1]", "Boom :boom:", "C:\\\\[x]"])
def test_a_title_is_shown_as_it_is_written(run: Run, tmp_path: Path, title: str) -> None:
    done = run("list", "--incidents", str(own_incident(tmp_path, "mine", title)), COLUMNS="300")
    assert f" {title.replace(chr(92) * 2, chr(92))} " in f"{done.out} ".replace("\n", " ")


@pytest.mark.parametrize("columns", ["80", "300"])
def test_a_mode_is_never_cut_because_it_is_what_one_types(run: Run, tmp_path: Path, columns: str) -> None:
    name = "a_long_name_" + "x" * 51
    own = str(own_incident(tmp_path, name, "Somebody does something that takes many words to tell of"))
    assert name in run("list", "--incidents", own, COLUMNS=columns).out


def test_list_of_a_broken_catalog_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.sql").write_text(EVIDENCE.replace("low", "lowest"))
    assert run("list", "--incidents", str(tmp_path)).refusal.startswith(f"{tmp_path}/mine.sql:4: ")


def test_list_for_a_reader_that_has_gone_ends_without_a_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as out:
        command = [sys.executable, "-m", "incidentd", "list"]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "")


# -- env, for a server that is named ----------------------------------------------------------------------------------


def test_env_prints_exports_that_a_shell_reads_back(run: Run) -> None:
    done = run(
        "env", "--dsn", "host='/tmp/it\\'s here' port=5433 dbname='a $HOME b' user=ann password='\"x\" `y`' connect_timeout=3"
    )
    assert (done.code, done.err) == (0, "")
    read_back = subprocess.run(
        ["/bin/sh", "-c", 'eval "$0"; env -0', done.out],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
        check=True,
    )
    got = dict(line.split("=", 1) for line in read_back.stdout.split("\0") if line.startswith("PG"))
    assert got == {
        "PGHOST": "/tmp/it's here",
        "PGPORT": "5433",
        "PGDATABASE": "a $HOME b",
        "PGUSER": "ann",
        "PGPASSWORD": '"x" `y`',
        "PGCONNECT_TIMEOUT": "3",
    }


def test_env_has_nothing_to_say_of_a_server_that_the_environment_names(run: Run) -> None:
    assert run("env", PGHOST="db") == Done(0, "", "")
