"""Clips that lie in the run folder without a row that counts: which of them are what their request asks for.

A run that was killed had published clips whose rows it had not written yet. They are found by their names, and what
lies under a name may be anything: it is read, hashed and decoded before it gets a row, and its hash is that of its
bytes, whatever the store says beside them.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from actors.clip_file import MOST_BYTES, NotThisClip, check_clip, clip_key
from actors.messages import Clip, Request
from pipeline.store import NotFound, Store, TooLarge

READERS = 8                             # each holds a clip's bytes and decodes it
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
    with ThreadPoolExecutor(READERS) as pool:
        while some := list(islice(waiting, AT_ONCE)):
            yield from pool.map(lambda request: published(store, request, hashes.get(request.clip_id)), some)


def published(store: Store, request: Request, recorded: str | None = None) -> Clip | Spoilt:
    key = clip_key(request.clip_id)
    try:
        data = store.get(key, at_most=MOST_BYTES)
    except NotFound:
        return Spoilt(request=request, why="it is gone")
    except TooLarge as error:
        return Spoilt(request=request, why=f"no clip is that large: {error}")
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        if recorded not in (None, sha256):
            raise NotThisClip("its bytes are not those that the ledger names")
        found = check_clip(data, request)
    except NotThisClip as error:
        return Spoilt(request=request, why=str(error), sha256=sha256)
    return Clip(request=request, uri=store.uri_of(key), sha256=sha256, num_bytes=len(data),
                duration_s=request.shape.frames / request.fps, has_audio=found.has_audio,
                notes=("found published, read and decoded; nobody timed it",))
