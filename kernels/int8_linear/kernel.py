"""INT8 quantisation and linear layers in Triton.

Letters  B samples  M rows of a sample  N output channels  K input channels.  Rows of all samples lie end to end in
memory. Both operands are K-major, the only layout that Hopper's 8-bit matrix instructions read: W^T is never made.

How a layer is cut, and by what its operands are loaded, is a `Tiling`; README.md has the times of those tried.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dailies.kernels.int8_linear.reference import BLOCK

GROUP = 8                                              # tiles of rows that share the columns' operand while it is in L2
ROOMY = 147456                                         # bytes of shared memory: A100 and what came later, not GeForce


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


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """rows, columns and depth of a program's tile, its warps, and how many steps of depth are on their way at once.

    parts: 1, 2 or 4, of a tile's columns in the epilogue: a part needs fewer registers.  registers: at most so many a
    thread, so that two programs fit a multiprocessor.  descriptors: Hopper's copy engine (TMA) loads and stores whole
    tiles for one thread that asks; else each thread loads 16 bytes at a time.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 128
    warps: int = 8
    stages: int = 3
    parts: int = 1
    registers: int | None = None
    descriptors: bool = False


@triton.jit
def int8_linear_kernel(x, x_scales, w, w_scales, bias, gate, residual, y, M, N, K, tiles_m,
                       HAS_BIAS: tl.constexpr, GELU: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
                       IN_BLOCKS: tl.constexpr, STEPS: tl.constexpr, WHOLE_K: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PARTS: tl.constexpr,
                       LOADS_TILES: tl.constexpr, STORES_TILES: tl.constexpr):
    """One program makes one tile [BLOCK_M, BLOCK_N] of one sample's output, over all of K, in one fixed order.

    IN_BLOCKS: BLOCK_M = BLOCK_K = BLOCK_N = 128 are the tiles of the scales; each step's int32 sums go into fp32,
    scaled.  Otherwise the int32 sums run through, and the scales of row and column come at the end.
    LOADS_TILES: x [B * M, K] and w are descriptors of a step's tiles; STORES_TILES: y is one, of a part, of one sample.
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
    top, left = (tile_m % per_sample) * BLOCK_M, tile_n * BLOCK_N
    step = tl.arange(0, BLOCK_K)
    if not LOADS_TILES:                                # rows and columns outside read the first, and are not stored
        row, column = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
        a_at = x + (sample * M + tl.where(row < M, row, 0))[:, None] * K + step[None, :]
        b_at = w + tl.where(column < N, column, 0).to(tl.int64)[None, :] * K + step[:, None]
    if IN_BLOCKS:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        x_scale_at = x_scales + tile_m.to(tl.int64) * STEPS
        w_scale_at = w_scales + tile_n.to(tl.int64) * STEPS
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for place in range(0, STEPS):                      # known when it is compiled: a model has two or three different K
        if LOADS_TILES:                                # rows past the sample are those of the next, and are not stored
            a = x.load([(sample * M).to(tl.int32) + top, place * BLOCK_K])
            b = w.load([left, place * BLOCK_K]).T
        elif WHOLE_K:
            a, b = tl.load(a_at + place * BLOCK_K), tl.load(b_at + place * BLOCK_K)
        else:                                          # the last step may have fewer channels than BLOCK_K
            inside = step < K - place * BLOCK_K
            a = tl.load(a_at + place * BLOCK_K, mask=inside[None, :], other=0)
            b = tl.load(b_at + place * BLOCK_K, mask=inside[:, None], other=0)
        if IN_BLOCKS:
            scale = tl.load(x_scale_at + place) * tl.load(w_scale_at + place)
            total += tl.dot(a, b, out_dtype=tl.int32).to(tl.float32) * scale
        else:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
    finish_parts(total, x_scales, w_scales, bias, gate, residual, y, sample, top, left, M, N, HAS_BIAS, GELU, HAS_GATE,
                 HAS_RESIDUAL, IN_BLOCKS, STORES_TILES, BLOCK_M, BLOCK_N, PARTS)


@triton.jit
def finish_parts(total, x_scales, w_scales, bias, gate, residual, y, sample, top, left, M, N, HAS_BIAS: tl.constexpr,
                 GELU: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IN_BLOCKS: tl.constexpr,
                 STORES_TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """`finish` of a whole tile, or of its halves or quarters one after the other."""
    if PARTS == 1:
        finish(total, x_scales, w_scales, bias, gate, residual, y, sample, top, left, M, N, HAS_BIAS, GELU, HAS_GATE,
               HAS_RESIDUAL, IN_BLOCKS, STORES_TILES, BLOCK_M, BLOCK_N)
    else:
        near, far = halves(total, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            if half == 0:                              # noqa: SIM108 (compiled)
                here = near
            else:
                here = far
            at = left + half * (BLOCK_N // 2)
            if PARTS == 2:
                finish(here, x_scales, w_scales, bias, gate, residual, y, sample, top, at, M, N, HAS_BIAS, GELU,
                       HAS_GATE, HAS_RESIDUAL, IN_BLOCKS, STORES_TILES, BLOCK_M, BLOCK_N // 2)
            else:
                one, other = halves(here, BLOCK_M, BLOCK_N // 2)
                finish(one, x_scales, w_scales, bias, gate, residual, y, sample, top, at, M, N, HAS_BIAS, GELU,
                       HAS_GATE, HAS_RESIDUAL, IN_BLOCKS, STORES_TILES, BLOCK_M, BLOCK_N // 4)
                finish(other, x_scales, w_scales, bias, gate, residual, y, sample, top, at + BLOCK_N // 4, M, N,
                       HAS_BIAS, GELU, HAS_GATE, HAS_RESIDUAL, IN_BLOCKS, STORES_TILES, BLOCK_M, BLOCK_N // 4)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of the columns; no number changes its thread where a thread has some of each."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def finish(total, x_scales, w_scales, bias, gate, residual, y, sample, top, left, M, N, HAS_BIAS: tl.constexpr,
           GELU: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IN_BLOCKS: tl.constexpr,
           STORES_TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Scales, bias, GELU, gate and residual of a part that begins at (top, left) of a sample; rounded once, stored."""
    row, column = top + tl.arange(0, ROWS), left + tl.arange(0, COLUMNS)
    in_row, in_column = row < M, column < N
    if IN_BLOCKS:
        z = total
    else:
        x_scale = tl.load(x_scales + sample * M + row, mask=in_row, other=0.0)
        w_scale = tl.load(w_scales + column, mask=in_column, other=0.0)
        z = total.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    if HAS_BIAS:
        z += tl.load(bias + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    if GELU:                                           # 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
        z = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    if HAS_GATE:
        z *= tl.load(gate + sample * N + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    at = (sample * M + row)[:, None] * N + column[None, :]
    inside = in_row[:, None] & in_column[None, :]
    if HAS_RESIDUAL:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if STORES_TILES:
        y.store([top, left], z.to(y.dtype))
    else:
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
                gelu: bool, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype,
                tiling: Tiling | None = None) -> Tensor:
    """tiling: None is the one for this device."""
    in_blocks = weight_scales.ndim == 2
    if x_scales is None:
        x, x_scales = quantize_blocks(x) if in_blocks else quantize_rows(x)
    (out_features, in_features), shape = weight.shape, (*x.shape[:-1], len(weight))
    y = torch.empty(shape, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    by_sample = x.ndim == 3 and (in_blocks or gate is not None)
    batch, rows = (x.shape[0], x.shape[1]) if by_sample else (1, y.numel() // out_features)
    tiling = tiling or tiling_on(x.device, in_blocks, residual is not None)
    tiles_m = batch * triton.cdiv(rows, tiling.rows)
    x, weight, x_scales, weight_scales = (part.contiguous() for part in (x, weight, x_scales, weight_scales))
    bias, gate, residual = (part if part is None else part.contiguous() for part in (bias, gate, residual))
    # descriptors need rows of whole 16 bytes, and a tile that is stored must not reach into the next sample
    loads_tiles = tiling.descriptors and in_features % 16 == 0
    stores_tiles = loads_tiles and batch == 1 and out_features * y.element_size() % 16 == 0
    into = y
    if loads_tiles:
        x = TensorDescriptor.from_tensor(x.view(-1, in_features), [tiling.rows, tiling.depth])
        weight = TensorDescriptor.from_tensor(weight, [tiling.columns, tiling.depth])
    if stores_tiles:
        into = TensorDescriptor.from_tensor(y.view(rows, out_features), [tiling.rows, tiling.columns // tiling.parts])
    options = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    int8_linear_kernel[(tiles_m * triton.cdiv(out_features, tiling.columns),)](
        x, x_scales, weight, weight_scales, bias, gate, residual, into, rows, out_features, in_features, tiles_m,
        HAS_BIAS=bias is not None, GELU=gelu, HAS_GATE=gate is not None, HAS_RESIDUAL=residual is not None,
        IN_BLOCKS=in_blocks, STEPS=triton.cdiv(in_features, tiling.depth), WHOLE_K=in_features % tiling.depth == 0,
        BLOCK_M=tiling.rows, BLOCK_N=tiling.columns, BLOCK_K=tiling.depth, GROUP_M=GROUP, PARTS=tiling.parts,
        LOADS_TILES=loads_tiles, STORES_TILES=stores_tiles, num_warps=tiling.warps, num_stages=tiling.stages, **options)
    return y


def tiling_on(device: torch.device, in_blocks: bool, with_residual: bool) -> Tiling:
    """Hopper's, in Triton's interpreter too."""
    if device.type != "cuda":
        return replace(tiling_for(90, 232448, in_blocks, with_residual), registers=None)
    about = torch.cuda.get_device_properties(device)
    return tiling_for(10 * about.major + about.minor, about.shared_memory_per_block_optin, in_blocks, with_residual)


def tiling_for(arch: int, shared: int, in_blocks: bool, with_residual: bool) -> Tiling:
    """arch: 90 for sm_90.  stages * (rows + columns) * depth bytes are to fit `shared`, which one program may have."""
    if in_blocks:
        return Tiling(stages=3 if shared >= ROOMY else 2)
    if arch == 90:                                     # two programs a multiprocessor: one scales while one multiplies
        return Tiling(parts=4 if with_residual else 2, registers=128, descriptors=True)
    if shared < ROOMY:                                 # Ada, consumer Blackwell: 99 KB
        return Tiling(depth=64)
    # beside 256 columns of sums a residual does not fit into the registers: ptxas spills 1,252 bytes a lane on sm_90
    return Tiling(columns=128 if with_residual else 256)
