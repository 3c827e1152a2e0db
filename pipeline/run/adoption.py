"""Clips that lie in the run folder without a row that counts: which of them are what their request asks for.

A run that was killed had published clips whose rows it had not written yet. They are found by their names, and what
lies under a name may be anything: it is read, hashed and decoded before it gets a row, and its hash is that of its
bytes, whatever the store says beside them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

from dailies.actors.clip_file import NotThisClip, check_clip, most_clip_bytes
from dailies.actors.messages import Clip, Request
from dailies.model.shapes import frame_rate
from dailies.pipeline.run.large_objects import object_bytes
from dailies.pipeline.run.layout import clip_key
from dailies.pipeline.store import NotFound, Store, TooLarge

CLIP_READERS = 8                        # each holds a clip's bytes and decodes it
AT_ONCE = 256                           # requests that are under way or wait for their turn


@dataclass(frozen=True, kw_only=True)
class Spoilt:
    """What lies under a clip's name is not that clip, or nothing is there."""

    request: Request
    why: str
    sha256: str = ""                    # of what lies there


def adopt(store: Store, requests: Iterable[Request], hashes: Mapping[str, str]) -> Iterator[Clip | Spoilt]:
    """What became of each request's published clip, in order.

    hashes: clip_id -> SHA-256 that a row of the ledger gave its file before; other bytes are not that clip.
    Raises StoreError.
    """
    waiting = iter(requests)
    with ThreadPoolExecutor(CLIP_READERS) as pool:
        while some := list(islice(waiting, AT_ONCE)):
            yield from pool.map(lambda request: published(store, request, hashes.get(request.clip_id)), some)


def clip_bytes(store: Store, clip_id: str, at_most: int) -> AbstractContextManager[bytes]:
    """What lies under a clip's name.  Raises as object_bytes."""
    return object_bytes(store, clip_key(clip_id), at_most)


def published(store: Store, request: Request, recorded: str | None = None) -> Clip | Spoilt:
    shape = request.shape
    at_most = most_clip_bytes(width=shape.width, height=shape.height, frames=shape.frames)
    try:
        with clip_bytes(store, request.clip_id, at_most) as data:
            return judged(store, request, data, recorded)
    except NotFound:
        return Spoilt(request=request, why="it is gone")
    except TooLarge as error:
        return Spoilt(request=request, why=f"no clip of its shape is that large: {error}")


def judged(store: Store, request: Request, data: bytes, recorded: str | None) -> Clip | Spoilt:
    sha256, shape = hashlib.sha256(data).hexdigest(), request.shape
    try:
        if recorded not in (None, sha256):
            raise NotThisClip("its bytes are not those that the ledger names")
        found = check_clip(data, request)
    except NotThisClip as error:
        return Spoilt(request=request, why=str(error), sha256=sha256)
    return Clip(request=request, uri=store.uri_of(clip_key(request.clip_id)), sha256=sha256, num_bytes=len(data),
                duration_s=float(shape.frames / frame_rate(request.fps)), has_audio=found.has_audio,
                notes=("found published, read and decoded; nobody timed it",))
