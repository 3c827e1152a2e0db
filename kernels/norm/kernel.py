"""Layer norm with residual, modulation and quantisation, and RMS norm with rotary positions, in Triton.

Letters  B samples  N tokens  D width.  Statistics are two-pass in fp32: the mean first, then the squares about it, in
which lanes beyond the row count as nothing (the published fast layer norm lets them count as mean^2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.int8_linear.kernel import quantize_tile, round_half_even
from kernels.int8_linear.reference import BLOCK


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
def modulated_norm_kernel(x, update, gate, gain, bias, scale, shift, stream, y, scales, mean_rstd, N, D, eps,
                          HAS_UPDATE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_GAIN: tl.constexpr,
                          HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
                          OUTPUT: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program does one token, which stays in registers: read once, every result written once.

    OUTPUT "float" writes y; "rows" int8 y and the token's scale; "blocks" mean and 1 / deviation for the tile kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    sample = row // N
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    at = row * D + column
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_UPDATE:
        added = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + sample * D + column, mask=inside, other=0.0).to(tl.float32)
        kept = (z + added).to(stream.dtype.element_ty)
        tl.store(stream + at, kept, mask=inside)
        z = kept.to(tl.float32)                        # what is normalised is what the next reader finds
    mean = tl.sum(z, 0) / D
    centred = tl.where(inside, z - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    if OUTPUT == "blocks":
        tl.store(mean_rstd + 2 * row, mean)
        tl.store(mean_rstd + 2 * row + 1, rstd)
    else:
        z = modulate(centred * rstd, gain, bias, scale, shift, sample, column, inside, D,
                     HAS_GAIN, HAS_BIAS, HAS_SCALE, HAS_SHIFT)
        if OUTPUT == "rows":
            amax = tl.maximum(tl.max(tl.abs(tl.where(inside, z, 0.0)), 0), 1e-8)
            tl.store(y + at, round_half_even(z * tl.div_rn(127.0, amax)).to(tl.int8), mask=inside)
            tl.store(scales + row, tl.div_rn(amax, 127.0))
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
                    HEAD_PAIRS, eps, BLOCK_PAIRS: tl.constexpr):
    """One program does one token of q (grid axis 1: 0) or of k (1): norm over the full width, then each pair turned."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // N, row % N
    column = tl.arange(0, 2 * BLOCK_PAIRS)             # read and written in one piece, split in registers
    inside = column < 2 * PAIRS
    if tl.program_id(1) == 0:
        x = tl.load(q + sample * q_sample + token * q_row + column, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(q_gain + column, mask=inside, other=0.0).to(tl.float32)
    else:
        x = tl.load(k + sample * k_sample + token * k_row + column, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(k_gain + column, mask=inside, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / (2 * PAIRS) + eps)
    a, b = tl.split(tl.reshape(x * rstd * gain, (BLOCK_PAIRS, 2)))
    pair = tl.arange(0, BLOCK_PAIRS)
    angle = token * HEAD_PAIRS + pair % HEAD_PAIRS
    c = tl.load(cos + angle, mask=pair < PAIRS, other=0.0)
    s = tl.load(sin + angle, mask=pair < PAIRS, other=0.0)
    turned = tl.reshape(tl.join(a * c - b * s, a * s + b * c), (2 * BLOCK_PAIRS,))
    at = row * (2 * PAIRS) + column
    if tl.program_id(1) == 0:
        tl.store(q_out + at, turned.to(q_out.dtype.element_ty), mask=inside)
    else:
        tl.store(k_out + at, turned.to(k_out.dtype.element_ty), mask=inside)


def modulated_norm(x: Tensor, update: Tensor | None, gate: Tensor | None, gain: Tensor | None, bias: Tensor | None,
                   scale: Tensor | None, shift: Tensor | None, eps: float, output: str) -> list[Tensor]:
    batch, tokens, width = x.shape
    update, gate, gain, bias, scale, shift = (part if part is None else part.contiguous()
                                              for part in (update, gate, gain, bias, scale, shift))
    stream = None if update is None else torch.empty_like(x)
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
    results = [part for part in (stream, y, scales) if part is not None]
    if not x.numel():
        return results
    block = triton.next_power_of_2(width)
    # without fused multiply-adds a value is rounded to int8 as in the reference, and memory is what it waits for
    modulated_norm_kernel[(batch * tokens,)](
        x, update, gate, gain, bias, scale, shift, stream, y, scales, mean_rstd, tokens, width, eps,
        HAS_UPDATE=update is not None, HAS_GATE=gate is not None, **has,
        OUTPUT=output if output in ("rows", "blocks") else "float", BLOCK_D=block, num_warps=warps(block),
        enable_fp_fusion=False)
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
        rms_rope_kernel[(batch * tokens, 2)](
            q, k, q_gain.contiguous(), k_gain.contiguous(), cos.contiguous(), sin.contiguous(), q_out, k_out, tokens,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), width // 2, width // heads // 2, eps, BLOCK_PAIRS=block,
            num_warps=warps(2 * block))
    return q_out, k_out


def warps(block: int) -> int:
    """16 values a lane up to 4,096 channels, 32 for 5,120, which still fit the registers."""
    return min(8, max(1, block // 512))
