"""A run folder grows: another manifest rendered into it makes what is new, and never what is done.

Rows are joined by id and seed. A row of the ledger that the manifest no longer has stays. One that asks for another
clip than it did is `changed`, and refused by name unless a person says what is to become of it; not so where only the
defaults for rows that do not say are others: such a row keeps what it was rendered with. manifests/ has a record of
each manifest that was given.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dailies.actors.messages import Request
from dailies.model.card import ModelCard
from dailies.model.settings import DEFAULTED
from dailies.pipeline.manifest.manifest import MADE_ID
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.plan import LISTED_IN_SUMMARY, RESEEDS, Except, Plan, with_another_seed
from dailies.pipeline.resolved import Defaults
from dailies.pipeline.run import ledger
from dailies.pipeline.run.current import is_current, slots
from dailies.pipeline.run.layout import MANIFESTS, manifest_key, manifest_number
from dailies.pipeline.run.ledger_row import DAMAGED
from dailies.pipeline.run.run_json import (
    BUCKET_SHAPE,
    MAX_DEFAULTS,
    SUMMED,
    OtherRun,
    known_manifest,
    run_format,
    without_secrets,
)
from dailies.pipeline.store import Store

NAMED = 20                                              # of the rows that have changed
Key = tuple[str, int | None]                            # id and seed; None of a row that was never a request


@dataclass(frozen=True, kw_only=True)
class Change:
    """How the rows of a plan stand to those of the folder's ledger, samples counted."""

    rows_before: int                                    # of the manifest that was rendered before
    rows: int                                           # of this one
    new: int = 0                                        # without a row in the ledger
    done: int = 0
    failed: int = 0
    gone: int = 0                                       # rows of the ledger that the manifest does not have
    changed: Mapping[Key, str] = field(default_factory=dict)      # and the clip that each has
    kept: int = 0                                       # that were made with other defaults
    defaults: tuple[str, ...] = ()                      # for rows that do not say: what is another one than before
    is_other_file: bool = True

    @property
    def changed_ids(self) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.changed))

    @property
    def is_none(self) -> bool:
        return not (self.new or self.gone or self.changed or self.defaults)

    def __str__(self) -> str:
        said = []
        if self.is_other_file or not self.defaults:
            said.append(f"the manifest has changed: {self.rows_before:,} row{'s' * (self.rows_before != 1)} then, "
                        f"{self.rows:,} now. What is done stays, rows that are gone too; {self.new:,} new")
        if self.defaults:
            said.append(f"for rows that do not say, {', '.join(self.defaults)}"
                        + f"; {self.kept:,} that are done keep what they were made with" * bool(self.kept))
        if self.changed:
            said.append(f"{len(self.changed):,} ask for something else than they did")
        return "; ".join(said)


def digests_of(plan: Plan) -> dict[str, str | None]:
    """What tells one manifest from another: the bytes of its files, and those of its images."""
    return {"manifest_digest": plan.manifest.digest, "images_digest": plan.images_digest}


def defaults_of(said: Mapping[str, Any], card: ModelCard) -> Defaults | None:
    """As a run folder tells of them; None where it tells of none that could be."""
    try:
        return Defaults(**{setting.name: said.get(setting.name) for setting in DEFAULTED}).resolved(card)
    except (TypeError, ValueError):
        return None


def is_known(known: Mapping[str, Any], plan: Plan) -> bool:
    """Whether the folder was rendered for these rows last, and nobody said that changed ones are to be made."""
    if known["changed"] == "render":
        return False
    then = defaults_of(known["defaults"], plan.card)
    is_file = digests_of(plan).items() <= known.items() and then is not None and then.said == plan.defaults.said
    return is_file or plan.rows_digest == known.get("rows_digest")


def change(store: Store, run: Mapping[str, Any], plan: Plan, *, changed: str | None = None) -> Change | None:
    """How the plan's rows differ from those that the folder was rendered for; None where they are the same, however
    they are stored.

    changed: what is to become of rows that have changed: "render", "keep" or None.
    Raises OtherRun, naming them, for rows of the ledger that ask for another clip than they did, where nobody says.
    """
    known = known_manifest(store, run)
    if is_known(known, plan):
        return None
    found = compare(store, plan, known)
    if found.changed and changed is None:
        names, more = found.changed_ids, ""
        if len(names) > NAMED:
            more = f" and {len(names) - NAMED:,} more"
        by = "by id" if run_format(run) > 1 else "by id; where a manifest has no ids, by position"
        raise OtherRun(
            f"{store.uri} was rendered for other content of {len(names):,} row{'s' * (len(names) != 1)}: "
            f"{', '.join(map(shown, names[:NAMED]))}{more} ({by}). Of the others {found.done:,} are done, "
            f"{found.new:,} new; {found.gone:,} that are there are not in this manifest. --changed render makes what "
            "has changed again, and it replaces what is there; --changed keep leaves it. Or give what has changed an "
            "id of its own, or choose another output folder")
    if found.is_none:
        return None                                     # saved again, in other bytes
    return found


def compare(store: Store, plan: Plan, known: Mapping[str, Any]) -> Change:
    """Of every row of the plan whether it is new, done, failed or changed, and how many are gone, by the ledger.

    known: what the folder was rendered for before.  Raises StoreError.
    """
    written = ledger.rows_of_keys(store, ["id", "seed", "clip_id", "status"])
    counts = is_current(written) & pc.is_in(written["status"], pa.array(["done", "failed"])).to_numpy(
        zero_copy_only=False)
    keys = plan.keys()
    gone = num_gone(plan, keys, written.filter(pa.array(counts)))
    written = written.filter(pc.not_equal(written["status"], "pending"))
    place = places(keys, written)
    there = keys.filter(pa.array(place >= 0))
    written = written.take(pa.array(place[place >= 0])).select(["clip_id", "status"])      # beside `there`, row by row
    differs = pc.fill_null(pc.not_equal(written["clip_id"], there["clip_id"]), False)
    differing = dict(zip(ledger.keys_of(there.filter(differs)), written["clip_id"].filter(differs).to_pylist(),
                         strict=True))
    with_other_defaults = made_with_other_defaults(plan, known, differing)
    others = {key: has for key, has in differing.items() if key not in with_other_defaults}
    instead = with_their_clip(plan, others) if others else set()
    changed = {key: has for key, has in others.items() if key not in instead}
    statuses = ledger.counts_of(written["status"])
    if changed:
        stays = pa.array([key not in changed for key in ledger.keys_of(there)], pa.bool_())
        statuses = ledger.counts_of(written["status"].filter(stays))
    done, failed, new = statuses["done"], statuses["failed"], keys.num_rows - there.num_rows
    return Change(rows_before=known["rows"], rows=plan.manifest.table.num_rows, new=new, done=done, failed=failed,
                  gone=gone, changed=changed, kept=len(with_other_defaults), defaults=differences(known, plan),
                  is_other_file=known["manifest_digest"] != plan.manifest.digest)


def differences(known: Mapping[str, Any], plan: Plan) -> tuple[str, ...]:
    """What rows that do not say get now, and did not get before."""
    then = defaults_of(known["defaults"], plan.card)
    return () if then is None else tuple(f"{name} was {shown(then[name])}, is {shown(value)}"
                                         for name, value in plan.defaults.items() if then[name] != value)


def places(keys: pa.Table, written: pa.Table) -> np.ndarray:
    """Of each key its row in `written`, -1 for none."""
    left = ledger.comparable(keys).append_column("at", pa.array(np.arange(keys.num_rows)))
    right = ledger.comparable(written).append_column("there", pa.array(np.arange(written.num_rows)))
    joined = left.join(right, ["id", "seed"], join_type="inner")
    found = np.full(keys.num_rows, -1)
    found[joined["at"].to_numpy()] = joined["there"].to_numpy()
    return found


def num_gone(plan: Plan, keys: pa.Table, current: pa.Table) -> int:
    """Rows of the ledger, takes counted as the row that they are of, which the plan does not have."""
    rows = pa.table({"id": current["id"], "seed": slots(current)})
    gone = ledger.comparable(rows).join(ledger.comparable(keys), ["id", "seed"], join_type="left anti")
    if not gone.num_rows or not plan.num_invalid_rows:
        return gone.num_rows
    invalid = {row.id for row in plan.invalid_rows()}
    return sum(not (seed == -1 and name in invalid) for name, seed in ledger.keys_of(gone))


def made_with_other_defaults(plan: Plan, known: Mapping[str, Any], differing: Mapping[Key, str]) -> set[Key]:
    """The rows that ask for what they did, but for the defaults of another night: their clip is the one of then."""
    found: set[Key] = set()
    tried = [plan.defaults.said]
    for said in (known["defaults"], *reversed(known["earlier_defaults"])):
        left = {key: has for key, has in differing.items() if key not in found}
        then = defaults_of(said, plan.card)
        if left and then is not None and then.said not in tried:
            tried.append(then.said)
            found |= with_their_clip(plan.with_defaults(then), left)
    return found


def with_their_clip(plan: Plan, clips: Mapping[Key, str]) -> set[Key]:
    """The rows that have the clip that they ask for, or one that was made in its place with another seed."""
    asked = {(name, seed): clip_id for name, seed, clip_id in ledger.values_of(plan.keys(), "id", "seed", "clip_id")
             if (name, seed) in clips}
    found = {key for key, clip_id in asked.items() if clips[key] == clip_id}
    wanted = {clip_id for key, clip_id in asked.items() if key not in found}
    instead = {request.clip_id: made_instead(request) for request in
               (plan.requests(skip=Except(wanted)) if wanted else ())}
    return found | {key for key, clip_id in asked.items() if key not in found and clips[key] in instead[clip_id]}


def made_instead(rejected: Request) -> set[str]:
    """The clips that a row may have in place of one that the gate rejected."""
    found: set[str] = set()
    for _ in range(RESEEDS):
        rejected = with_another_seed(rejected)
        found.add(rejected.clip_id)
    return found


def is_recorded(run: Mapping[str, Any], known: Mapping[str, Any], plan: Plan) -> bool:
    """Whether the last record, or a run.json from before there were any, is of this manifest as it is given now."""
    then = defaults_of(known["defaults"], plan.card)
    return ((known.get("is_recorded", False) or run_format(run) == 1) and digests_of(plan).items() <= known.items()
            and then is not None and then.said == plan.defaults.said)


def grow(store: Store, run: Mapping[str, Any], plan: Plan, changed: Mapping[Key, str], policy: str | None) -> None:
    """Write down that the folder is rendered for this manifest now, and how much that is with what it has besides.

    To be called by the driver that holds the lease. Rows that were invalid, and are not any more, leave the ledger.
    changed: rows that have changed, and what is to become of them.
    """
    policy = policy if changed else None
    known = known_manifest(store, run)
    if is_recorded(run, known, plan) and known["changed"] == policy:
        return
    rows = ledger.rows_of_keys(store, ["id", "seed", "clip_id", "status", "error_type", *BUCKET_SHAPE])
    rows = rows.filter(pa.array(is_current(rows, dropped=True)))
    keys = plan.keys()
    asked = set(ledger.keys_of(keys.filter(pc.is_in(keys["id"], rows["id"].combine_chunks()))))     # and in the ledger
    valid, invalid = {name for name, _ in asked}, {row.id for row in plan.invalid_rows()}
    mended: set[tuple[str, int | None]] = set()
    there: set[Key] = set()                             # rows of the plan that have a clip, or failed
    clips: dict[str, tuple] = {}                        # of the ledger, and their shapes
    kept: dict[tuple[str, int | None], bool] = {}       # rows of the ledger that the plan does not have; which invalid
    for name, seed, slot, status, clip_id, error_type, *shape in ledger.values_of(
            rows.append_column("slot", slots(rows)), "id", "seed", "slot", "status", "clip_id", "error_type",
            *BUCKET_SHAPE):
        if status == "pending" and error_type != DAMAGED:
            continue                                    # another take, which is counted beside the rows
        if error_type == "invalid" and (name in valid or name not in invalid and MADE_ID.fullmatch(name)):
            mended.add((name, seed))
            continue
        if policy == "render" and (name, slot) in changed:
            continue                                    # it gets another clip
        if (name, slot) in asked:
            there.add((name, slot))
        elif not (slot is None and name in invalid):
            kept[name, slot] = error_type == "invalid"
        if clip_id:
            clips[clip_id] = tuple(shape)
    ledger.take_out(store, mended)
    to_make = {clip_id for name, seed, clip_id in ledger.values_of(keys, "id", "seed", "clip_id")
               if (name, seed) not in there} - clips.keys()
    summary = plan.summary()
    earlier = [said for said in (*known["earlier_defaults"], known["defaults"] if known["rows"] else None) if said]
    said = {name: summary[name] for name in SUMMED}
    num_invalid = sum(kept.values())
    said |= {"planned_rows": summary["planned_rows"] + len(kept) - num_invalid,
             "invalid_rows": summary["invalid_rows"] + num_invalid, "clips": len(to_make) + len(clips),
             **merged(plan.buckets(only=to_make), Counter(clips.values())),
             "name": plan.manifest.name, "rows_digest": plan.rows_digest, **digests_of(plan),
             "defaults": plan.defaults.said, "earlier_defaults": distinct(earlier)[-MAX_DEFAULTS:], "changed": policy,
             "given_at": datetime.now(UTC).isoformat(timespec="seconds")}
    number = 1 + max((manifest_number(info.key) for info in store.list(f"{MANIFESTS}/")), default=0)
    store.put(manifest_key(number, plan.rows_digest[:16]),
              json.dumps(without_secrets(said), indent=2).encode() + b"\n")


def distinct(sets: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of what was said as defaults each once, in order; a run.json of format 1 says other things among them."""
    names = [setting.name for setting in DEFAULTED]
    found: list[dict[str, Any]] = []
    for said in sets:
        if (own := {name: said[name] for name in names if name in said}) not in found:
            found.append(own)
    return found


def merged(buckets: list[dict[str, Any]], more: Counter[tuple]) -> dict[str, Any]:
    """The plan's buckets with the clips of other rows in them, or behind them."""
    shapes = {tuple(bucket.get(name) for name in BUCKET_SHAPE): bucket for bucket in buckets}
    for shape, clips in more.items():
        shapes.setdefault(shape, dict(zip(BUCKET_SHAPE, shape, strict=True)) | {"clips": 0})
        shapes[shape]["clips"] += clips
    found = list(shapes.values())
    return {"buckets": found[:LISTED_IN_SUMMARY], "more_buckets": len(found[LISTED_IN_SUMMARY:])}
