"""Which rows of a ledger count: of each key the last one, and of the takes of one manifest row the newest.

Key   (id, seed). A part is never changed, so a row that is written again stands in a later one.
Take  a row that `redo` asked for has a seed of its own, and says of which row it is a take (`take_of`, the seed of the
      manifest's row) and which clip it replaces (`replaces`). It counts in that row's place once its clip is there.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dailies.pipeline.run.ledger_row import DAMAGED

JUDGED_BY = ("id", "seed", "status", "take_of", "error_type")          # the columns that tell


def latest(table: pa.Table) -> pa.Table:
    """Of the rows with one key only the last, all in their order."""
    numbered = pa.table({"id": table["id"], "seed": table["seed"], "at": np.arange(table.num_rows)})
    last = numbered.group_by(["id", "seed"]).aggregate([("at", "max")])
    if last.num_rows == table.num_rows:
        return table
    mask = np.zeros(table.num_rows, bool)
    mask[last["at_max"].to_numpy()] = True
    return table.filter(pa.array(mask))


def slots(table: pa.Table) -> pa.ChunkedArray:
    """The seed of the manifest's row that each row is of; null for one that has none."""
    if "take_of" not in table.column_names:
        return table["seed"]
    return pc.coalesce(table["take_of"].cast(pa.int64()), table["seed"])


def is_current(table: pa.Table, *, dropped: bool = False) -> np.ndarray:
    """Of each of `latest` rows whether it counts: no newer take of its manifest row is there, and nobody dropped it.

    dropped: also those that stand for a row that was.

    A take that failed replaces nothing; one that is to be made has replaced nothing yet. One whose file was damaged
    has: it is made again.
    """
    status = table["status"]
    counts = np.ones(table.num_rows, bool) if dropped else pc.not_equal(status, "dropped").to_numpy(
        zero_copy_only=False)
    if "take_of" not in table.column_names or table["take_of"].null_count == table.num_rows:
        return counts
    error_type = table["error_type"] if "error_type" in table.column_names else pa.nulls(table.num_rows, pa.string())
    again = pc.and_(pc.equal(status, "pending"), pc.fill_null(pc.equal(error_type, DAMAGED), False))
    settles = pc.or_(pc.is_in(status, pa.array(["done", "dropped"])), again).to_numpy(zero_copy_only=False)
    at = np.arange(table.num_rows)
    row = rows_of_manifest(table)
    newest = np.full(table.num_rows, -1)
    np.maximum.at(newest, row, np.where(settles, at, -1))
    return counts & (at >= newest[row])


def rows_of_manifest(table: pa.Table) -> np.ndarray:
    """One number for all takes of one manifest row, below the number of rows."""
    if not table.num_rows:
        return np.zeros(0, np.int64)
    ids = table["id"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    seeds = np.unique(slots(table).fill_null(-1).to_numpy(), return_inverse=True)[1]
    return np.unique(ids * (seeds.max() + 1) + seeds, return_inverse=True)[1]
