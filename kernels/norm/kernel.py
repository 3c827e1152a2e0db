"""Layer norm with residual, modulation and quantisation, and RMS norm with or without rotary positions, in Triton.

Letters  B samples  N tokens  D width.  Statistics are two-pass in fp32: the mean first, then the squares about it, in
which lanes beyond the row count as nothing (the published fast layer norm lets them count as mean^2).

A program does ROWS tokens, side by side: gains, scales, shifts and gates, which are the same for all tokens of a
sample, are then read from the L2 cache once for all of them. How many: `rows_and_warps`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dailies.kernels.int8_linear.kernel import quantize_tile, round_half_even
from dailies.kernels.int8_linear.reference import BLOCK
from dailies.kernels.norm import Affine, Update


@triton.jit
def modulate(y, gain, bias, scale, shift, sample, column, inside, D, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
             HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr):
    """y [..., columns] * gain + bias, then * (1 + scale) + shift of its sample; the parts that are there."""
    if HAS_GAIN:
        y *= tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        y *= 1.0 + tl.load(scale + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        y += tl.load(shift + sample * D + column, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def join(z, update, gate, at, inside, at_gate, in_row, DTYPE: tl.constexpr, HAS_GATE: tl.constexpr):
    """z + gate * update, rounded as a stream of this dtype is."""
    added = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        added *= tl.load(gate + at_gate, mask=in_row, other=0.0).to(tl.float32)
    return (z + added).to(DTYPE)


@triton.jit
def modulated_norm_kernel(x, earlier, earlier_gate, update, gate, gain, bias, scale, shift, stream, y, scales,
                          mean_rstd, N, D, eps, HAS_EARLIER: tl.constexpr, HAS_EARLIER_GATE: tl.constexpr,
                          HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr, KEEP: tl.constexpr, HAS_GAIN: tl.constexpr,
                          HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
                          OUTPUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
                          CENTRED: tl.constexpr = True):
    """One program does ROWS tokens of one sample, which stay in registers: read once, every result written once.

    Grid (B * N / ROWS rounded up).  OUTPUT "float" writes y; "rows" int8 y and each token's scale; "blocks" mean and
    1 / deviation for the tile kernel.
    """
    per_sample = tl.cdiv(N, ROWS)
    program = tl.program_id(0).to(tl.int64)
    sample = program // per_sample
    token = program % per_sample * ROWS + tl.arange(0, ROWS)
    row, real = sample * N + token, token < N
    column = tl.arange(0, BLOCK_D)[None, :]
    in_row = column < D
    inside = real[:, None] & in_row
    at = row[:, None] * D + column
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_EARLIER:
        z = join(z, earlier, earlier_gate, at, inside, sample * D + column, in_row, x.dtype.element_ty,
                 HAS_EARLIER_GATE).to(tl.float32)
    if HAS_UPDATE:
        kept = join(z, update, gate, at, inside, sample * D + column, in_row, x.dtype.element_ty, HAS_GATE)
        if KEEP:
            tl.store(stream + at, kept, mask=inside)
        z = kept.to(tl.float32)                        # what is normalised is what the next reader finds
    mean = tl.sum(z, 1) / D if CENTRED else tl.zeros((ROWS,), tl.float32)
    centred = tl.where(in_row, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    if OUTPUT == "blocks":
        tl.store(mean_rstd + 2 * row, mean, mask=real)
        tl.store(mean_rstd + 2 * row + 1, rstd, mask=real)
    else:
        z = modulate(centred * rstd[:, None], gain, bias, scale, shift, sample, column, in_row, D,
                     HAS_GAIN, HAS_BIAS, HAS_SCALE, HAS_SHIFT)
        if OUTPUT == "rows":
            amax = tl.maximum(tl.max(tl.abs(tl.where(in_row, z, 0.0)), 1), 1e-8)
            grow = tl.div_rn(tl.full((ROWS,), 127.0, tl.float32), amax)
            tl.store(y + at, round_half_even(z * grow[:, None]).to(tl.int8), mask=inside)
            tl.store(scales + row, tl.div_rn(amax, tl.full((ROWS,), 127.0, tl.float32)), mask=real)
        else:
            tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def quantize_norm_blocks_kernel(stream, mean_rstd, gain, bias, scale, shift, y, scales, N, D,
                                HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
                                HAS_SHIFT: tl.constexpr, TILE: tl.constexpr):
    """One program normalises and quantises one tile of one sample: grid (tiles of D, tiles of N, B)."""
    sample = tl.program_id(2).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = sample * N + token
    inside = (token < N)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    z = tl.load(stream + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_rstd + 2 * row, mask=token < N, other=0.0)
    rstd = tl.load(mean_rstd + 2 * row + 1, mask=token < N, other=0.0)
    z = modulate((z - mean[:, None]) * rstd[:, None], gain, bias, scale, shift, sample, column[None, :],
                 (column < D)[None, :], D, HAS_GAIN, HAS_BIAS, HAS_SCALE, HAS_SHIFT)
    amax = tl.maximum(tl.max(tl.abs(tl.where(inside, z, 0.0))), 1e-8)
    tl.store(y + at, quantize_tile(z, amax), mask=inside)
    tile = (sample * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scales + tile, tl.div_rn(amax, 128.0))


@triton.jit
def rms_rope_kernel(q, k, q_gain, k_gain, cos, sin, q_out, k_out, N, q_sample, q_row, k_sample, k_row, PAIRS,
                    HEAD_PAIRS, eps, ROWS: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """One program does ROWS tokens of one sample of q (grid axis 1: 0) or of k (1): norm over the full width, then
    each pair turned.  Grid (B * N / ROWS rounded up, 2)."""
    per_sample = tl.cdiv(N, ROWS)
    program = tl.program_id(0).to(tl.int64)
    sample = program // per_sample
    token = (program % per_sample * ROWS + tl.arange(0, ROWS))[:, None]
    real = token < N
    column = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]    # read and written in one piece, split in registers
    in_row = column < 2 * PAIRS
    inside = real & in_row
    if tl.program_id(1) == 0:
        x = tl.load(q + sample * q_sample + token * q_row + column, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(q_gain + column, mask=in_row, other=0.0).to(tl.float32)
    else:
        x = tl.load(k + sample * k_sample + token * k_row + column, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(k_gain + column, mask=in_row, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / (2 * PAIRS) + eps)
    a, b = tl.split(tl.reshape(x * rstd[:, None] * gain, (ROWS, BLOCK_PAIRS, 2)))
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    angle = token * HEAD_PAIRS + pair % HEAD_PAIRS
    c = tl.load(cos + angle, mask=real & (pair < PAIRS), other=0.0)
    s = tl.load(sin + angle, mask=real & (pair < PAIRS), other=0.0)
    turned = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (ROWS, 2 * BLOCK_PAIRS))
    at = (sample * N + token) * (2 * PAIRS) + column
    if tl.program_id(1) == 0:
        tl.store(q_out + at, turned.to(q_out.dtype.element_ty), mask=inside)
    else:
        tl.store(k_out + at, turned.to(k_out.dtype.element_ty), mask=inside)


@triton.jit
def rms_rope_halves_kernel(x, gain, cos, sin, out, N, x_sample, x_row, D, HEAD, eps, ROWS: tl.constexpr,
                           BLOCK_D: tl.constexpr):
    """One program does ROWS tokens of one sample: norm over the full width, then each channel turned with its partner,
    half a head away, which is read again, from the cache.  Grid (B * N / ROWS rounded up)."""
    per_sample = tl.cdiv(N, ROWS)
    program = tl.program_id(0).to(tl.int64)
    sample = program // per_sample
    token = (program % per_sample * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    in_row = column < D
    inside = (token < N) & in_row
    half = HEAD // 2
    first = column % HEAD < half
    partner = tl.where(first, column + half, column - half)
    at = x + sample * x_sample + token * x_row
    z = tl.load(at + column, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(at + partner, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(z * z, 1) / D + eps)
    z *= rstd[:, None] * tl.load(gain + column, mask=in_row, other=0.0).to(tl.float32)
    other *= rstd[:, None] * tl.load(gain + partner, mask=in_row, other=0.0).to(tl.float32)
    angle = token * (D // 2) + column // HEAD * half + column % half
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    turned = z * c + tl.where(first, -other, other) * s
    tl.store(out + (sample * N + token) * D + column, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_kernel(x, gain, y, M, D, stride, eps, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program does ROWS of the M rows, which stay in registers between their sums of squares and their results."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    in_row = column < D
    inside = (row < M) & in_row
    z = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(z * z, 1) / D + eps)
    z *= rstd[:, None] * tl.load(gain + column, mask=in_row, other=0.0).to(tl.float32)
    tl.store(y + row * D + column, z.to(y.dtype.element_ty), mask=inside)


def modulated_norm(x: Tensor, updates: Sequence[Update], affine: Affine, keep: bool, eps: float, output: str,
                   centred: bool) -> list[Tensor]:
    batch, tokens, width = x.shape
    (earlier, earlier_gate), (update, gate) = [(None, None), (None, None), *updates][-2:]
    earlier, earlier_gate, update, gate, gain, bias, scale, shift = (
        part if part is None else part.contiguous() for part in (earlier, earlier_gate, update, gate, *affine))
    # blocks are scaled in a second pass, over the stream
    stream = torch.empty_like(x) if update is not None and (keep or output == "blocks") else None
    y = torch.empty_like(x, dtype=torch.int8 if output in ("rows", "blocks") else getattr(torch, output))
    scales = mean_rstd = None
    if output == "rows":
        scales = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    if output == "blocks":
        tiles = (triton.cdiv(tokens, BLOCK), triton.cdiv(width, BLOCK))
        scales = torch.empty((batch, *tiles), dtype=torch.float32, device=x.device)
        mean_rstd = torch.empty((batch, tokens, 2), dtype=torch.float32, device=x.device)
    has = dict(HAS_GAIN=gain is not None, HAS_BIAS=bias is not None,
               HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None)
    results = [part for part in (stream if keep else None, y, scales) if part is not None]
    if not x.numel():
        return results
    block = triton.next_power_of_2(width)
    rows, warps = rows_and_warps(block)
    # without fused multiply-adds a value is rounded to int8 as in the reference, and memory is what it waits for
    modulated_norm_kernel[(batch * triton.cdiv(tokens, rows),)](
        x, earlier, earlier_gate, update, gate, gain, bias, scale, shift, stream, y, scales, mean_rstd, tokens, width,
        eps, HAS_EARLIER=earlier is not None, HAS_EARLIER_GATE=earlier_gate is not None, HAS_UPDATE=update is not None,
        HAS_GATE=gate is not None, KEEP=stream is not None, **has,
        OUTPUT=output if output in ("rows", "blocks") else "float", ROWS=rows, BLOCK_D=block, CENTRED=centred,
        num_warps=warps, enable_fp_fusion=False)
    if output == "blocks":
        quantize_norm_blocks_kernel[(tiles[1], tiles[0], batch)](
            x if stream is None else stream, mean_rstd, gain, bias, scale, shift, y, scales, tokens, width, **has,
            TILE=BLOCK, num_warps=8, enable_fp_fusion=False)
    return results


def rms_rope(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
             dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, tokens, width = q.shape
    shape = (batch, tokens, heads, width // heads)
    q_out, k_out = (torch.empty(shape, dtype=dtype, device=q.device) for _ in range(2))
    if q.numel():
        block = triton.next_power_of_2(width // 2)
        rows, warps = rows_and_warps(2 * block)
        rms_rope_kernel[(batch * triton.cdiv(tokens, rows), 2)](
            q, k, q_gain.contiguous(), k_gain.contiguous(), cos.contiguous(), sin.contiguous(), q_out, k_out, tokens,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), width // 2, width // heads // 2, eps, ROWS=rows,
            BLOCK_PAIRS=block, num_warps=warps)
    return q_out, k_out


def rms_rope_halves(x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float,
                    dtype: torch.dtype) -> Tensor:
    batch, tokens, width = x.shape
    out = torch.empty((batch, tokens, heads, width // heads), dtype=dtype, device=x.device)
    if x.numel():
        block = triton.next_power_of_2(width)
        rows, warps = rows_and_warps(block)
        rms_rope_halves_kernel[(batch * triton.cdiv(tokens, rows),)](
            x, gain.contiguous(), cos.contiguous(), sin.contiguous(), out, tokens, x.stride(0), x.stride(1), width,
            width // heads, eps, ROWS=rows, BLOCK_D=block, num_warps=warps)
    return out


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    width = x.shape[-1]
    rows_of_x = x.reshape(-1, width)
    if rows_of_x.stride(-1) != 1:
        rows_of_x = rows_of_x.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel():
        block = triton.next_power_of_2(width)
        rows, warps = rows_and_warps(block)
        rms_norm_kernel[(triton.cdiv(len(rows_of_x), rows),)](
            rows_of_x, gain.contiguous(), y, len(rows_of_x), width, rows_of_x.stride(0), eps, ROWS=rows, BLOCK_D=block,
            num_warps=warps)
    return y


def rows_and_warps(block: int) -> tuple[int, int]:
    """Rows of a program and its warps, of rows that are padded to `block` channels.

    16 values a lane up to 4,096 channels, 32 for 5,120, which still fit the registers.
    """
    return 1, min(8, max(1, block // 512))
