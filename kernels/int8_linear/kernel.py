"""INT8 quantisation and linear layers in Triton.

Letters  B samples  M rows of a sample  N output channels  K input channels.  Rows of all samples lie end to end in
memory. Both operands are K-major, the only layout that Hopper's 8-bit matrix instructions read: W^T is never made.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.int8_linear.reference import BLOCK

GROUP = 8                                              # tiles of rows that share the columns' operand while it is in L2


@triton.jit
def round_half_even(x):
    """For |x| < 2^22: fp32 holds no halves above 2^23, so the addition rounds. Launch with enable_fp_fusion=False."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize_rows_kernel(x, values, scales, K, stride, BLOCK_K: tl.constexpr):
    """One program quantises one row; the row stays in registers between its maximum and its rounding."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    inside = column < K
    y = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(y), 0), 1e-8)
    tl.store(values + row * K + column, round_half_even(y * tl.div_rn(127.0, amax)).to(tl.int8), mask=inside)
    tl.store(scales + row, tl.div_rn(amax, 127.0))


@triton.jit
def quantize_tile(y, amax):
    return tl.minimum(tl.maximum(round_half_even(y * tl.div_rn(128.0, amax)), -128.0), 127.0).to(tl.int8)


@triton.jit
def quantize_blocks_kernel(x, values, scales, M, K, TILE: tl.constexpr):
    """One program quantises one tile of one sample: grid (tiles of K, tiles of M, B)."""
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = (row < M)[:, None] & (column < K)[None, :]
    at = (sample * M + row)[:, None] * K + column[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(y)), 1e-8)
    tl.store(values + at, quantize_tile(y, amax), mask=inside)
    tile = (sample * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scales + tile, tl.div_rn(amax, 128.0))


@triton.jit
def int8_linear_kernel(x, x_scales, w, w_scales, bias, gate, residual, y, M, N, K, tiles_m,
                       HAS_BIAS: tl.constexpr, GELU: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                       IN_BLOCKS: tl.constexpr, STEPS: tl.constexpr, WHOLE_K: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):
    """One program makes one tile [BLOCK_M, BLOCK_N] of one sample's output, over all of K, in one fixed order.

    IN_BLOCKS: BLOCK_M = BLOCK_K = BLOCK_N = 128 are the tiles of the scales; each step's int32 sums go into fp32,
    scaled.  Otherwise the int32 sums run through, and the scales of row and column come at the end.
    Programs go down GROUP_M tiles of rows before the next tile of columns, so that both operands are found in L2.
    """
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)      # tiles_m: those of all samples
    tile_m = first + (program % (GROUP_M * tiles_n)) % height
    tile_n = (program % (GROUP_M * tiles_n)) // height
    per_sample = tl.cdiv(M, BLOCK_M)
    sample = (tile_m // per_sample).to(tl.int64)
    row = (tile_m % per_sample) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row, in_column = row < M, column < N
    from_row = sample * M + tl.where(in_row, row, 0)   # rows outside read the first one, and are not stored
    from_column = tl.where(in_column, column, 0).to(tl.int64)
    step = tl.arange(0, BLOCK_K)
    a_at = x + from_row[:, None] * K + step[None, :]
    b_at = w + from_column[None, :] * K + step[:, None]

    if IN_BLOCKS:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        x_scale_at = x_scales + tile_m.to(tl.int64) * STEPS
        w_scale_at = w_scales + tile_n.to(tl.int64) * STEPS
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for place in range(0, STEPS):                      # known when it is compiled: a model has two or three different K
        if WHOLE_K:
            a, b = tl.load(a_at), tl.load(b_at)
        else:
            left = K - place * BLOCK_K                 # the last step may have fewer channels than BLOCK_K
            a = tl.load(a_at, mask=(step < left)[None, :], other=0)
            b = tl.load(b_at, mask=(step < left)[:, None], other=0)
        if IN_BLOCKS:
            scale = tl.load(x_scale_at + place) * tl.load(w_scale_at + place)
            total += tl.dot(a, b, out_dtype=tl.int32).to(tl.float32) * scale
        else:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        a_at += BLOCK_K
        b_at += BLOCK_K

    if IN_BLOCKS:
        z = total
    else:
        x_scale = tl.load(x_scales + from_row)
        z = total.to(tl.float32) * (x_scale[:, None] * tl.load(w_scales + from_column)[None, :])
    if HAS_BIAS:
        z += tl.load(bias + from_column).to(tl.float32)[None, :]
    if GELU:                                           # 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
        z = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    if HAS_GATE:
        z *= tl.load(gate + sample * N + from_column).to(tl.float32)[None, :]
    at = (sample * M + row)[:, None] * N + column[None, :]
    inside = in_row[:, None] & in_column[None, :]
    if HAS_RESIDUAL:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if values.numel():
        quantize_rows_kernel[(len(rows),)](rows, values, scales, rows.shape[1], rows.stride(0), num_warps=8,
                                           BLOCK_K=triton.next_power_of_2(rows.shape[1]), enable_fp_fusion=False)
    return values, scales


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    *samples, rows, columns = x.shape
    batch, tiles = (samples or [1])[0], (triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK))
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((*samples, *tiles), dtype=torch.float32, device=x.device)
    if values.numel():
        quantize_blocks_kernel[(tiles[1], tiles[0], batch)](x, values, scales, rows, columns, TILE=BLOCK, num_warps=8,
                                                            enable_fp_fusion=False)
    return values, scales


def int8_linear(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
                gelu: bool, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    in_blocks = weight_scales.ndim == 2
    if x_scales is None:
        x, x_scales = quantize_blocks(x) if in_blocks else quantize_rows(x)
    (out_features, in_features), shape = weight.shape, (*x.shape[:-1], len(weight))
    y = torch.empty(shape, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    by_sample = x.ndim == 3 and (in_blocks or gate is not None)
    batch, rows = (x.shape[0], x.shape[1]) if by_sample else (1, y.numel() // out_features)
    block_m, block_n, block_k, warps, stages = tile(in_blocks, residual is not None, shared_memory(x.device))
    tiles_m = batch * triton.cdiv(rows, block_m)
    x, weight, x_scales, weight_scales = (part.contiguous() for part in (x, weight, x_scales, weight_scales))
    bias, gate, residual = (part if part is None else part.contiguous() for part in (bias, gate, residual))
    int8_linear_kernel[(tiles_m * triton.cdiv(out_features, block_n),)](
        x, x_scales, weight, weight_scales, bias, gate, residual, y, rows, out_features, in_features, tiles_m,
        HAS_BIAS=bias is not None, GELU=gelu, HAS_GATE=gate is not None, HAS_RESIDUAL=residual is not None,
        IN_BLOCKS=in_blocks, STEPS=triton.cdiv(in_features, block_k), WHOLE_K=in_features % block_k == 0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP, num_warps=warps, num_stages=stages)
    return y


def tile(in_blocks: bool, with_residual: bool, shared: int) -> tuple[int, int, int, int, int]:
    """Rows, columns and K of a program's tile, warps, stages: stages * (rows + columns) * K bytes of `shared`."""
    if shared < 147456:                                # Ada, consumer Blackwell: 99 KB
        return (128, 128, 128, 8, 2) if in_blocks else (128, 128, 64, 8, 3)
    # beside 256 columns of sums a residual does not fit into the registers: ptxas spills 1,252 bytes a lane on sm_90
    return (128, 128, 128, 8, 3) if in_blocks or with_residual else (128, 256, 128, 8, 3)


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; Hopper's where there is no GPU to ask."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 232448
