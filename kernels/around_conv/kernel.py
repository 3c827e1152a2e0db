"""Norm with SiLU, bias with residual and the larger picture, in Triton.

Letters  B clips  C channels  T frames  H W rows and columns. A program does some pixels of one frame with all their
channels: grid (pixels, T, B). A frame's pixels lie in order, so what it reads and writes is one piece of memory.
"""

import triton
import triton.language as tl
from torch import Tensor

VALUES, WARPS = 4096, 4                                # of one program: 32 values a lane


@triton.jit
def frame_at_hand(x, clip, frame):
    """Where it begins; clip, frame: elements from one to the next."""
    return x + tl.program_id(2).to(tl.int64) * clip + tl.program_id(1).to(tl.int64) * frame


@triton.jit
def norm_silu_kernel(x, gamma, bias, out, x_clip, x_frame, out_clip, out_frame, PIXELS, C, root,
                     HAS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """root: sqrt(C).  Read once, written once."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    inside = (pixel < PIXELS)[:, None] & (channel < C)[None, :]
    at = pixel[:, None].to(tl.int64) * C + channel[None, :]
    x = frame_at_hand(x, x_clip, x_frame)
    out = frame_at_hand(out, out_clip, out_frame)
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:                                       # 0 beyond C, or it would count in the sum
        z += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    length = tl.sqrt(tl.sum(z * z, 1))
    # NaN stays: it is to be found in the frames
    scale = root / tl.maximum(length, 1e-12, propagate_nan=tl.PropagateNan.ALL)
    z *= scale[:, None] * tl.load(gamma + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    y = z / (1.0 + tl.exp(-z))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_bias_kernel(x, bias, residual, out, x_clip, x_frame, residual_clip, residual_frame, out_clip, out_frame, PIXELS,
                    C, HAS_RESIDUAL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    inside = (pixel < PIXELS)[:, None] & (channel < C)[None, :]
    at = pixel[:, None].to(tl.int64) * C + channel[None, :]
    x = frame_at_hand(x, x_clip, x_frame)
    out = frame_at_hand(out, out_clip, out_frame)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        residual = frame_at_hand(residual, residual_clip, residual_frame)
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def enlarge_kernel(x, bias, out, x_clip, x_frame, out_clip, out_frame, PIXELS, W, C, HAS_BIAS: tl.constexpr,
                   PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pixels of a frame of x [PAIRS * C channels], each to 2 x 2 pixels of PAIRS frames of out [C channels]."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    inside = (pixel < PIXELS)[:, None] & (channel < C)[None, :]
    x = frame_at_hand(x, x_clip, x_frame)
    out += tl.program_id(2).to(tl.int64) * out_clip + tl.program_id(1).to(tl.int64) * PAIRS * out_frame
    corner = 4 * W * (pixel // W).to(tl.int64) + 2 * (pixel % W)   # its upper left pixel, in a picture of 2W columns
    for frame in tl.static_range(PAIRS):
        at = pixel[:, None].to(tl.int64) * (PAIRS * C) + (frame * C + channel)[None, :]
        y = tl.load(x + at, mask=inside, other=0.0)
        if HAS_BIAS:
            added = tl.load(bias + frame * C + channel, mask=channel < C, other=0.0)
            y = y.to(tl.float32) + added.to(tl.float32)[None, :]
        y = y.to(out.dtype.element_ty)
        for row in tl.static_range(2):
            for column in tl.static_range(2):
                at = (corner + 2 * W * row + column)[:, None] * C + channel[None, :]
                tl.store(out + frame * out_frame + at, y, mask=inside)


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if x.numel():
        pixels, channels, grid, blocks = grid_and_blocks(x, x.shape[1])
        norm_silu_kernel[grid](x, gamma, bias, out, *clip_strides(x), *clip_strides(out), pixels, channels,
                               channels ** 0.5, HAS_BIAS=bias is not None, **blocks)


def add_bias(x: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor) -> None:
    if x.numel():
        pixels, channels, grid, blocks = grid_and_blocks(x, x.shape[1])
        add_bias_kernel[grid](x, bias, residual, out, *clip_strides(x),
                              *clip_strides(x if residual is None else residual), *clip_strides(out), pixels, channels,
                              HAS_RESIDUAL=residual is not None, **blocks)


def enlarge(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if x.numel():
        pixels, channels, grid, blocks = grid_and_blocks(x, out.shape[1])
        enlarge_kernel[grid](x, bias, out, *clip_strides(x), *clip_strides(out), pixels, x.shape[4], channels,
                             HAS_BIAS=bias is not None, PAIRS=x.shape[1] // channels, **blocks)


def grid_and_blocks(x: Tensor, channels: int) -> tuple[int, int, tuple[int, int, int], dict[str, int]]:
    """Pixels of a frame, channels, the grid, and how many of both one program does, with the warps for it."""
    batch, _, frames, height, width = x.shape
    block = triton.next_power_of_2(channels)
    pixels_at_once = max(1, VALUES // block)
    grid = (triton.cdiv(height * width, pixels_at_once), frames, batch)
    return height * width, channels, grid, dict(BLOCK_P=pixels_at_once, BLOCK_C=block, num_warps=WARPS)


def clip_strides(x: Tensor) -> tuple[int, int]:
    """From clip to clip and from frame to frame."""
    return x.stride(0), x.stride(2)
