"""LTX-2's video VAE on clips too large for the memory: in tiles that overlap, and fade into each other.

The decoder sees far around a pixel, so tiles that met exactly would cost several times their size; the release blends
them, and so is it done here. Beyond the release, a tile is decoded with CONTEXT more cells around, which are cut off:
that takes 10 to 20 dB off the difference to the whole picture. Where a clip is no larger than a tile, nothing is cut.
Source   LTX-2 releases 2.0 to 2.5, TilingConfig: sizes, overlaps and the shape of the ramps.

Units    cells of the latent, if not said otherwise; 8 frames of 32 x 32 pixels are a cell, the first frame one alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dailies.model.ltx2.codec_config import VideoVAEConfig
from dailies.model.ltx2.video_vae import VideoVAE

_LONG, SPACE_OVERLAP = 24, 2                             # the release's, of a picture's longer side: 768 and 64 pixels
_STEPS, TIME_OVERLAP = 10, 3                             # in time: 80 and 24 frames
CONTEXT = 1                                             # beyond each end of a side
_SMALLEST, _FEWEST_STEPS = 8, 5                           # of the longer side and in time: smaller would be all ramps


@dataclass(frozen=True, kw_only=True)
class TileSize:
    """At most so many cells along time and each side."""

    steps: int
    height: int
    width: int


@dataclass(frozen=True)
class Span:
    """Cells start to stop of an axis, and how many at each end are shared with the neighbour."""

    start: int
    stop: int
    left: int
    right: int


def spans(length: int, size: int, overlap: int, *, in_time: bool = False) -> list[Span]:
    """An axis in pieces of at most `size` cells that share `overlap`; in time all but the first begin one earlier,
    because the first frame of a piece is of one frame, and is not used.
    """
    if length <= size:
        return [Span(0, length, 0, 0)]
    stride = size - overlap
    count = math.ceil((length - overlap) / stride)
    found = []
    for index in range(count):
        start, last = index * stride, index == count - 1
        early = 1 if in_time and index else 0
        found.append(Span(start - early, length if last else start + size, overlap + early if index else 0,
                          0 if last else overlap))
    return found


def side_weights(span: Span, cell: int) -> Tensor:
    """[pixels] of a span of a side, with ramps at its shared ends.  cell: pixels of a cell."""
    weights = torch.ones(cell * (span.stop - span.start))
    if left := cell * span.left:
        weights[:left] = torch.linspace(0, 1, left + 2)[1:-1]
    if right := cell * span.right:
        weights[-right:] *= torch.linspace(1, 0, right + 2)[1:-1]
    return weights


def time_weights(span: Span, cell: int) -> Tensor:
    """[frames] of a span in time, cell * (cells - 1) + 1.  cell: frames of a cell."""
    weights = torch.ones(1 + cell * (span.stop - span.start - 1))
    if span.left:
        left = 1 + cell * (span.left - 1)
        weights[:left] = torch.linspace(0, 1, left + 1)[:-1]
    if right := cell * span.right:
        weights[-right:] *= torch.linspace(1, 0, right + 2)[1:-1]
    return weights


def decode_groups(vae: VideoVAE, latent: Tensor, size: TileSize) -> Iterator[tuple[int, Tensor]]:
    """vae.decode(latent), group by group of frames: the first frame of each, pixels [B, 3, f, 32H, 32W].

    Pixels are fp32 where tiles were blended, else of the weights' dtype. A group is let go when the next is asked for.
    """
    time = vae.config.strides[0]
    groups = spans(latent.shape[2], size.steps, min(TIME_OVERLAP, (size.steps - 1) // 2), in_time=True)
    fading: Tensor | None = None                        # the end of the last group, weighted
    for index, group in enumerate(groups):
        pixels = _pictures(vae, latent[:, :, group.start:group.stop], size)
        if len(groups) == 1:
            yield 0, pixels
            return
        pixels = pixels.float() if pixels.dtype != torch.float32 else pixels
        pixels *= time_weights(group, time).to(pixels.device).view(-1, 1, 1)
        if fading is not None:
            pixels[:, :, :fading.shape[2]] += fading
        begin = time * group.start
        done = time * groups[index + 1].start - begin if index + 1 < len(groups) else pixels.shape[2]
        fading = pixels[:, :, done:].clone()
        yield begin, pixels[:, :, :done]
        del pixels


def _pictures(vae: VideoVAE, latent: Tensor, size: TileSize) -> Tensor:
    """Pixels of some steps, from tiles of a picture."""
    _, rows, columns = vae.config.strides
    down = spans(latent.shape[3], size.height, min(SPACE_OVERLAP, size.height // 2))
    across = spans(latent.shape[4], size.width, min(SPACE_OVERLAP, size.width // 2))
    if len(down) == len(across) == 1:
        return vae.decode(latent)
    whole: Tensor | None = None
    for vertical in down:
        for horizontal in across:
            seen_rows, seen_columns = (_with_context(span, length) for span, length in
                                       ((vertical, latent.shape[3]), (horizontal, latent.shape[4])))
            tile = vae.decode(latent[:, :, :, seen_rows, seen_columns])
            above, left = rows * (vertical.start - seen_rows.start), columns * (horizontal.start - seen_columns.start)
            high, wide = rows * (vertical.stop - vertical.start), columns * (horizontal.stop - horizontal.start)
            # a copy, so that what is cut off can be let go
            tile = tile[:, :, :, above:above + high, left:left + wide].to(torch.float32, copy=True)
            tile *= side_weights(vertical, rows).to(tile.device)[:, None]
            tile *= side_weights(horizontal, columns).to(tile.device)
            if whole is None:
                whole = tile.new_zeros(*tile.shape[:3], rows * latent.shape[3], columns * latent.shape[4])
            whole[:, :, :, rows * vertical.start:rows * vertical.stop,
                  columns * horizontal.start:columns * horizontal.stop] += tile
            del tile
    assert whole is not None
    return whole


def _with_context(span: Span, length: int) -> slice:
    """What a tile is decoded from: its own cells, and CONTEXT beyond each end that is none of the picture's.

    The cell at a tile's end sees zeros or a mirror where the picture goes on, and would fade in with half its weight.
    """
    return slice(max(0, span.start - CONTEXT), min(length, span.stop + CONTEXT))


def release_tile(height: int, width: int, steps: int) -> TileSize:
    """The size of a tile as the release cuts: its longer side along the picture's, the other in proportion."""
    return _tile(_LONG, _STEPS, height, width, steps)


def _tile(longest: int, most_steps: int, height: int, width: int, steps: int) -> TileSize:
    share = min(1.0, longest / max(height, width))
    high, wide = (min(side, max(2, math.ceil(side * share))) for side in (height, width))
    return TileSize(steps=min(most_steps, steps), height=high, width=wide)


def tile_within(budget: int, vae: VideoVAE, height: int, width: int, steps: int, *,
                below: TileSize | None = None) -> TileSize:
    """The release's tile, or the next smaller one with which decoding takes at most `budget` bytes; the smallest one if
    none does.  below: smaller than this one, whatever the budget.
    """
    sizes = smaller_tiles(height, width, steps)
    sizes = [size for size in sizes if below is None or _cells(size) < _cells(below)] or sizes[-1:]
    for size in sizes:
        if bytes_needed(vae, size, height, width) <= budget:
            return size
    return sizes[-1]


def smaller_tiles(height: int, width: int, steps: int) -> list[TileSize]:
    """From the release's down, each once: first a side is cut, whose seams are short, then time."""
    longs = [long for long in (24, 20, 16, 12, 10, _SMALLEST) if long < max(height, width) or long == _LONG]
    tiles = [_tile(long, _STEPS, height, width, steps) for long in longs]
    tiles += [_tile(longs[-1], most, height, width, steps) for most in (8, 6, _FEWEST_STEPS)]
    return list(dict.fromkeys(tiles))


def _cells(size: TileSize) -> int:
    return size.steps * size.height * size.width


def bytes_needed(vae: VideoVAE, size: TileSize, height: int, width: int) -> int:
    """About what decoding takes at its worst moment beside the weights: a layer's input, its window, what it makes on
    the way and its result, and the frames that are put together.  height, width: of the whole latent.
    """
    config = vae.config
    time, rows, columns = config.strides
    seen = TileSize(steps=size.steps, height=min(height, size.height + 2 * CONTEXT),
                    width=min(width, size.width + 2 * CONTEXT))
    layers = max(_layer_elements(config, seen))
    frames = time * (size.steps - 1) + 1
    group = 4 * 3 * frames * rows * height * columns * width       # fp32
    if (height, width) == (size.height, size.width):
        group //= 2
    return 5 * layers * torch.finfo(vae.dtype).bits // 8 + 2 * group


def _layer_elements(config: VideoVAEConfig, size: TileSize) -> Iterator[int]:
    """Elements of the larger of each stage's input and result."""
    frames, height, width, channels = size.steps, size.height, size.width, config.decoder_width
    yield channels * frames * height * width
    for stage in config.decoder:
        if stage.layers:
            continue
        t, h, w = stage.stride
        frames, height, width = t * frames, h * height, w * width
        channels //= stage.multiplier
        yield channels * frames * height * width
