"""Settings: where a value comes from, and what is told of a bad one."""

from __future__ import annotations

import argparse
import os
import traceback
from pathlib import Path
from typing import Any

import pytest

from incidentd.errors import SettingsError
from incidentd.settings import Settings, add_options, default_state_dir, from_arguments


def choose(*arguments: str, **environment: str) -> Settings:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_options(parser)
    return from_arguments(parser.parse_args(arguments), environment)


def refusal(*arguments: str, **environment: str) -> str:
    """The one sentence with which the settings are refused."""
    with pytest.raises(SettingsError) as caught:
        choose(*arguments, **environment)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Field, flag, variable, default; and two values of the user's, as written and as read.
OPTIONS: list[tuple[str, str, str, Any, tuple[str, Any], tuple[str, Any]]] = [
    ("state_dir", "--state-dir", "INCIDENTD_STATE_DIR", default_state_dir(), ("/a", Path("/a")), ("b/c", Path("b/c"))),
    ("incidents", "--incidents", "INCIDENTD_INCIDENTS", (), ("/a", (Path("/a"),)), ("b", (Path("b"),))),
    ("payments", "--payments", "INCIDENTD_PAYMENTS", 2_000_000, ("1000", 1000), ("1000000000", 10**9)),
    ("metrics_addr", "--metrics-addr", "INCIDENTD_METRICS_ADDR", "127.0.0.1", ("0.0.0.0", "0.0.0.0"), ("::1", "::1")),
    ("metrics_port", "--metrics-port", "INCIDENTD_METRICS_PORT", 8000, ("0", 0), ("65535", 65535)),
    ("pool_size", "--pool-size", "INCIDENTD_POOL_SIZE", 10, ("1", 1), ("1000", 1000)),
    ("log_format", "--log-format", "INCIDENTD_LOG_FORMAT", "auto", ("json", "json"), ("text", "text")),
    ("server", "--dsn", "INCIDENTD_DSN", None, ("host=a", {"host": "a"}), ("dbname=b", {"dbname": "b"})),
]
EACH = pytest.mark.parametrize(
    ("field", "flag", "variable", "default", "one", "other"), OPTIONS, ids=[row[1] for row in OPTIONS]
)


@EACH
def test_a_flag_beats_the_environment_which_beats_the_default(
    field: str, flag: str, variable: str, default: Any, one: tuple[str, Any], other: tuple[str, Any]
) -> None:
    for (given, read), (in_environment, read_from_environment) in ((one, other), (other, one)):
        assert getattr(choose(), field) == default
        assert getattr(choose(**{variable: in_environment}), field) == read_from_environment
        assert getattr(choose(flag, given), field) == read
        assert getattr(choose(flag, given, **{variable: in_environment}), field) == read


@EACH
def test_an_empty_variable_means_the_default(
    field: str, flag: str, variable: str, default: Any, one: tuple[str, Any], other: tuple[str, Any]
) -> None:
    assert getattr(choose(**{variable: ""}), field) == default


# -- directories ------------------------------------------------------------------------------------------------------


def test_incidents_may_be_repeated_and_the_variable_is_separated_like_path() -> None:
    assert choose("--incidents", "/a", "--incidents", "b c").incidents == (Path("/a"), Path("b c"))
    assert choose(INCIDENTD_INCIDENTS=os.pathsep.join(("/a", "b c", ""))).incidents == (Path("/a"), Path("b c"))


def test_a_directory_given_by_flag_may_have_the_separator_in_its_name() -> None:
    assert choose("--incidents", f"/a{os.pathsep}b").incidents == (Path(f"/a{os.pathsep}b"),)


@pytest.mark.parametrize("here", [".", "./"])
def test_the_current_directory_can_be_the_state_directory(here: str) -> None:
    assert choose("--state-dir", here).state_dir.absolute() == Path.cwd()
    assert choose(INCIDENTD_STATE_DIR=here).state_dir.absolute() == Path.cwd()


# -- the server -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"])
def test_a_variable_of_libpq_that_names_a_server_means_that_server(variable: str) -> None:
    assert choose(**{variable: "x"}).server == {}
    assert choose(**{variable: ""}).server is None


def test_other_variables_of_libpq_do_not_name_a_server() -> None:
    assert choose(PGPASSWORD="x", PGSSLMODE="require", PGAPPNAME="x", PGOPTIONS="-c a=b", PGPASSFILE="x").server is None


def test_a_dsn_beats_the_variables_of_libpq() -> None:
    assert choose("--dsn", "host=a", PGHOST="b").server == {"host": "a"}
    assert choose(INCIDENTD_DSN="host=a", PGHOST="b").server == {"host": "a"}


def test_an_empty_dsn_flag_takes_back_that_of_the_environment() -> None:
    assert choose("--dsn", "", INCIDENTD_DSN="host=a").server is None


@pytest.mark.parametrize(
    "dsn",
    [
        "host=db.example port=5433 dbname=shop user=ann password='it\\'s'",
        "postgresql://ann:it%27s@db.example:5433/shop",
        "postgres://ann:it's@db.example:5433/shop",
    ],
)
def test_a_dsn_is_a_connection_string_or_a_url(dsn: str) -> None:
    parts = {"host": "db.example", "port": "5433", "dbname": "shop", "user": "ann", "password": "it's"}
    assert choose("--dsn", dsn).server == parts


def test_cluster_scope_is_allowed_on_the_embedded_server_and_elsewhere_only_when_said() -> None:
    assert choose().allow_cluster_scope is True
    assert choose("--dsn", "host=a").allow_cluster_scope is False
    assert choose(PGHOST="a").allow_cluster_scope is False
    assert choose("--allow-cluster-scope", PGHOST="a").allow_cluster_scope is True


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("1", True), ("true", True), ("YES", True), ("On", True), ("0", False), ("False", False), ("no", False), ("OFF", False)],
)
def test_a_switch_in_the_environment_is_a_truth_value(text: str, allowed: bool) -> None:
    assert choose(PGHOST="a", INCIDENTD_ALLOW_CLUSTER_SCOPE=text).allow_cluster_scope is allowed


# -- bad values -------------------------------------------------------------------------------------------------------

WHOLE = ("", "abc", "1.5", "-1", "+1", "1e6", "0x10", "1_000", "9" * 20, "9" * 5000)
BAD = [
    *[("--payments", "INCIDENTD_PAYMENTS", text, "a whole number from 1000 to 1000000000") for text in (*WHOLE, "999")],
    *[("--metrics-port", "INCIDENTD_METRICS_PORT", text, "a whole number from 0 to 65535") for text in (*WHOLE, "65536")],
    *[("--pool-size", "INCIDENTD_POOL_SIZE", text, "a whole number from 1 to 1000") for text in (*WHOLE, "0", "1001")],
    *[("--log-format", "INCIDENTD_LOG_FORMAT", text, "one of auto, json, text") for text in ("", "xml", "JSON", " json")],
]


@pytest.mark.parametrize(("flag", "variable", "text", "words"), BAD, ids=[f"{row[0]} {row[2][:20]}" for row in BAD])
def test_a_bad_value_is_refused_with_the_name_of_the_flag_or_of_the_variable(
    flag: str, variable: str, text: str, words: str
) -> None:
    assert refusal(f"{flag}={text}", **{variable: "1000"}).startswith(f'{flag} must be {words}, not "{text[:20]}')
    if text:
        assert refusal(**{variable: text}).startswith(f'{variable} must be {words}, not "{text[:20]}')


def test_a_bad_switch_is_refused_with_the_name_of_the_variable() -> None:
    assert refusal(INCIDENTD_ALLOW_CLUSTER_SCOPE="maybe") == 'INCIDENTD_ALLOW_CLUSTER_SCOPE must be 1 or 0, not "maybe"'


BAD_DSNS = [
    "hunter2",
    "host=db password=hunter2 nonsense",
    "host=db password='hunter2",
    "host=db pasword=hunter2",
    "postgresql://ann:hunter2@[::1/shop",
    "postgresql://ann:hunter2@db/shop?nonsense",
    "postgresql://ann:hunter2@db/shop?nonsense=hunter2",
    "postgresql://ann:%zzhunter2@db/shop",
    "host=db password=hunter2 \udcff",  # what Python makes of an argument that is not UTF-8
]


@pytest.mark.parametrize("dsn", BAD_DSNS)
def test_a_bad_dsn_is_refused_without_a_word_of_it(dsn: str) -> None:
    with pytest.raises(SettingsError) as caught:
        choose("--dsn", dsn)
    told = "".join(traceback.format_exception(caught.value))
    assert "hunter2" not in told
    assert str(caught.value).startswith("--dsn is not a connection string: write it as ")


@pytest.mark.parametrize("dsn", BAD_DSNS)
def test_a_bad_dsn_of_the_environment_is_refused_with_the_name_of_the_variable(dsn: str) -> None:
    told = refusal(INCIDENTD_DSN=dsn)
    assert told.startswith("INCIDENTD_DSN is not a connection string") and "hunter2" not in told


# -- the password of the roles ----------------------------------------------------------------------------------------


def test_the_password_of_the_roles_comes_from_the_environment() -> None:
    assert choose().role_password is None
    assert choose(INCIDENTD_ROLE_PASSWORD="").role_password is None
    assert choose(INCIDENTD_ROLE_PASSWORD="hunter2").role_password == "hunter2"


def test_the_password_of_the_roles_can_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("hunter2 é\n", encoding="utf-8")
    assert choose(INCIDENTD_ROLE_PASSWORD_FILE=str(file)).role_password == "hunter2 é"
    assert choose(INCIDENTD_ROLE_PASSWORD_FILE=str(file), INCIDENTD_ROLE_PASSWORD="other").role_password == "hunter2 é"
    assert choose(INCIDENTD_ROLE_PASSWORD_FILE="", INCIDENTD_ROLE_PASSWORD="other").role_password == "other"


def test_an_empty_password_file_holds_none(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("\n")
    assert choose(INCIDENTD_ROLE_PASSWORD_FILE=str(file)).role_password is None


@pytest.mark.parametrize("kind", ["missing", "directory", "binary"])
def test_a_password_file_that_cannot_be_read_is_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    file = tmp_path / kind
    (tmp_path / "directory").mkdir()
    (tmp_path / "binary").write_bytes(b"hunter2\xff")
    told = refusal(INCIDENTD_ROLE_PASSWORD_FILE=str(file))
    assert told.startswith(f"INCIDENTD_ROLE_PASSWORD_FILE names {file}, which cannot be read")
    assert "hunter2" not in told


def test_settings_do_not_show_the_password_of_the_roles() -> None:
    assert "hunter2" not in repr(choose(INCIDENTD_ROLE_PASSWORD="hunter2"))
