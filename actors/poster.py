"""A clip's picture for the contact sheet: a poster and a strip of 8 frames, in one WebP.

Layout  four columns and three rows of equal cells. The poster fills the two by two at the top left; the strip runs
        through the other eight, by rows:     P P 0 1
                                              P P 2 3
                                              4 5 6 7
So a page shows either by fractions of the picture alone, and one object is stored, listed and fetched for both.
Equal frames give equal bytes: libwebp encodes in one thread, and its result does not depend on the processor.
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Protocol

import numpy as np
from PIL import Image

MOST_POSTER_BYTES = 40_000              # of the whole picture
CELLS_ACROSS, CELLS_DOWN, STRIP = 4, 3, 8          # cells, and those of the strip
CELL_PIXELS = 240 * 135                 # of a cell at most; none is larger than the clip, or smaller than LEAST_SIDE
LEAST_SIDE = 16
QUALITIES = (76, 64, 52, 40, 28, 16, 4)     # of WebP; the first whose bytes fit
PLACES = ((2, 0), (3, 0), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2))    # of the strip's cells: column, row
METHOD = 4                              # libwebp's effort, 0 to 6


class PosterStore(Protocol):
    """What storing a poster needs of a store."""

    def create(self, key: str, data: bytes, *, metadata: dict[str, str] | None = None) -> bool: ...
    def delete(self, key: str) -> None: ...


def shown_frames(frames: int) -> tuple[int, ...]:
    """Which frames of a clip are shown: the poster's, then the strip's, evenly spread from the first to the last."""
    last = max(0, frames - 1)
    return (last // 2, *(round(last * place / (STRIP - 1)) for place in range(STRIP)))


def cell_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a cell for a clip of this size."""
    scale = min(1.0, (CELL_PIXELS / (width * height)) ** 0.5)
    return max(LEAST_SIDE, round(width * scale)), max(LEAST_SIDE, round(height * scale))


def poster(pictures: Sequence[np.ndarray]) -> bytes:
    """The WebP of a clip.  pictures: uint8 [height, width, 3], those of `shown_frames`, all of one size.

    Raises ValueError where there are others, or where no quality is small enough.
    """
    sizes = {picture.shape for picture in pictures}
    if len(pictures) != 1 + STRIP or len(sizes) != 1 or any(picture.dtype != np.uint8 for picture in pictures):
        raise ValueError(f"a poster is made of {1 + STRIP} pictures of one size, uint8 [height, width, 3]; got "
                         f"{len(pictures)} of {sorted(sizes)}")
    height, width = pictures[0].shape[:2]
    cell = cell_size(width, height)
    sheet = Image.new("RGB", (CELLS_ACROSS * cell[0], CELLS_DOWN * cell[1]))
    sheet.paste(resized(pictures[0], (2 * cell[0], 2 * cell[1])), (0, 0))
    for picture, (column, row) in zip(pictures[1:], PLACES, strict=True):
        sheet.paste(resized(picture, cell), (column * cell[0], row * cell[1]))
    for quality in QUALITIES:
        made = BytesIO()
        sheet.save(made, "WEBP", quality=quality, method=METHOD)
        if made.tell() <= MOST_POSTER_BYTES:
            return made.getvalue()
    raise ValueError(f"a poster has at most {MOST_POSTER_BYTES:,} bytes; at the lowest quality this one has "
                     f"{made.tell():,}")


def resized(picture: np.ndarray, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(picture))
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def store_poster(store: PosterStore, key: str, data: bytes, *, anew: bool = False) -> None:
    """Store it unless there is one.  anew: whatever lies there is of a file that was not the clip, and is replaced.

    Raises what the store raises.
    """
    if not store.create(key, data) and anew:
        store.delete(key)
        store.create(key, data)
