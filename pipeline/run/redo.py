"""Clips that are done and are to be made once more with another seed, takes that a person wants back after all, and
rows that a person takes out.

All write a further row for each: `ask_for_takes` one that is pending and says all that is to be made, so that the
next render makes it whatever its manifest says (takes.py); `bring_back` the earlier take's own, which is the newest
then; `drop_rows` a tombstone. Nothing is removed: what no row
names any more is for `dailies gc`. For who holds the run's lease; killed half-way, the same call does the rest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dailies.model.card import ModelCard
from dailies.model.settings import SAMPLING, SIZE
from dailies.pipeline.run import ledger
from dailies.pipeline.run.current import is_current, rows_of_manifest, slots
from dailies.pipeline.run.layout import CLIPS, SUCCESS, clip_id_in
from dailies.pipeline.run.ledger_row import COLUMNS, DAMAGED
from dailies.pipeline.run.run_json import IDENTITY, has
from dailies.pipeline.run.takes import KEPT_BY_TAKES, NotMade, request_of_row
from dailies.pipeline.run.where import BadFilter, Filter
from dailies.pipeline.store import Store

# what a row that is to be made says; the rest is of the take before
ASKED_AGAIN = {"id", "model", "weights_fingerprint", "precision", "attention", "decode_precision", "prompt",
               "negative_prompt", "fps", "image", "image_sha256", *SIZE, *KEPT_BY_TAKES,
               *(setting.name for setting in SAMPLING)}


@dataclass(frozen=True, kw_only=True)
class NewSeed:
    """Which seed another take has: so many more than the one before, or one and the same for all."""

    step: int = 1                       # 0: `seed` says which
    seed: int = 0

    @classmethod
    def parsed(cls, said: str) -> "NewSeed":
        """+1, or 42.  Raises BadFilter."""
        if not re.fullmatch(r"\+?\d{1,18}", said) or int(said) == 0 and said.startswith("+"):
            raise BadFilter(f"--seed must be +N, so many more than the clip's own, or N; got {said[:60]!r}")
        return cls(step=int(said)) if said.startswith("+") else cls(step=0, seed=int(said))

    def after(self, seed: int, taken: set[int], first: int, samples: int) -> int | None:
        """A seed that no take of the row has, nor one of its samples, which count up from `first`; None for none."""
        if not self.step:
            return None if self.seed in taken or first <= self.seed < first + samples else self.seed
        seed += self.step
        while seed in taken or first <= seed < first + samples:
            left = first + samples - seed if seed >= first else 1      # of the samples; a ledger may tell of billions
            seed += max(1, -(-left // self.step)) * self.step
        return seed if seed < 2**63 else None


@dataclass(kw_only=True)
class Redone:
    """What came of it."""

    rows: int = 0                                       # to be made once more
    waiting: int = 0                                    # that were to be already
    refused: list[str] = field(default_factory=list)    # sentences about those that cannot


def ask_for_takes(store: Store, run: Mapping[str, Any], card: ModelCard, chosen: Filter,
                  seed: NewSeed = NewSeed()) -> Redone:
    """Have other takes made of the clips that are done and chosen.

    run: run.json.  chosen: by columns of the ledger, decisions among them.  Raises BadFilter, StoreError.
    """
    table = ledger.read(store, None, put_back=True)
    others = table.filter(pc.and_(pc.equal(table["status"], "pending"),
                                  pc.fill_null(pc.not_equal(table["error_type"], DAMAGED), True)))
    waiting = set(zip(others["id"].to_pylist(), slots(others).to_pylist(), strict=True))
    rows = table.filter(pc.and_(pc.equal(table["status"], "done"), chosen.mask(table)))
    used = Used.by_takes(store)
    shared = {name: run["identity"].get(name) for name in IDENTITY} | {"fps": card.fps}
    found, new = Redone(), {}
    for row in rows.select([name for name in rows.column_names if name in COLUMNS.names]).to_pylist():
        slot = row["id"], row["seed"] if row["take_of"] is None else row["take_of"]
        if slot in waiting:
            found.waiting += 1
            continue
        try:
            new[row["id"], row["seed"]] = another_take(row, slot[1], card, shared, seed, used)
        except NotMade as error:
            found.refused.append(f"{row['id']}, seed {row['seed']}: {error}")
    if new:
        store.delete(SUCCESS)                           # there is something to do again
        mask = pa.array([key in new for key in ledger.keys_of(rows)], pa.bool_())
        ledger.write_again(store, rows.filter(mask), lambda row: new[row["id"], row["seed"]], own=("user.",))
    found.rows = len(new)
    return found


@dataclass(kw_only=True)
class Used:
    """What takes and rows have already."""

    by_id: dict[str, set[int]] = field(default_factory=dict)           # seeds of a row, its takes and samples
    by_prompt: dict[str, set[int]] = field(default_factory=dict)       # of all rows that say the same
    clips: set[str] = field(default_factory=set)

    @classmethod
    def by_takes(cls, store: Store) -> "Used":
        found = cls()
        table = ledger.read(store, ["id", "seed", "prompt", "clip_id", "quality.seed"], put_back=True, every_take=True)
        for name, seed, prompt, clip_id, made_with in ledger.values_of(table, "id", "seed", "prompt", "clip_id",
                                                                       "quality.seed"):
            found.by_id.setdefault(name, set()).add(-1 if seed is None else seed)
            found.by_prompt.setdefault(prompt, set()).update(one for one in (seed, made_with) if one is not None)
            found.clips.add(clip_id)
        return found


def another_take(row: Mapping[str, Any], slot: int, card: ModelCard, shared: Mapping[str, Any], seed: NewSeed,
                 used: Used) -> dict[str, Any]:
    """The pending row of another take: every column that is not as in this one.  Raises NotMade."""
    images = {row["image_sha256"]: row["image"]} if row["image_sha256"] else {}
    if request_of_row(row, card, shared, images).clip_id != row["clip_id"]:
        raise NotMade("its clip_id is not that of what its row says, so nobody knows what it was made of")
    first = slot - (row["sample"] or 0)
    own, alike = used.by_id[row["id"]], used.by_prompt[row["prompt"]]
    # of rows that say the same, one's next seed is another's own, and so would be the clip
    other = seed.after(row["seed"], own | alike if seed.step else own, first,
                       row["samples"] or (row["sample"] or 0) + 1)
    if other is None:
        raise NotMade("another take or sample of it has that seed")
    said = {name: None for name in row if name not in ASKED_AGAIN}
    again = request_of_row({**row, "seed": other, "quality.seed": None}, card, shared, images)
    if again.clip_id in used.clips:
        raise NotMade("another row has the clip of that seed")
    own.add(other)
    alike.add(other)
    used.clips.add(again.clip_id)
    return said | {"seed": other, "clip_id": again.clip_id, "status": "pending", "take_of": slot,
                   "replaces": row["clip_id"], "finished_at": datetime.now(UTC)}


def bring_back(store: Store, chosen: Filter) -> Redone:
    """Have earlier takes count again that a person picked, where the take in their place is not picked as well.

    chosen: of these.  Of several takes of one row the newest.  A further row says it, so that it is the newest that
    counts; what it replaces stays until gc.  Raises BadFilter, StoreError.
    """
    table = ledger.read(store, None, put_back=True, every_take=True)
    row_of, done = rows_of_manifest(table), pc.equal(table["status"], "done").to_numpy(zero_copy_only=False)
    counts = is_current(table) & done
    picked = pc.fill_null(pc.equal(table["decision"], "pick"), False).to_numpy(zero_copy_only=False)
    wanted = done & ~counts & picked & chosen.mask(table).to_numpy(zero_copy_only=False)
    in_place = {row_of[at]: at for at in np.flatnonzero(counts).tolist()}
    newest = {row_of[at]: at for at in np.flatnonzero(wanted).tolist()}
    clips = {clip_id_in(info.key) for info in store.list(f"{CLIPS}/")} if newest else set()
    found, replaces = Redone(), {}
    mask = np.zeros(table.num_rows, bool)
    for row, at in newest.items():
        if row not in in_place or picked[in_place[row]]:         # dropped, or waiting; or wanted as it is
            continue
        name, seed, clip_id = (table[column][at].as_py() for column in ("id", "seed", "clip_id"))
        if clip_id not in clips:
            found.refused.append(f"{name}, seed {seed}: its clip is not there any more")
            continue
        mask[at], replaces[name, seed] = True, table["clip_id"][in_place[row]].as_py()
    if replaces:
        was_marked = has(store, SUCCESS)
        store.delete(SUCCESS)                           # it tells of other rows
        ledger.write_again(store, table.filter(pa.array(mask)),
                           lambda row: {"replaces": replaces[row["id"], row["seed"]]})
        if was_marked:
            ledger.write_success(store)
    found.rows = len(replaces)
    return found


def drop_rows(store: Store, chosen: Filter) -> int:
    """Take rows out, done or failed, also those of which another take waits; returns how many.

    Raises BadFilter, StoreError.
    """
    table = ledger.read(store)
    rows = table.filter(chosen.mask(table))
    if rows.num_rows:
        was_marked = has(store, SUCCESS)
        store.delete(SUCCESS)                           # it tells of other rows
        now = datetime.now(UTC)
        ledger.write_again(store, rows, lambda row: {"status": "dropped", "finished_at": now})
        if was_marked:
            ledger.write_success(store)
    return rows.num_rows
