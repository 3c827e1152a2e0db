"""A run folder grows: another manifest rendered into it makes what is new, and never what is done.

Rows are joined by id and seed. A row of the ledger that the manifest no longer has stays; one that asks for another
clip than it did is refused by name. manifests/ tells which manifests there were after the one of run.json.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dailies.actors.messages import Request
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.plan import LISTED_IN_SUMMARY, RESEEDS, Except, Plan, with_another_seed
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import MANIFESTS, manifest_key, manifest_number
from dailies.pipeline.run.run_json import BUCKET_SHAPE, SUMMED, OtherRun, known_manifest, without_secrets
from dailies.pipeline.store import Store

NAMED = 5                                               # of the rows that have changed


@dataclass(frozen=True, kw_only=True)
class Change:
    """How a manifest differs from the one that the folder was rendered for before."""

    rows_before: int
    rows: int
    new: int                                            # rows and samples without a row in the ledger

    def __str__(self) -> str:
        return (f"the manifest has changed: {self.rows_before:,} row{'s' * (self.rows_before != 1)} then, "
                f"{self.rows:,} now. What is done stays, rows that are gone too; {self.new:,} to make")


def digests_of(plan: Plan) -> dict[str, str | None]:
    """What tells one manifest from another: the bytes of its files, those of its images, and what its rows ask for."""
    return {"manifest_digest": plan.manifest.digest, "images_digest": plan.images_digest}


def change(store: Store, run: Mapping[str, Any], plan: Plan) -> Change | None:
    """How the plan's manifest differs from the known one; None where all its rows are those, however it is stored.

    Raises OtherRun, naming them, if rows of the ledger ask for another clip than they did.
    """
    known = known_manifest(store, run)
    if digests_of(plan).items() <= known.items() or plan.rows_digest == known.get("rows_digest"):
        return None
    keys = plan.keys()
    written = ledger.read(store, ["id", "seed", "clip_id"])
    clip_of = {(name, seed): clip_id for name, seed, clip_id in
               ledger.values_of(written, "id", "seed", "clip_id") if clip_id}
    asked = list(ledger.values_of(keys, "id", "seed", "clip_id"))
    differing = {(name, clip_id): clip_of[name, seed] for name, seed, clip_id in asked
                 if clip_of.get((name, seed), clip_id) != clip_id}
    instead = {request.clip_id: made_instead(request) for request in
               (plan.requests(skip=Except({clip_id for _, clip_id in differing})) if differing else ())}
    names = list(dict.fromkeys(name for (name, clip_id), made in differing.items() if made not in instead[clip_id]))
    if names:
        raise OtherRun(
            f"{store.uri} was rendered for other content of {len(names):,} row{'s' * (len(names) != 1)}: "
            f"{', '.join(map(shown, names[:NAMED]))}{', ...' if len(names) > NAMED else ''} (by id; where a manifest "
            "has no ids, by position). Give what has changed an id of its own, and only that is made; or choose "
            "another output folder")
    new = sum((name, seed) not in clip_of for name, seed, _ in asked)
    if not new and len(asked) == len(clip_of):
        return None                                     # saved again, in other bytes
    return Change(rows_before=known["rows"], rows=plan.manifest.table.num_rows, new=new)


def made_instead(rejected: Request) -> set[str]:
    """The clips that a row may have in place of one that the gate rejected."""
    found: set[str] = set()
    for _ in range(RESEEDS):
        rejected = with_another_seed(rejected)
        found.add(rejected.clip_id)
    return found


def grow(store: Store, plan: Plan) -> None:
    """Write down that the folder is rendered for this manifest now, and how much that is with what it has besides.

    To be called by the driver that holds the lease. Rows that were invalid, and are not any more, leave the ledger.
    """
    columns = ["id", "seed", "clip_id", "error_type", *BUCKET_SHAPE]
    keys = plan.keys()
    asked, clips = set(ledger.keys_of(keys)), set(keys["clip_id"].to_pylist())
    valid = {name for name, _ in asked}
    invalid = {row.id for row in plan.invalid_rows()}
    mended: set[tuple[str, int | None]] = set()
    beside: dict[str, tuple] = {}                       # clips of rows that are in the ledger alone, and their shapes
    num_kept = num_invalid = 0                          # of such rows
    for name, seed, clip_id, error_type, *shape in ledger.values_of(ledger.read(store, columns), *columns):
        if error_type == "invalid" and name in valid:
            mended.add((name, seed))
        elif (name, seed) not in asked and not (seed is None and name in invalid):
            num_kept, num_invalid = num_kept + 1, num_invalid + (error_type == "invalid")
            if clip_id and clip_id not in clips:
                beside[clip_id] = tuple(shape)
    ledger.take_out(store, mended)
    summary = plan.summary()
    said = {name: summary[name] for name in SUMMED}
    said |= {"planned_rows": summary["planned_rows"] + num_kept - num_invalid,
             "invalid_rows": summary["invalid_rows"] + num_invalid, "clips": plan.num_clips + len(beside),
             **merged(plan.buckets(), Counter(beside.values())),
             "name": plan.manifest.name, "rows_digest": plan.rows_digest, **digests_of(plan),
             "given_at": datetime.now(UTC).isoformat(timespec="seconds")}
    number = 1 + max((manifest_number(info.key) for info in store.list(f"{MANIFESTS}/")), default=0)
    store.put(manifest_key(number, plan.rows_digest[:16]),
              json.dumps(without_secrets(said), indent=2).encode() + b"\n")


def merged(buckets: list[dict[str, Any]], more: Counter[tuple]) -> dict[str, Any]:
    """The plan's buckets with the clips of other rows in them, or behind them."""
    shapes = {tuple(bucket.get(name) for name in BUCKET_SHAPE): bucket for bucket in buckets}
    for shape, clips in more.items():
        shapes.setdefault(shape, dict(zip(BUCKET_SHAPE, shape, strict=True)) | {"clips": 0})
        shapes[shape]["clips"] += clips
    found = list(shapes.values())
    return {"buckets": found[:LISTED_IN_SUMMARY], "more_buckets": len(found[LISTED_IN_SUMMARY:])}
