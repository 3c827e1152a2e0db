"""The ledger as a page reads it: pages of what a clip's tile shows, and each other column in blocks, as one file each.

A column that has one value throughout is said once, in the head. Numbers have seven digits: a page is for looking, the
ledger has them whole. Whole numbers that JavaScript cannot hold are text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as is_

PAGE_ROWS = 500                         # of tiles: what is fetched to show some of them
BLOCK_ROWS = 20_000                     # of one column: what is fetched to sort or filter by it
MOST_VALUES = 200                       # a column with so few is a list of them, and numbers that point into it
OFFERED = 50                            # values that a filter offers to choose from
MOST_CHARACTERS = 2000                  # of a text; the rest is in the ledger
SAFE_INTEGER = 2**53 - 1                # the largest of JavaScript
# what a tile shows and what is searched; a column among them is read from the pages alone
TILE_TEXTS = ("id", "clip_id", "seed", "prompt")
SHOWN_TOO = ("status", "width", "height", "frames", "fps", "has_audio", "sample", "poster", "prompt_group", "run",
             "decision", "decided_at", "note", "current", "selected")
LEFT_OUT = {"uri", "path"}              # said by clip_id


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A ledger in files."""

    rows: int
    columns: list[dict[str, Any]]       # of the head: name, kind, const or files, and what filters offer
    pages: list[str]                    # names of files
    files: dict[str, bytes]             # name -> content


def sheet(table: pa.Table, name_of: Any, links: Sequence[Mapping[str, Any]] | None = None) -> Sheet:
    """table: rows in the order in which they are shown, with poster, prompt_group and run.  name_of: (payload) ->
    (name, content) of a file.  links: of each page, where its clips and posters lie, if not beside the report.
    """
    files: dict[str, bytes] = {}

    def stored(payload: Any) -> str:
        name, data = name_of(payload)
        files[name] = data
        return name

    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if name in LEFT_OUT or name in TILE_TEXTS:
            continue
        kind, values = plain_values(column)
        about: dict[str, Any] = {"name": name, "kind": kind} | offered(kind, values)
        if "const" not in about:
            about["files"] = [stored(block) for block in blocks(values)]
        columns.append(about)
    columns += [{"name": name, "kind": "integer" if name == "seed" else "text", "tile": True} for name in TILE_TEXTS]
    pages = []
    shown = {name: plain_values(table[name])[1] for name in (*TILE_TEXTS, *SHOWN_TOO) if name in table.column_names}
    for number, start in enumerate(range(0, table.num_rows, PAGE_ROWS)):
        page = {name: packed_values(values[start: start + PAGE_ROWS]) for name, values in shown.items()}
        pages.append(stored(page | ({"links": links[number]} if links else {})))
    return Sheet(rows=table.num_rows, columns=columns, pages=pages, files=files)


def plain_values(column: pa.ChunkedArray) -> tuple[str, list[Any]]:
    """number, integer, time, bool or text, and the values as JSON has them; times are seconds since 1970."""
    kind = column.type
    if is_.is_dictionary(kind):
        return plain_values(column.cast(kind.value_type))
    if is_.is_timestamp(kind):
        micros = column.cast(pa.timestamp("us", kind.tz)).cast(pa.int64())
        return "time", [None if each is None else round(each / 1e6, 1) for each in micros.to_pylist()]
    if is_.is_boolean(kind):
        return "bool", [None if each is None else int(each) for each in column.to_pylist()]
    if is_.is_integer(kind):
        values = column.to_pylist()
        if max((abs(each) for each in values if each is not None), default=0) > SAFE_INTEGER:
            return "integer", [None if each is None else str(each) for each in values]
        return "number", values
    if is_.is_floating(kind) or is_.is_decimal(kind):
        return "number", [rounded(each) for each in column.cast(pa.float64()).to_pylist()]
    if is_.is_string(kind) or is_.is_large_string(kind):
        longest = pc.max(pc.utf8_length(column)).as_py() or 0
        values = column.to_pylist()
        return "text", values if longest <= MOST_CHARACTERS else list(map(cut_text, values))
    return "text", [cut_text(as_words(each)) for each in column.to_pylist()]


def rounded(value: float | None) -> float | int | None:
    """NaN and infinity have no place in JSON."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    short = float(f"{value:.7g}")
    return int(short) if short.is_integer() and abs(short) < SAFE_INTEGER else short


def cut_text(text: str | None) -> str | None:
    return text if text is None or len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS - 1] + "…"


def as_words(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "; ".join(value) or None
    return json.dumps(value, ensure_ascii=False, default=str)


def offered(kind: str, values: list[Any]) -> dict[str, Any]:
    """What a filter can offer of a column, or the one value that it has throughout."""
    distinct = set(values)
    if len(distinct) <= 1:
        return {"const": next(iter(distinct), None)}
    known = distinct - {None}
    about: dict[str, Any] = {"nulls": values.count(None)} if None in distinct else {}
    if kind in ("number", "time"):
        return about | {"least": min(known), "most": max(known)}
    return about | ({"values": sorted(map(str, known))} if len(known) <= OFFERED and
                    all(len(str(value)) <= 60 for value in known) else {})


def blocks(values: list[Any]) -> Iterator[dict[str, Any]]:
    yield from (packed_values(values[start: start + BLOCK_ROWS]) for start in range(0, len(values), BLOCK_ROWS))


def packed_values(values: list[Any]) -> dict[str, Any]:
    """{"v": values}, or {"d": distinct values, "i": where in it each is}, or {"c": the only one, "n": how often}."""
    distinct = dict.fromkeys(values)
    if len(distinct) == 1 and len(values) > 1:
        return {"c": values[0], "n": len(values)}
    worth = isinstance(values[0] if values[0] is not None else next((v for v in values if v is not None), None), str)
    if worth and len(distinct) <= min(MOST_VALUES, len(values) // 2):
        place = {value: number for number, value in enumerate(distinct)}
        return {"d": list(distinct), "i": [place[value] for value in values]}
    return {"v": values}
