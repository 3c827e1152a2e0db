"""What a report shows of a ledger: the rows that count, and earlier takes whose clips still lie there."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dailies.pipeline.report.figures import prompt_groups
from dailies.pipeline.run import ledger
from dailies.pipeline.run.current import is_current
from dailies.pipeline.run.layout import CLIPS, POSTERS, clip_id_in, poster_id_in
from dailies.pipeline.run.ledger_row import DAMAGED
from dailies.pipeline.store import Store


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """Of one run folder."""

    table: pa.Table                     # the rows that count, and those that a newer take replaced: `current` tells
    waiting: int                        # other takes that are to be made
    dropped: int                        # rows that a person took out
    unrecorded: int                     # clips that no row has ever named
    spent_gpu_s: float                  # of all that was ever made, also of what counts no more

    @classmethod
    def read(cls, store: Store) -> "RunRows":
        """With what people decided of each row.  Raises StoreError."""
        # in the order opposite to a clip's own, so that none of what comes meanwhile seems to lack its row or poster
        clips = {clip_id for info in store.list(f"{CLIPS}/") if (clip_id := clip_id_in(info.key))}
        ever = ledger.rows_ever_written(store)
        rows = ledger.read(store, put_back=True, every_take=True, written=ever)
        posters = {poster_id_in(info.key) for info in store.list(f"{POSTERS}/")}
        strays = clips - set(ever["clip_id"].unique().to_pylist())
        status, counts = rows["status"], pa.array(is_current(rows))
        again = pc.fill_null(pc.equal(rows["error_type"], DAMAGED), False)
        waiting = pc.and_(pc.and_(counts, pc.equal(status, "pending")), pc.invert(again))
        dropped = pc.and_(pa.array(is_current(rows, dropped=True)), pc.equal(status, "dropped"))
        names = rows["clip_id"].fill_null("")
        rows = rows.append_column("current", counts).append_column("poster", ledger.is_one_of(names, posters))
        # of an earlier take that gc has deleted there is nothing to see
        shown = pc.and_(ledger.is_one_of(status, ["done", "failed"]), pc.or_(counts, ledger.is_one_of(names, clips)))
        return cls(table=rows.filter(shown), waiting=num_true(waiting), dropped=num_true(dropped),
                   unrecorded=len(strays), spent_gpu_s=spent(ever))


def spent(ever: pa.Table) -> float:
    """GPU seconds of all rows that were ever written; those of rows that share a clip, and of a row that was only
    written again, once."""
    made = ever.filter(pc.is_finite(ever["gpu_s"].fill_null(0.0))).group_by(["clip_id", "gpu_s"]).aggregate([])
    return float(pc.sum(made["gpu_s"]).as_py() or 0)


def num_true(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def one_table(runs: Sequence[RunRows]) -> pa.Table:
    """All rows in one table, with the run that each is of, and which of them share a prompt."""
    marked = [run.table.append_column("run", pa.array(np.full(run.table.num_rows, number, np.int32)))
              for number, run in enumerate(runs)]
    rows = ledger.together(marked)
    return rows.append_column("prompt_group", prompt_groups(rows["prompt"]))


def missing_posters(rows: pa.Table) -> int:
    return num_true(pc.and_(pc.equal(rows["status"], "done"), pc.invert(rows["poster"])))
