"""SQL text: where statements, parameters and directives begin and end.

Owns the lexical grammar of the files under `sql/`: `-- name:` sections, `-- think:` and `-- transaction:` directives,
statements that end in `;`, and `:name` parameters. Must not know what a section means, nor what an incident is, nor that
a server exists.

The token rules are those of PostgreSQL's own scanner
(https://www.postgresql.org/docs/current/sql-syntax-lexical.html); where a `;` does not end a statement (parentheses,
`BEGIN ATOMIC` bodies) follows psql.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from incidentd.errors import Fault, SqlFileError

DIRECTIVES = ("name", "think", "transaction")

_TOKEN = re.compile(
    r"""
      (?P<space>      \s+ )
    | (?P<comment>    --[^\n]* )
    | (?P<block>      /\* )
    | (?P<escaped>    [eE]'(?:[^'\\]|''|\\.)*+' )
    | (?P<string>     (?:[bBxXnN]|[uU]&)?'(?:[^']|'')*+' )
    | (?P<quoted>     (?:[uU]&)?"(?:[^"]|"")*+" )
    | (?P<open>       (?:[eEbBxXnN]|[uU]&)?' | (?:[uU]&)?" )
    | (?P<dollar>     \$(?:[A-Za-z_\x80-\U0010ffff][A-Za-z0-9_\x80-\U0010ffff]*)?\$ )
    | (?P<positional> \$\d+ )
    | (?P<cast>       ::|:= )
    | (?P<parameter>  :[A-Za-z_][A-Za-z0-9_]* )
    | (?P<psql>       :(?:'[^'\n]*'|"[^"\n]*"|\{\?\w*\}) )
    | (?P<number>     \d[\w.]* )
    | (?P<word>       [A-Za-z_\x80-\U0010ffff][\w$\x80-\U0010ffff]* )
    | (?P<other>      . )
    """,
    re.VERBOSE | re.DOTALL,
)
_DIRECTIVE = re.compile(r"--[ \t]*(?P<key>[A-Za-z]+)[ \t]*:(?P<value>.*)")
_WITHOUT_COLON = re.compile(r"--[ \t]*(?P<key>think(?=[ \t]+\d)|name)[ \t]+\S+[ \t\r]*")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|min)")
_SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0}
_TRANSACTION = frozenset(["ABORT", "BEGIN", "COMMIT", "END", "RELEASE", "ROLLBACK", "SAVEPOINT", "START"])
_UNCLOSED = {"'": "string", '"': "quoted identifier"}
_ESCAPES = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_UNICODE = re.compile(r"""[^\s0-9a-fA-F+'"](?:\+([0-9a-fA-F]{6})|([0-9a-fA-F]{4}))""")  # any character may be the UESCAPE


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement, ready for the extended protocol.

    `text` has no comments, and `$n` where the file says `:name`; `parameters` holds the name of each `$n`, in order;
    `lines` holds the line of the file that each line of `text` stands on.
    """

    text: str
    parameters: tuple[str, ...]
    lines: tuple[int, ...]

    @property
    def line(self) -> int:
        """The line of the file on which the statement begins."""
        return self.lines[0]

    @property
    def keyword(self) -> str:
        """The first word, in upper case: `SELECT`, `BEGIN`, ..."""
        match = re.match(r"[(\s]*(\w+)", self.text)
        return match[1].upper() if match else ""

    @property
    def controls_transaction(self) -> bool:
        """Whether it begins, ends or divides a transaction."""
        return self.keyword in _TRANSACTION or re.match(r"PREPARE\s+TRANSACTION\b", self.text, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True)
class Think:
    """Time in the application, in seconds, drawn evenly from `low` to `high` on each pass."""

    low: float
    high: float
    line: int


Step = Statement | Think


@dataclass(frozen=True, slots=True)
class Section:
    """What stands between one `-- name:` line and the next.

    `transaction` is false where the section says `-- transaction: none`; `source` is the text below the `-- name:` line as it
    stands in the file, which `parse_section` reads back.
    """

    name: str
    line: int
    steps: tuple[Step, ...]
    transaction: bool
    source: str

    @property
    def statements(self) -> tuple[Statement, ...]:
        return tuple(step for step in self.steps if isinstance(step, Statement))


def parse_duration(text: str) -> float:
    """Seconds in `250ms`, `2s`, `1.5min`. Raises ValueError on anything else."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f'"{text}" is not a duration: write it as 250ms, 2s or 1.5min')
    return float(match["number"]) * _SECONDS[match["unit"]]


def parse_sections(text: str, path: Path) -> list[Section]:
    """The sections of a file, in its order. Raises SqlFileError with every fault found."""
    parser = _Parser(text, path)
    parser.run()
    if parser.faults:
        raise SqlFileError(parser.faults)
    return parser.sections


def parse_section(name: str, source: str, path: Path) -> Section:
    """A section from its stored `source`. Raises SqlFileError as `parse_sections` does."""
    return parse_sections(f"-- name: {name}\n{source}", path)[0]


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    start: int


def _tokens(text: str) -> Iterator[_Token]:
    """Every character of `text`, once, as tokens; what is not closed comes as a token of kind `unclosed`."""
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        assert match is not None and match.lastgroup is not None  # `other` takes any character
        kind, end = match.lastgroup, match.end()
        if kind == "block":
            end = _end_of_block_comment(text, position)
        elif kind == "dollar":
            closing = text.find(match.group(), end)
            end = closing + len(match.group()) if closing >= 0 else -1
        elif kind == "open":
            end = -1
        if end < 0:
            yield _Token("unclosed", text[position:], position)
            return
        yield _Token(kind, text[position:end], position)
        position = end


def _end_of_block_comment(text: str, start: int) -> int:
    """The index after the `*/` that closes the comment at `start`, or -1. Comments nest, as the SQL standard has it."""
    depth = 0
    for mark in re.compile(r"/\*|\*/").finditer(text, start):
        depth += 1 if mark.group() == "/*" else -1
        if depth == 0:
            return mark.end()
    return -1


def _spellings(text: str) -> Iterator[str]:
    """What a literal, a body or an identifier may say once escapes are undone, good enough to search for a word in it."""
    yield text
    if "\\" in text:
        yield _ESCAPES.sub(_unescape, text)
    if "U&" in text.upper():
        yield _UNICODE.sub(lambda m: _character(int(m[1] or m[2], 16)), text)


def _unescape(match: re.Match[str]) -> str:
    octal, short, four, eight, other = match.groups()
    if octal:
        return _character(int(octal, 8) & 0xFF)
    digits = short or four or eight
    return _character(int(digits, 16)) if digits else other


def _character(code: int) -> str:
    return chr(code) if code <= 0x10FFFF else ""


class _Parser:
    """One pass over the tokens of a file, collecting sections and faults."""

    def __init__(self, text: str, path: Path) -> None:
        self._text = text
        self._path = path
        self._line = 1
        self.sections: list[Section] = []
        self.faults: list[Fault] = []
        self._name: str | None = None
        self._begin_section(None, 1, 0)
        self._begin_statement()

    def run(self) -> None:
        for token in _tokens(self._text):
            self._take(token)
            self._line += token.text.count("\n")
        self._end_section(len(self._text))

    # -- sections and directives --------------------------------------------------------------------------------------

    def _begin_section(self, name: str | None, line: int, start: int) -> None:
        self._name, self._section_line, self._section_start = name, line, start
        self._steps: list[Step] = []
        self._faults_before = len(self.faults)
        self._transaction = True

    def _end_section(self, end: int) -> None:
        if self._started:
            self._fault("the statement does not end: add a ;", self._lines[0])
            self._begin_statement()
        if self._name is not None:
            if len(self.faults) == self._faults_before and not any(isinstance(step, Statement) for step in self._steps):
                self._fault(f"section {self._name} has no statement", self._section_line)
            source = self._text[self._section_start : end]
            self.sections.append(Section(self._name, self._section_line, tuple(self._steps), self._transaction, source))

    def _directive(self, key: str, value: str, token: _Token) -> None:
        if self._started and key != "name":
            self._fault(f"-- {key}: stands inside a statement: put it between two statements, or end the first with ;")
        elif key == "name":
            self._end_section(token.start)
            if not _NAME.fullmatch(value):
                self._fault(f'"{value}" is not a section name: use lower-case letters, digits and _')
            elif any(section.name == value for section in self.sections):
                self._fault(f"section {value} is there twice")
            self._begin_section(value, self._line, token.start + len(token.text) + 1)
        elif self._name is None:
            self._fault(f"-- {key}: stands before the first -- name: line")
        elif key == "think":
            self._think(value)
        elif value != "none":
            self._fault(f'"-- transaction: {value}" is unknown: the only form is "-- transaction: none"')
        else:
            self._transaction = False

    def _think(self, value: str) -> None:
        low, dots, high = value.partition("..")
        try:
            seconds = parse_duration(low), parse_duration(high if dots else low)
        except ValueError:
            self._fault(f'"{value}" is not a think time: write it as 2s or as 500ms..2s')
            return
        if seconds[0] > seconds[1]:
            self._fault(f'think time "{value}" ends before it begins')
        self._steps.append(Think(*seconds, self._line))

    # -- statements ---------------------------------------------------------------------------------------------------

    def _begin_statement(self) -> None:
        self._parts: list[str] = []
        self._open_literal = ""
        self._lines: list[int] = []
        self._gap = ""  # the white space owed before the next token: comments leave no other trace
        self._parameters: list[str] = []
        self._nesting: list[str] = []
        self._atomic = 0
        self._last_word = ""
        self._previous: _Token | None = None

    @property
    def _started(self) -> bool:
        return bool(self._parts)

    def _take(self, token: _Token) -> None:
        if "\0" in token.text:
            self._fault("a NUL character cannot be part of SQL", self._line + token.text[: token.text.index("\0")].count("\n"))
        match token.kind:
            case "unclosed":
                self._unclosed(token)
            case "comment":
                self._comment(token)
            case "block":
                self._gap = self._gap or " "
            case "space":
                _, newline, indent = token.text.rpartition("\n")
                self._gap = newline + indent if newline else self._gap or token.text
            case "other" if token.text == ";" and not self._nesting and not self._atomic:
                self._end_statement()
            case _:
                self._code(token)
        self._previous = token

    def _comment(self, token: _Token) -> None:
        found = _DIRECTIVE.fullmatch(token.text)
        if not found:
            if forgotten := _WITHOUT_COLON.fullmatch(token.text):
                self._fault(f'"-- {forgotten["key"]}" is no directive without its colon: write "-- {forgotten["key"]}: ..."')
            return
        key = found["key"].lower()
        if not self._stands_alone(token):
            if key in DIRECTIVES:
                self._fault(f"-- {key}: stands behind something else: put it on a line of its own")
        elif key in DIRECTIVES:
            self._directive(key, found["value"].strip(" \t\r"), token)
        elif near := difflib.get_close_matches(key, DIRECTIVES, cutoff=0.75):
            self._fault(f'"-- {found["key"]}:" is no directive: did you mean "-- {near[0]}:"?')

    def _stands_alone(self, token: _Token) -> bool:
        return not self._text[self._text.rfind("\n", 0, token.start) + 1 : token.start].strip()

    def _unclosed(self, token: _Token) -> None:
        opening = token.text.lstrip("eEbBxXnNuU&")[0]
        what = _UNCLOSED.get(opening, "comment" if opening == "/" else "dollar-quoted string")
        self._fault(f"the {what} that begins here is not closed")
        self._begin_statement()

    def _code(self, token: _Token) -> None:
        if self._name is None and not self._started:
            self._fault("a statement before the first -- name: line belongs to no section")
        self._refuse(token)
        if token.kind == "parameter" and not self._is_slice(token):
            name = token.text[1:]
            if name not in self._parameters:
                self._parameters.append(name)
            if self._previous is not None and self._previous.kind == "word":
                self._gap = " "  # PostgreSQL's words may contain a $
            self._emit(f"${self._parameters.index(name) + 1}")
        else:
            self._emit(token.text)
            self._nest(token)

    def _refuse(self, token: _Token) -> None:
        if token.kind == "psql" and not self._is_slice(token):
            self._fault(f"psql's {token.text} is not part of the file format: write :name")
        elif token.kind == "positional":
            self._fault(f"{token.text} is a positional parameter: write :name")
        elif token.kind == "other" and token.text == "\\":
            self._fault("psql's backslash commands are not part of the file format: use SQL and -- think:")
        elif any("pg_sleep" in spelling.lower() for spelling in _spellings(self._literal(token))):
            self._fault("pg_sleep is refused: a sleeping backend shows as PgSleep; write -- think: 2s for time in the app")

    def _literal(self, token: _Token) -> str:
        """The text of a token, joined to the literal in the line above where PostgreSQL joins them."""
        joined = token.text
        if token.kind in ("string", "escaped"):
            if self._open_literal and "\n" in self._gap:
                joined = self._open_literal[:-1] + joined[1:]
            self._open_literal = joined
        else:
            self._open_literal = ""
        return joined

    def _is_slice(self, token: _Token) -> bool:
        """In `a[lo:hi]` the colon follows an operand directly, where a parameter never can."""
        before = self._previous
        if before is None or self._nesting[-1:] != ["["]:
            return False
        return before.kind in ("word", "number", "parameter", "quoted") or before.text in (")", "]")

    def _nest(self, token: _Token) -> None:
        if token.kind == "other":
            if token.text in "([":
                self._nesting.append(token.text)
            elif token.text in ")]" and self._nesting:
                self._nesting.pop()
        elif token.kind == "word":
            word = token.text.lower()
            if word == "atomic" and self._last_word == "begin":
                self._atomic = 1
            elif self._atomic and word in ("case", "begin"):
                self._atomic += 1
            elif self._atomic and word == "end":
                self._atomic -= 1
            self._last_word = word

    def _emit(self, text: str) -> None:
        gap = self._gap if self._started else ""
        if not self._started or "\n" in gap:
            self._lines.append(self._line)
        self._lines.extend(self._line + 1 + extra for extra in range(text.count("\n")))
        self._parts += gap, text
        self._gap = ""

    def _end_statement(self) -> None:
        if self._started:
            self._steps.append(Statement("".join(self._parts), tuple(self._parameters), tuple(self._lines)))
        self._begin_statement()

    def _fault(self, message: str, line: int | None = None) -> None:
        self.faults.append(Fault(self._path, line or self._line, message))
