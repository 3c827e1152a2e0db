"""Objects of the run folder that are read whole, so that all readers of a process together have a bound of memory.

Whoever can write the run folder can put a large object where many are read side by side.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol

from dailies.pipeline.store import TooLarge

_SMALL_BYTES = 2**26                     # a larger object is in memory alone, beside smaller ones
one_large = Lock()


class Readable(Protocol):
    """What is needed of a store."""

    def get(self, key: str, *, at_most: int | None = None) -> bytes: ...


@contextmanager
def object_bytes(store: Readable, key: str, at_most: int) -> Iterator[bytes]:
    """What lies under a key; of larger objects one at a time in all threads, until the block ends.

    Raises NotFound, StoreError, TooLarge for more than `at_most` bytes.
    """
    try:
        data = store.get(key, at_most=min(at_most, _SMALL_BYTES))
    except TooLarge:
        if at_most <= _SMALL_BYTES:
            raise
        with one_large:
            yield store.get(key, at_most=at_most)
        return
    yield data
