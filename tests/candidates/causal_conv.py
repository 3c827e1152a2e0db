"""A convolution over a window of frames as products of matrices, in Triton.

Letters  B clips  C channels in  N channels out  T frames  H W rows and columns  kt kh kw taps.

A program makes some columns of some rows of one frame: for every tap and row the pixels that it sees, [columns, C],
times the tap's weights, [C, N], DEPTH channels at a time. They are fetched

by descriptors  Hopper's copy engine (TMA) fetches a row at once, and fills with zeros what lies beside the picture
by pointers     asynchronous copies of 16 bytes a thread, masked; everywhere else

A row is a product of its own, with sums of its own: what the copy engine fetched of one row is in shared memory as the
tensor cores read it, and they go on with a product while the next is begun. Of several rows at once it would have to be
taken through registers. The rows of a program share the weights.

N is cut into a power of two, and the rest into another: 96 is 64 and 32, and nothing is made that is not wanted.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """rows, columns: pixels of a program's tile.  depth: channels at a time.  first, rest: channels out of a program,
    in two products; rest may be 0.  group: tiles of a frame that go through all frames before the next ones do, so
    that a frame is still in the L2 cache when the next needs it.  registers: at most so many a thread.
    shared_rows: by shared_rows.py, where that can.
    """

    rows: int = 2
    columns: int = 64
    depth: int = 32
    first: int = 64
    rest: int = 32
    warps: int = 4
    stages: int = 5
    group: int = 256
    descriptors: bool = True
    shared_rows: bool = False
    registers: int | None = None


@triton.jit(do_not_specialize=["T", "H", "TILES_X", "TILES"])        # or every slab would be compiled for
def causal_conv_kernel(x, w, w_rest, bias, residual, y, x_frame, residual_frame, y_frame, T, H, W, C, N, TILES_X, TILES,
                       KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
                       COLUMNS: tl.constexpr, DEPTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
                       GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, HAS_BIAS: tl.constexpr,
                       HAS_RESIDUAL: tl.constexpr, PRECISION: tl.constexpr):
    """One clip. x: a pointer to the window, or a descriptor of [1, 1, COLUMNS, DEPTH] of its [T + KT - 1, H, W, C].

    w, w_rest: a pointer, or descriptors of [FIRST, DEPTH] and [REST, DEPTH], of the weights [N, KT * KH * KW * C].
    STEPS: of DEPTH channels, for a tap.  *_frame: elements from one frame to the next.
    """
    place = tl.program_id(0)
    parts = tl.cdiv(N, FIRST + REST)
    channel = place % parts * (FIRST + REST)
    place = place // parts
    before = place // (GROUP * T) * GROUP              # tiles of earlier groups
    size = tl.minimum(TILES - before, GROUP)
    frame = place % (GROUP * T) // size
    tile = before + place % (GROUP * T) % size
    top, left = tile // TILES_X * ROWS, tile % TILES_X * COLUMNS
    column = left + tl.arange(0, COLUMNS)
    totals, rests = (), ()
    for _row in tl.static_range(ROWS):
        totals = totals + (tl.zeros((COLUMNS, FIRST), dtype=tl.float32),)
        if REST > 0:
            rests = rests + (tl.zeros((COLUMNS, REST), dtype=tl.float32),)
    for turn in range(KT * KH * KW * STEPS):
        tap, c = turn // STEPS, turn % STEPS * DEPTH
        t, dy, dx = frame + tap // (KH * KW), top + tap // KW % KH - KH // 2, tap % KW - KW // 2
        if DESCRIPTORS:                                # behind the last channel of x stand zeros, in w the next tap
            b = w.load([channel, tap * C + c]).T
            if REST > 0:
                b_rest = w_rest.load([channel + FIRST, tap * C + c]).T
        else:
            b = _weights(w, channel, tap, c, C, N, KT * KH * KW, FIRST, DEPTH)
            if REST > 0:
                b_rest = _weights(w_rest, channel + FIRST, tap, c, C, N, KT * KH * KW, REST, DEPTH)
        new_totals, new_rests = (), ()
        for row in tl.static_range(ROWS):
            if DESCRIPTORS:
                a = x.load([t, dy + row, left + dx, c]).reshape(COLUMNS, DEPTH)
            else:
                a = _pixels(x + t.to(tl.int64) * x_frame, dy + row, column + dx, c, H, W, C, DEPTH)
            new_totals = new_totals + (tl.dot(a, b, totals[row], input_precision=PRECISION),)
            if REST > 0:
                new_rests = new_rests + (tl.dot(a, b_rest, rests[row], input_precision=PRECISION),)
        totals, rests = new_totals, new_rests
    residual += frame.to(tl.int64) * residual_frame
    y += frame.to(tl.int64) * y_frame
    for row in tl.static_range(ROWS):
        at = ((top + row) * W + column).to(tl.int64) * N
        inside = (top + row < H) & (column < W)
        _finish(totals[row], bias, residual, y, at, inside, channel, N, FIRST, HAS_BIAS, HAS_RESIDUAL)
        if REST > 0:
            _finish(rests[row], bias, residual, y, at, inside, channel + FIRST, N, REST, HAS_BIAS, HAS_RESIDUAL)


@triton.jit
def _pixels(frame, row, column, c, H, W, C, DEPTH: tl.constexpr):
    """[columns, DEPTH] of a row of a frame; zeros beside the picture and behind the last channel."""
    channel = c + tl.arange(0, DEPTH)
    seen = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    at = (row * W + column).to(tl.int64) * C
    return tl.load(frame + at[:, None] + channel[None, :], mask=seen[:, None] & (channel < C)[None, :], other=0.0)


@triton.jit
def _weights(w, channel, tap, c, C, N, TAPS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr):
    """[DEPTH, CHANNELS] of a tap; zeros behind the last channel in and out."""
    outs, ins = channel + tl.arange(0, CHANNELS), c + tl.arange(0, DEPTH)
    at = outs.to(tl.int64)[None, :] * (TAPS * C) + tap * C + ins[:, None]
    return tl.load(w + at, mask=(outs < N)[None, :] & (ins < C)[:, None], other=0.0)


@triton.jit
def _finish(total, bias, residual, y, at, inside, channel, N, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr,
            HAS_RESIDUAL: tl.constexpr):
    """Bias and residual of some channels from `channel` on; rounded once, stored."""
    channels = channel + tl.arange(0, CHANNELS)
    at = at[:, None] + channels[None, :]
    wanted = inside[:, None] & (channels < N)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + channels, mask=channels < N, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=wanted)


def causal_conv(window: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor,
                tiling: Tiling) -> Tensor:
    """conv(window) + bias + residual, written to out, which may be the residual; sums in fp32, rounded once.

    window [B, C, T + kt - 1, H, W]: frame t of out is made of its frames t to t + kt - 1, nothing is added in front,
    and beside a picture stand zeros.  weight [N, C, kt, kh, kw] with odd kh and kw; bias [N]; residual, out
    [B, N, T, H, W].  All fp32, bf16 or fp16, window and weight the same.  Clips lie with the channels of a pixel
    adjacent and the pixels of a frame in order (channels_last_3d); frames and clips may be further apart.  Returns out.
    """
    (batch, channels, _, height, width), (outputs, _, kt, kh, kw) = window.shape, weight.shape
    if not out.numel():
        return out
    weights = weight.permute(0, 2, 3, 4, 1).reshape(outputs, -1)       # as it is where it lies in channels_last_3d
    described = tiling.descriptors and can_be_described(window, weights)
    shared = described and tiling.shared_rows and can_share_rows(window, tiling)
    tiles_x, tiles_y = triton.cdiv(width, tiling.columns), triton.cdiv(height, tiling.rows)
    grid = (triton.cdiv(outputs, tiling.first + tiling.rest) * tiles_x * tiles_y * out.shape[2],)
    tile = dict(KT=kt, KH=kh, KW=kw, ROWS=tiling.rows, COLUMNS=tiling.columns, DEPTH=tiling.depth, FIRST=tiling.first,
                REST=tiling.rest, GROUP=tiling.group, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
                num_warps=tiling.warps)
    if tiling.registers is not None:
        tile["maxnreg"] = tiling.registers
    if shared:
        from tests.candidates.shared_rows import descriptor, shared_rows_kernel
    else:
        descriptor = of_triton
    w, w_rest = weights, weights
    if described:
        w = descriptor(weights, [weights.shape[1], 1], [tiling.first, tiling.depth])
        w_rest = descriptor(weights, [weights.shape[1], 1], [tiling.rest or tiling.first, tiling.depth])
    for clip in range(batch):
        x, into = window[clip].permute(1, 2, 3, 0), out[clip]
        added, frame = into if residual is None else residual[clip], x.stride(0)
        if described:                                  # torch does not say the stride of an axis of one
            x = descriptor(x, [frame, width * channels, channels, 1], [1, 1, tiling.columns, tiling.depth])
        sizes = (added.stride(1), into.stride(1), out.shape[2], height, width, channels, outputs, tiles_x,
                 tiles_x * tiles_y)
        if shared:
            shared_rows_kernel[grid](x, w, w_rest, bias, added, into, *sizes, CHUNKS=channels // tiling.depth,
                                     STAGES=tiling.stages, **tile)
        else:
            causal_conv_kernel[grid](
                x, w, w_rest, bias, added, into, frame, *sizes, STEPS=triton.cdiv(channels, tiling.depth),
                DESCRIPTORS=described, PRECISION="ieee" if window.dtype == torch.float32 else "tf32",
                num_stages=tiling.stages, **tile)
    return out


def of_triton(base: Tensor, strides: list[int], block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(base, list(base.shape), strides, block)


def can_be_described(window: Tensor, weights: Tensor) -> bool:
    """The copy engine wants Hopper or later, and addresses and steps in 16s of bytes."""
    channels, width = window.shape[1], window.shape[4]
    steps = window.stride(0), window.stride(2), width * channels, channels, weights.shape[1]
    whole = not any(step * window.element_size() % 16 for step in steps)
    capable = not window.is_cuda or torch.cuda.get_device_capability(window.device)[0] >= 9
    return whole and capable and not window.data_ptr() % 16 and not weights.data_ptr() % 16


def can_share_rows(window: Tensor, tiling: Tiling) -> bool:
    """shared_rows.py is for Hopper's tensor cores, whose products have 64 rows at least, and numbers of two bytes."""
    hopper = window.is_meta or window.is_cuda and torch.cuda.get_device_capability(window.device)[0] == 9
    return (hopper and window.element_size() == 2 and tiling.columns * 4 >= 64 * tiling.warps
            and window.shape[1] % tiling.depth == 0)
