"""`dailies verify`: every clip of the ledger is read again; `--repair` has the next render make what is wrong."""

import hashlib
import re
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

from dailies.jobs.answer import answer
from dailies.jobs.progress import printable, say
from dailies.jobs.runs import open_run
from dailies.model.catalog import CATALOG
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import CLIPS, clip_id_in
from dailies.pipeline.run.lease import Lease
from dailies.pipeline.run.sweep import current_rows, old_clips
from dailies.pipeline.store import NotFound, Store, TooLarge
from dailies.pipeline.wording import counted

VERIFY_READERS = 4
CLIPS_AT_A_TIME = 1000                  # whose rows are turned into Python's objects
_LINE_EVERY_S = 10.0
CLIP_ID = re.compile(r"[0-9a-f]{64}")


def verify(uri: str, *, json: bool, repair: bool = False) -> int:
    """Re-read every clip of the ledger: its hash, that it decodes, its frames, size, rate and sound; 3 if any is wrong.

    repair: the rows of clips that are wrong become pending, so that the next render makes them. No file is removed:
    render replaces one when it has the clip that belongs there.
    """
    store, _ = open_run(uri)
    # no run may be writing while rows are put back
    lease = Lease.take(store, tell=lambda text: print(printable(text), file=sys.stderr)) if repair else nullcontext()
    with lease:
        clips, wrong = wrong_clips(store, json=json)
        problems = {found["clip_id"]: found["problem"] for found in wrong}
        put_back = ledger.put_back(store, problems) if repair and wrong else 0
    strays = [info.key for info in store.list(f"{CLIPS}/") if clip_id_in(info.key) not in clips]
    old = old_clips(store, current_rows(store)) if strays else set()
    replaced = sum(clip_id_in(key) in old for key in strays)
    said = {"exit_code": 3 if wrong else 0, "out": store.uri, "clips": len(clips), "wrong": wrong,
            "unrecorded": len(strays) - replaced, "replaced": replaced,
            **({"pending_again": put_back} if repair else {})}
    return answer(said, lambda: print_findings(said), json=json)


def print_findings(said: dict[str, Any]) -> None:
    say(f"{said['out']}: {counted(said['clips'], 'clip')} read, {len(said['wrong']):,} wrong")
    for found in said["wrong"]:
        print(printable(f"  {found['clip_id']} ({found['id']}): {found['problem']}"))
    if said["wrong"] and "pending_again" in said:
        say(f"{counted(said['pending_again'], 'row')} pending again; the same render command makes their clips")
    elif said["wrong"]:
        say(f"dailies verify {said['out']} --repair, then the same render command, makes them again")
    if strays := said["unrecorded"]:
        say(f"  {counted(strays, 'object')} under clips/ without a ledger row; the next render records what it plans")
    if old := said["replaced"]:
        say(f"  {counted(old, 'clip')} that no row names any more; dailies gc {said['out']} lists them")


def wrong_clips(store: Store, *, json: bool) -> tuple[set[str], list[dict[str, Any]]]:
    """The clip_ids of what is done, and of the clips that are wrong: clip_id, id and problem."""
    clips = ledger.done_clips(store)
    wrong: list[dict[str, Any]] = []
    told, checked = time.monotonic(), 0
    with ThreadPoolExecutor(VERIFY_READERS) as pool:
        for batch in clips.to_batches(max_chunksize=CLIPS_AT_A_TIME):
            rows = batch.to_pylist()
            for row, problem in zip(rows, pool.map(lambda row: problem_of(store, row), rows), strict=True):
                checked += 1
                if problem:
                    wrong.append({"clip_id": row["clip_id"], "id": row["id"], "problem": problem})
                if not json and time.monotonic() - told > _LINE_EVERY_S:
                    told = time.monotonic()
                    say(f"{checked:,} of {counted(clips.num_rows, 'clip')} read, {len(wrong):,} wrong",
                        stream=sys.stderr)
    return set(clips["clip_id"].to_pylist()), wrong


def problem_of(store: Store, row: Mapping[str, Any]) -> str | None:
    """What is wrong with the clip of a ledger row, None for nothing.

    The row may be forged as well: what it says is compared with what a row can ask for before anything is read.
    """
    from dailies.pipeline.run.adoption import clip_bytes
    if refusal := unlike_any_clip(row):
        return refusal
    try:
        with clip_bytes(store, row["clip_id"], row["bytes"]) as data:
            return compared(data, row)
    except NotFound:
        return "missing"
    except TooLarge as error:
        return f"changed: {error}, where the ledger says {row['bytes']:,} bytes"


def unlike_any_clip(row: Mapping[str, Any]) -> str | None:
    """What a ledger row says that no clip has, so that nothing is read for it; None for what may be."""
    from dailies.actors.clip_file import most_clip_bytes
    if not CLIP_ID.fullmatch(row["clip_id"] or ""):
        return "no clip has this name: it must be 64 digits of a SHA-256"
    if absent := [name for name in ("sha256", "bytes", "width", "height", "frames", "fps") if row.get(name) is None]:
        return f"its ledger row does not say {', '.join(absent)}"
    shape = {name: row[name] for name in ("width", "height", "frames")}
    most_pixels, most_frames = largest_shape()
    if min(shape.values()) < 1 or shape["width"] * shape["height"] > most_pixels or shape["frames"] > most_frames:
        return (f"no model makes what its ledger row says: {shape['width']}x{shape['height']}, {shape['frames']:,} "
                f"frames; at most {most_pixels:,} pixels and {most_frames:,} frames")
    if not 0 < row["bytes"] <= most_clip_bytes(**shape):
        return f"no clip of its shape has {row['bytes']:,} bytes, as its ledger row says"
    return None


def compared(data: bytes, row: Mapping[str, Any]) -> str | None:
    """What is wrong with a clip's bytes; FFmpeg sees only those that the ledger names."""
    from dailies.actors.clip_file import NotThisClip, check_file
    if len(data) != row["bytes"] or hashlib.sha256(data).hexdigest() != row["sha256"]:
        return f"changed: {len(data):,} bytes whose SHA-256 is not the ledger's ({row['bytes']:,} bytes)"
    try:
        found = check_file(data, has_audio=row.get("has_audio"),
                           **{name: row[name] for name in ("width", "height", "frames", "fps")})
    except NotThisClip as error:
        return str(error) if str(error).startswith("undecodable") else f"not what the ledger says: {error}"
    said = found.metadata.get("clip_id")
    return None if said == row["clip_id"] else f"not what the ledger says: it is clip {str(said)[:100]!r}"


def largest_shape() -> tuple[int, int]:
    """The most pixels of a frame, and the most frames, that a row can ask any model for."""
    return (max(card.max_pixels for card in CATALOG.values()),
            max(int(card.fps * card.max_duration_s) + 1 for card in CATALOG.values()))
