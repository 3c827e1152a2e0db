"""What a night comes to, from its ledger alone: how many, how fast, who was busy when, what failed and what it cost."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dailies.pipeline.run.ledger_row import OTHER_STAGES
from dailies.pipeline.run.pace import LEAST_RATE_S

SLICES = (12, 72)                       # of the night, in its pictures: of few clips, and of many
LATE_FIRST = ("publish_s", "decode_s", "sample_s", "encode_s")     # a clip's stages, the last first
EXAMPLES, MOST_KINDS = 3, 40            # rows named of a failure; kinds of failures told one by one


def figures(table: pa.Table, counts: Mapping[str, Any], price: float | None, *, spent_gpu_s: float,
            waiting: int = 0, dropped: int = 0) -> dict[str, Any]:
    """table: the rows of the ledger that count, all columns.  counts: what the run's manifests ask for: planned_rows,
    invalid_rows.

    price: USD per GPU hour, None where nobody said one.  spent_gpu_s: of all that was ever made, also of rows that
    count no more.  waiting: other takes that are to be made.  dropped: rows that a person took out.
    """
    status = table["status"]
    done, failed = (int(pc.sum(pc.equal(status, said)).as_py() or 0) for said in ("done", "failed"))
    rows = counts["planned_rows"] + counts["invalid_rows"] - dropped
    clips = one_row_per_clip(table.filter(pc.equal(status, "done")))
    of_clips = float(seconds(clips, "gpu_s").sum()) / 3600
    gpu_hours = spent_gpu_s / 3600
    return {
        "rows": max(rows, done + failed), "done": done, "failed": failed,
        "pending": max(0, rows - done - failed) + waiting, "takes": waiting, "dropped": dropped,
        "clips": clips.num_rows, "bytes": int(total(clips, "bytes")),
        "duration_s": round(total(clips, "duration_s"), 1),
        "with_audio": int(pc.sum(clips["has_audio"].cast(pa.int8())).as_py() or 0),
        "gpu_hours": round(gpu_hours, 4), "clips_gpu_hours": round(of_clips, 4), "price": price,
        "cost": None if price is None or not gpu_hours else round(price * gpu_hours, 2),
        "night": when_made(clips), "failures": failures(table.filter(pc.equal(status, "failed"))),
        "devices": counted_values(clips, "device"), "fallbacks": said_lists(clips, "fallbacks"),
        "notes": said_lists(clips, "notes"),
    }


def one_row_per_clip(table: pa.Table) -> pa.Table:
    """Rows that share a clip were made once; the first stands for all."""
    numbered = pa.table({"clip_id": table["clip_id"], "at": np.arange(table.num_rows)})
    first = numbered.group_by("clip_id", use_threads=False).aggregate([("at", "min")])["at_min"]
    return table if len(first) == table.num_rows else table.take(first)


def seconds(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.zeros(table.num_rows)
    return np.nan_to_num(table[name].cast(pa.float64()).fill_null(0.0).to_numpy())


def total(table: pa.Table, name: str) -> float:
    return float(pc.sum(table[name]).as_py() or 0)


def when_made(clips: pa.Table) -> dict[str, Any]:
    """When the clips were made: by slices of the night how many per hour, and how many copies of each stage were busy.

    The ledger has a clip's end and its seconds in each stage. They are laid end to end before it; what a clip waited
    in between is not told apart, so a stage's edges are off by so much.
    """
    timed = clips.filter(pc.and_(pc.is_valid(clips["finished_at"]), pc.is_valid(clips["worker"])))
    if not timed.num_rows:
        return {"began": None, "ended": None, "clips_per_hour": None, "slice_s": None, "per_hour": [], "stages": []}
    ended = timed["finished_at"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy() / 1e6
    others = sorted(name for name in timed.column_names if name.startswith(OTHER_STAGES))
    upto, spans = ended, {}
    for name in (LATE_FIRST[0], LATE_FIRST[1], *others, *LATE_FIRST[2:]):
        spent = seconds(timed, name)
        spans[name] = (upto - spent, upto)
        upto = upto - spent
    first, last = float(upto.min()), float(ended.max())
    slices = int(np.clip(timed.num_rows // 2, *SLICES))
    edges = np.linspace(first, max(last, first + LEAST_RATE_S), slices + 1)
    width = edges[1] - edges[0]
    working = worked_seconds(upto, ended)
    made = np.histogram(ended, edges)[0]
    work = {name: float((end - start).sum()) for name, (start, end) in spans.items()}
    whole = sum(work.values()) or 1.0
    stages = [{"stage": name.removeprefix(OTHER_STAGES).removesuffix("_s") if name in LATE_FIRST
               else name.removeprefix(OTHER_STAGES), "seconds": round(work[name], 1),
               "share": round(work[name] / whole, 4), "busy": [round(float(each), 3) for each in
                                                               np.diff(seconds_before(*spans[name], edges)) / width]}
              for name in reversed(spans) if work[name] > 0]
    return {"began": round(first, 1), "ended": round(last, 1), "worked_s": round(working, 1),
            "clips_per_hour": round(timed.num_rows * 3600 / working, 1) if working >= LEAST_RATE_S else None,
            "slice_s": float(width), "per_hour": [round(float(each) * 3600 / width, 1) for each in made],
            "stages": stages}


def seconds_before(starts: np.ndarray, ends: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many seconds of all spans lie before each edge."""
    def before(moments: np.ndarray) -> np.ndarray:      # the sum of max(0, edge - moment)
        ordered = np.sort(moments)
        count = np.searchsorted(ordered, edges)
        return count * edges - np.concatenate([[0.0], np.cumsum(ordered)])[count]
    return before(starts) - before(ends)


def worked_seconds(starts: np.ndarray, ends: np.ndarray) -> float:
    """Seconds that lie in one span at least: the work, without the pauses between two commands."""
    order = np.argsort(starts)
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    gaps = np.maximum(0.0, starts[1:] - ends[:-1]).sum()
    return float(ends[-1] - starts[0] - gaps) if len(starts) else 0.0


def failures(failed: pa.Table) -> list[dict[str, Any]]:
    """Failed rows by cause: error_type, then what was said without numbers and names; the most frequent first."""
    columns = [failed[name].to_pylist() for name in ("error_type", "error", "id", "prompt")]
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for error_type, error, name, prompt in zip(*columns, strict=True):
        said = (error or "").partition("\n")[0][:400]
        cause = (error_type or "unknown", re.sub(r"\d+(\.\d+)?|0x[0-9a-f]+|'[^']*'|\[stack .*?\]", "#", said)[:160])
        kind = kinds.setdefault(cause, {"error_type": cause[0], "count": 0, "error": said, "examples": []})
        kind["count"] += 1
        if len(kind["examples"]) < EXAMPLES:
            kind["examples"].append({"id": name, "prompt": (prompt or "")[:160]})
    found = sorted(kinds.values(), key=lambda kind: -kind["count"])
    if more := found[MOST_KINDS:]:
        found = [*found[:MOST_KINDS], {"error_type": "", "count": sum(kind["count"] for kind in more), "examples": [],
                                  "error": f"{len(more):,} more kinds"}]
    return found


def counted_values(table: pa.Table, name: str) -> list[tuple[str, int]]:
    if name not in table.column_names:
        return []
    found = pc.value_counts(table[name].drop_null())
    pairs = zip(found.field("values").to_pylist(), found.field("counts").to_pylist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])[:20]


def said_lists(table: pa.Table, name: str) -> list[tuple[str, int]]:
    """What the lists of a column say, and of how many clips."""
    if name not in table.column_names:
        return []
    return counted_values(pa.table({name: pc.list_flatten(table[name])}), name)


def prompt_groups(prompts: pa.ChunkedArray) -> pa.ChunkedArray:
    """A number for each prompt: rows of one prompt stand side by side."""
    found = prompts.fill_null("").dictionary_encode()   # the chunks have one dictionary
    return pa.chunked_array([chunk.indices for chunk in found.chunks], pa.int32())
