"""Clips of other runs: brought here by the store itself, a link or a copy, and judged as whatever lies here is.

A clip is named by all that decides its pixels, so a run that asks for one that another has made need not make it. What
is brought is believed no more than what lies in this folder: its size is bounded before it is touched, and it is read,
hashed and decoded before it gets a row (adoption.py); a row of the other run's ledger names the hash that it must have.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dailies.actors.clip_file import most_clip_bytes
from dailies.actors.messages import Request
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.run.layout import CLIPS, clip_id_in, clip_key
from dailies.pipeline.run.ledger import recorded_hashes
from dailies.pipeline.store import NotFound, ObjectInfo, Store, TooLarge


@dataclass(frozen=True, kw_only=True)
class Brought:
    clip_id: str
    num_bytes: int
    sha256: str | None                  # as the other run's ledger has it
    said: str                           # from where, for a person


def bring_clips(store: Store, other: Store, requests: Callable[[set[str]], Iterator[Request]],
                wanted: set[str]) -> Iterator[Brought]:
    """Put those of the wanted clips that the other run folder has under their names here; yields each.

    requests: of such clips.  Raises StoreError.
    """
    there = {clip_id: info for info in other.list(f"{CLIPS}/") if (clip_id := clip_id_in(info.key)) in wanted}
    hashes = recorded_hashes(other, list(there))
    for request in requests(set(there)):
        info, shape = there[request.clip_id], request.shape
        most = most_clip_bytes(width=shape.width, height=shape.height, frames=shape.frames)
        if 0 < info.num_bytes <= most and put_here(store, other, info, most):
            yield Brought(clip_id=request.clip_id, num_bytes=info.num_bytes, sha256=hashes.get(request.clip_id),
                          said=f"{shown(other.uri)}")


def put_here(store: Store, other: Store, info: ObjectInfo, at_most: int) -> bool:
    """Whether the object lies here now by this call: linked or copied by the store where it can, else as bytes."""
    assert clip_id_in(info.key), info.key
    key = clip_key(clip_id_in(info.key) or "")
    try:
        made = store.create_from(other, info, key)
        return store.create(key, other.get(info.key, at_most=at_most)) if made is None else made
    except (NotFound, TooLarge):                        # gone, or another one, since it was listed
        return False
