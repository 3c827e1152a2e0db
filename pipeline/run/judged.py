"""What is said of rows beside the ledger's parts: what people decided, and which samples are selected.

Both are columns of `read`, and stand in no part: a decision comes after its row, and which of a row's samples is the
best one is known when all are there.
"""

import math

import pyarrow as pa
import pyarrow.compute as pc

from dailies.pipeline.run.ledger_row import ALL_MEASURES
from dailies.pipeline.run.picks import DECIDED, STORED, read_picks
from dailies.pipeline.store import Store

BESIDE = (*DECIDED, "selected")
NEEDS = {**dict.fromkeys(DECIDED, ("clip_id",)), "selected": ("keep", "keep_by", "sample", ALL_MEASURES)}


def with_judgements(store: Store, table: pa.Table, counts: pa.Array, wanted: tuple[str, ...]) -> pa.Table:
    """The table with these columns of BESIDE.  table: id, seed, status and NEEDS of each, as far as there are.

    counts: of each row whether it is a current one.  Raises StoreError.
    """
    table = table.drop_columns([name for name in BESIDE if name in table.column_names])     # no part has them
    if any(name in DECIDED for name in wanted):
        picks = read_picks(store)
        for name, column in zip(DECIDED, decided(table, picks), strict=True):
            table = table.append_column(pa.field(name, STORED.field(name).type), column)
    return table.append_column("selected", selected(table, counts)) if "selected" in wanted else table


def decided(table: pa.Table, picks: pa.Table) -> list[pa.ChunkedArray | pa.Array]:
    """DECIDED of each row; of a row whose clip is another one by now nobody has decided."""
    if not picks.num_rows or not table.num_rows or "clip_id" not in table.column_names:
        return [pa.nulls(table.num_rows, STORED.field(name).type) for name in DECIDED]
    place = {key: at for at, key in enumerate(zip(*(picks[name].to_pylist() for name in ("id", "seed", "clip_id")),
                                                  strict=True))}
    near = pc.is_in(table["clip_id"], picks["clip_id"].combine_chunks())
    at: list[int | None] = [None] * table.num_rows
    rows = table.select(["id", "seed", "clip_id"])
    for number in pc.indices_nonzero(near).to_pylist():
        at[number] = place.get(tuple(column[number].as_py() for column in rows.columns))
    places = pa.array(at, pa.int64())
    return [picks[name].combine_chunks().take(places) for name in DECIDED]


def selected(table: pa.Table, counts: pa.Array) -> pa.Array:
    """Of each row whether it is one of the `keep` best of its manifest row's samples by `keep_by`; null where nobody
    asked, where it has no clip, and of what a newer take has replaced. What lacks the measure comes last, and of equals
    the first sample first."""
    keep = table["keep"] if "keep" in table.column_names else None
    if keep is None or keep.null_count == table.num_rows:
        return pa.nulls(table.num_rows, pa.bool_())
    samples: dict[str, list[tuple[float, int, int]]] = {}
    most: dict[str, int] = {}
    asked = pc.and_(pc.and_(pc.is_valid(keep), pc.equal(table["status"], "done")), counts)
    for at in pc.indices_nonzero(pc.fill_null(asked, False)).to_pylist():
        name, by = table["id"][at].as_py(), table["keep_by"][at].as_py() or ""
        column = by.removeprefix("-")
        value = table[column][at].as_py() if column in table.column_names else None
        rank = math.inf
        if isinstance(value, (int, float)) and not math.isnan(value):
            rank = float(value if by.startswith("-") else -value)
        samples.setdefault(name, []).append((rank, table["sample"][at].as_py() or 0, at))
        most[name] = keep[at].as_py()
    found: list[bool | None] = [None] * table.num_rows
    for name, ranked in samples.items():
        for place, (_, _, at) in enumerate(sorted(ranked)):
            found[at] = place < most[name]
    return pa.array(found, pa.bool_())
