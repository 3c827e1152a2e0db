"""A small language to choose rows of the ledger by: `quality.motion < 0.2 and (user.mood = sad or id contains fox)`.

    expression   comparisons, joined by and, or, not, and brackets
    comparison   COLUMN = VALUE, and != < <= > >=; COLUMN contains TEXT; COLUMN in (VALUE, VALUE); COLUMN is [not] null
    VALUE        a number, true, false, a word, or text in quotes; a quote within it is written twice

It is parsed, and computed by column; nothing of it is run as a program. A comparison with null holds for no row.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as is_

from dailies.model.errors import DailiesError
from dailies.pipeline.manifest.validation import shown

MAX_CHARACTERS = 10_000
MAX_TOKENS = 600                        # words, signs and texts
MAX_DEPTH = 50                          # of brackets and `not`
TOKEN = re.compile(r"""\s*(?:(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")|(?P<sign><=|>=|!=|==|=|<|>|\(|\)|,)
                       |(?P<word>[^\s'"<>=!(),]+))""", re.X)
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": pc.equal, "==": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater,
    ">=": pc.greater_equal}
Mask = Callable[[pa.Table], Any]


class BadFilter(DailiesError, ValueError):
    """An expression that chooses no rows; the message says where it goes wrong."""


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which rows of a ledger a person means."""

    said: str
    columns: frozenset[str]
    mask_of: Mask = field(repr=False)

    @classmethod
    def parsed(cls, said: str) -> "Filter":
        """Raises BadFilter."""
        return Parser(said).whole()

    def mask(self, table: pa.Table) -> pa.ChunkedArray:
        """Of each row whether it is meant.  table: has `columns`, as far as there are.  Raises BadFilter."""
        for name in sorted(self.columns):
            if name not in table.column_names or is_.is_nested(table.schema.field(name).type):
                known = [each.name for each in table.schema if not is_.is_nested(each.type)]
                raise BadFilter(f"the ledger has no column {name} to choose rows by; it has {', '.join(known)}")
        found = self.mask_of(table)
        return pc.fill_null(found, False)


def all_of(filters: Iterable[Filter]) -> Filter:
    """What all of them choose; every row where there are none."""
    each = list(filters)

    def mask_of(table: pa.Table) -> Any:
        found = pa.chunked_array([pa.repeat(True, table.num_rows)])
        for other in each:
            found = pc.and_(found, pc.fill_null(other.mask_of(table), False))
        return found

    return Filter(said=" and ".join(other.said for other in each), mask_of=mask_of,
                  columns=frozenset().union(*(other.columns for other in each)))


def column_is(name: str, value: str) -> Filter:
    """COLUMN=VALUE as plain text: what any of the ledger's columns is written as."""
    return Filter(said=f"{name}={value}", columns=frozenset({name}),
                  mask_of=lambda table: pc.equal(table[name].cast(pa.string()), value))


class Parser:
    """One expression, read from left to right."""

    def __init__(self, said: str):
        if len(said) > MAX_CHARACTERS:
            raise BadFilter(f"an expression has at most {MAX_CHARACTERS:,} characters; this one has {len(said):,}")
        self.said, self.tokens, self.at, self.columns = said, list(tokens(said)), 0, set[str]()
        if len(self.tokens) > MAX_TOKENS:
            raise BadFilter(f"an expression has at most {MAX_TOKENS} words and signs; this has {len(self.tokens):,}")

    def whole(self) -> Filter:
        found = self.either(0)
        if self.at < len(self.tokens):
            raise self.wrong("and, or, or the end")
        return Filter(said=self.said, columns=frozenset(self.columns), mask_of=found)

    def peek(self) -> str:
        """The next word or sign, in small letters; text in quotes is none."""
        kind, token = self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")
        return token.lower() if kind in ("word", "sign") else ""

    def took(self, *wanted: str) -> bool:
        is_next = self.peek() in wanted
        self.at += is_next
        return is_next

    def wrong(self, wanted: str) -> BadFilter:
        got = shown(self.tokens[self.at][1]) if self.at < len(self.tokens) else "its end"
        return BadFilter(f"{shown(self.said)}: expected {wanted}; got {got}. For example: quality.motion < 0.2 and "
                         "user.mood = 'sad'")

    def either(self, depth: int) -> Mask:
        found = self.both(depth)
        while self.took("or"):
            found = both_masks(pc.or_kleene, found, self.both(depth))
        return found

    def both(self, depth: int) -> Mask:
        found = self.one(depth)
        while self.took("and"):
            found = both_masks(pc.and_kleene, found, self.one(depth))
        return found

    def one(self, depth: int) -> Mask:
        if depth > MAX_DEPTH:
            raise BadFilter(f"an expression is nested at most {MAX_DEPTH} deep")
        if self.took("not"):
            inner = self.one(depth + 1)
            return lambda table: pc.invert(inner(table))
        if self.took("("):
            inner = self.either(depth + 1)
            if not self.took(")"):
                raise self.wrong("and, or, or )")
            return inner
        return self.comparison()

    def comparison(self) -> Mask:
        kind, name = self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")
        if kind != "word":
            raise self.wrong("a column of the ledger")
        self.at += 1
        self.columns.add(name)
        sign = self.peek()
        if self.took(*COMPARE):
            return compared_with(name, COMPARE[sign], self.value())
        if self.took("contains"):
            text = self.value()[1]
            return lambda table: pc.match_substring(table[name].cast(pa.string()), text)
        if self.took("is"):
            negated = self.took("not")
            if not self.took("null"):
                raise self.wrong("null or not null")
            return lambda table: pc.is_valid(table[name]) if negated else pc.is_null(table[name])
        negated = self.took("not")
        if not self.took("in"):
            raise self.wrong(f"=, !=, <, <=, >, >=, contains, in or is behind {name}")
        found = self.values(name)
        return (lambda table: pc.invert(found(table))) if negated else found

    def values(self, name: str) -> Mask:
        if not self.took("("):
            raise self.wrong("(")
        found = compared_with(name, pc.equal, self.value())
        while self.took(","):
            found = both_masks(pc.or_kleene, found, compared_with(name, pc.equal, self.value()))
        if not self.took(")"):
            raise self.wrong(", or )")
        return found

    def value(self) -> tuple[bool, str]:
        """Whether it stands in quotes, and its text."""
        kind, token = self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")
        if kind not in ("word", "text"):
            raise self.wrong("a value")
        self.at += 1
        return kind == "text", token


def tokens(said: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each.  Raises BadFilter."""
    at, end = 0, len(said.rstrip())
    while at < end:
        found = TOKEN.match(said, at)
        if found is None:
            raise BadFilter(f"{shown(said)}: cannot be read from {shown(said[at:].strip())} on; is a quote not closed?")
        kind, token, at = str(found.lastgroup), found[str(found.lastgroup)], found.end()
        quote = token[0]
        yield kind, token[1:-1].replace(2 * quote, quote) if kind == "text" else token


def both_masks(how: Callable[[Any, Any], Any], one: Mask, other: Mask) -> Mask:
    return lambda table: how(one(table), other(table))


def compared_with(name: str, how: Callable[[Any, Any], Any], value: tuple[bool, str]) -> Mask:
    return lambda table: how(*in_one_type(name, table[name], value[1]))


def in_one_type(name: str, column: pa.ChunkedArray, text: str) -> tuple[Any, Any]:
    """The column and the value as what they can be compared as.  Raises BadFilter for a value that is no such thing."""
    kind = column.type
    try:
        if is_.is_boolean(kind):
            return column, {"true": True, "false": False}[text.lower()]
        if is_.is_integer(kind) and re.fullmatch(r"-?\d{1,18}", text):
            return column.cast(pa.int64()), pa.scalar(int(text), pa.int64())
        if is_.is_integer(kind) or is_.is_floating(kind) or is_.is_decimal(kind):
            return column.cast(pa.float64()), pa.scalar(float(text), pa.float64())
        if is_.is_timestamp(kind):
            moment = datetime.fromisoformat(text)
            if kind.tz is not None and moment.tzinfo is None:
                moment = moment.astimezone()            # as a clock on the wall here shows it
            return column, pa.scalar(moment, kind)
        return column.cast(pa.string()), text
    except (KeyError, ValueError, OverflowError, pa.ArrowException):
        raise BadFilter(f"{name} is {kind}, and cannot be compared with {shown(text)}") from None
