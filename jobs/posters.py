"""Posters of clips that have none, made of their files: of runs by versions that made none, and of clips that a killed
driver had published and not shown.

A clip is read as `dailies verify` reads it: what its row says is compared with what a row can ask for, its bytes with
the row's hash, and only then a frame is decoded.
"""

import hashlib
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dailies.actors.clip_file import pictures_of
from dailies.actors.poster import poster, shown_frames, store_poster
from dailies.jobs.progress import say
from dailies.jobs.verify import unlike_any_clip
from dailies.pipeline.run.adoption import clip_bytes
from dailies.pipeline.run.layout import poster_key
from dailies.pipeline.store import NotFound, Store, TooLarge
from dailies.pipeline.wording import counted

POSTER_READERS = 2
POSTERS_AT_A_TIME = 500                 # whose rows are turned into Python's objects
SAID_EVERY_S = 10.0


def make_posters(store: Store, missing: Any, *, quiet: bool = False) -> int:
    """Make the posters of these clips, of those that are what their rows say; returns how many were made.

    missing: a table, of ledger.done_clips.  Raises StoreError.
    """
    made = 0
    told = time.monotonic()
    with ThreadPoolExecutor(POSTER_READERS) as pool:
        for batch in missing.to_batches(max_chunksize=POSTERS_AT_A_TIME):
            for is_made in pool.map(lambda row: make_one(store, row), batch.to_pylist()):
                made += is_made
                if not quiet and time.monotonic() - told > SAID_EVERY_S:
                    told = time.monotonic()
                    say(f"{made:,} of {counted(missing.num_rows, 'poster')} made of clips that had none",
                        stream=sys.stderr)
    return made


def make_one(store: Store, row: Mapping[str, Any]) -> bool:
    """Whether the clip of a ledger row has a poster now; what is wrong with one, `dailies verify` says."""
    if unlike_any_clip(row):
        return False
    shape = {name: row[name] for name in ("width", "height", "frames")}
    try:
        with clip_bytes(store, row["clip_id"], row["bytes"]) as data:
            if len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
                return False
            made = poster(pictures_of(data, shown_frames(row["frames"]), **shape))
    except (NotFound, TooLarge, ValueError):
        return False
    store_poster(store, poster_key(row["clip_id"]), made)
    return True
