"""What lies in a run folder and no current row names: old takes, clips of rows that were dropped, what is left over.

Only names of our own making are looked at. A clip without a row may be one that a killed run has published, whose row
the next render writes: it is left alone until the run is finished.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from dailies.pipeline.run import ledger
from dailies.pipeline.run.current import is_current
from dailies.pipeline.run.layout import (
    CLIPS,
    EMBEDDINGS,
    LATENTS,
    POSTERS,
    SAVED_STEPS,
    SUCCESS,
    clip_id_in,
    intermediate_of,
    poster_id_in,
)
from dailies.pipeline.run.lease import Lease
from dailies.pipeline.run.run_json import has
from dailies.pipeline.store import ObjectInfo, Store
from dailies.pipeline.store.base import PROBE, PROBE_KEY

STALE_PROBE_S = 24 * 3600               # nobody tries a store for a day


@dataclass(frozen=True, kw_only=True)
class Leftover:
    info: ObjectInfo
    what: str                           # in words, for a person


def current_rows(store: Store) -> pa.Table:
    rows = ledger.rows_of_keys(store, ["id", "seed", "clip_id", "status"])
    return rows.filter(is_current(rows))


def old_clips(store: Store, current: pa.Table) -> set[str]:
    """Those that some row has named, and none of the current ones does.  Raises StoreError."""
    return ledger.clips_ever_named(store) - set(current["clip_id"].to_pylist())


def leftovers(store: Store) -> Iterator[Leftover]:
    """What may be deleted, in the order of its keys.  Raises StoreError."""
    rows = current_rows(store)
    wanted, old = set(rows["clip_id"].to_pylist()), old_clips(store, rows)
    done = set(rows.filter(pc.equal(rows["status"], "done"))["clip_id"].to_pylist())
    is_finished = has(store, SUCCESS)
    for folder, name_of, what in ((CLIPS, clip_id_in, "clip"), (POSTERS, poster_id_in, "poster")):
        for info in store.list(f"{folder}/"):
            name = name_of(info.key)
            if name in old:
                yield Leftover(info=info, what=f"{what} that no row names any more")
            elif name and name not in wanted and is_finished:
                yield Leftover(info=info, what=f"{what} of no row")
    for folder, names in ((LATENTS, old), (SAVED_STEPS, old | done)):
        for info in store.list(f"{folder}/"):
            if intermediate_of(info.key) in names:
                yield Leftover(info=info, what="what a clip was made of")
    for info in store.list(f"{EMBEDDINGS}/") if is_finished else ():
        if intermediate_of(info.key):
            yield Leftover(info=info, what="what a clip was made of")
    for info in store.list(PROBE):
        if PROBE_KEY.fullmatch(info.key) and info.modified_s < time.time() - STALE_PROBE_S:
            yield Leftover(info=info, what="temporary")
    for info in store.abandoned():
        yield Leftover(info=info, what="temporary")


def sweep(store: Store, lease: Lease) -> Iterator[Leftover]:
    """Delete what may be, and yield it; no driver works here while this one has the lease.

    Raises LeaseError as soon as it has not.  What is deleted when this ends half-way, the same call need not again.
    """
    for found in leftovers(store):
        lease.check()
        store.delete(found.info.key)
        yield found
