"""Sparse-linear attention in Triton.

    pool        a program means one block of rows; torch picks the kept blocks from the means
    summarise   a program sums phi(k)^T v and phi(k) over a stretch of tokens; torch adds the stretches and projects
    attend      a program takes one block of queries, or a part of it, through its kept blocks, then adds its linear
                branch

All addresses are int64, all sums fp32 or int32, and in one order: the result is the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dailies.kernels.int8_attention.kernel import (
    key_mean,
    num_stages_on,
    quantize_row_blocks,
    softmax_step,
    start_softmax,
)
from dailies.kernels.int8_attention.reference import LOG2_E
from dailies.kernels.sparse_attention.reference import INT8_EPS, LINEAR_EPS, kept_blocks

STRETCH, TILE = 1024, 64                               # tokens of one program of summarise, and of one product in it


@triton.jit
def pool_kernel(x, means, rows, heads, stride_b, stride_n, stride_h, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The mean row of one block of one head, of the rows it has."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)
    x += head // heads * stride_b + head % heads * stride_h
    values = tl.load(x + row * stride_n + channel[None, :], mask=row < rows, other=0.0).to(tl.float32)
    count = tl.minimum(rows - block * BLOCK, BLOCK)
    tl.store(means + (head * tl.num_programs(0) + block) * HEAD_DIM + channel, tl.sum(values, 0) / count)


@triton.jit
def summary_kernel(k, v, mixed, total, keys, heads, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n,
                   v_stride_h, HEAD_DIM: tl.constexpr, STRETCH: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):
    """phi(k)^T v and the sum of phi(k) over one stretch of tokens of one head; of the last, some tiles may be empty."""
    stretch, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, HEAD_DIM)
    k += head // heads * k_stride_b + head % heads * k_stride_h
    v += head // heads * v_stride_b + head % heads * v_stride_h
    outer, phi_sum = tl.zeros([HEAD_DIM, HEAD_DIM], tl.float32), tl.zeros([HEAD_DIM], tl.float32)
    for tile in range(TILES):
        row = (stretch * STRETCH + tile * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
        real = row < keys
        key = tl.load(k + row * k_stride_n + channel[None, :], mask=real, other=0.0)
        value = tl.load(v + row * v_stride_n + channel[None, :], mask=real, other=0.0)
        phi = tl.where(real, channel_softmax(key), 0.0)
        phi_sum += tl.sum(phi, 0)
        outer = tl.dot(tl.trans(phi.to(value.dtype)), value, outer, input_precision="ieee")
    place = head * tl.num_programs(0) + stretch
    tl.store(mixed + (place * HEAD_DIM + channel[:, None]) * HEAD_DIM + channel[None, :], outer)
    tl.store(total + place * HEAD_DIM + channel, phi_sum)


@triton.jit
def sparse_attention_kernel(near_q, near_k, v, q, q_scale, k_scale, kept, mixed, total, bias, out, queries, keys, heads,
                            q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h,
                            v_stride_b, v_stride_n, v_stride_h, phi_stride_b, phi_stride_n, phi_stride_h,
                            to_base_2, linear_eps, KEEP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
                            BLOCK_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INT8: tl.constexpr,
                            LINEAR: tl.constexpr):
    """ROWS queries of one head over the kept blocks of the block that they are of, COLUMNS keys at once.

    near_q, near_k: q and k or their int8; phi strides: q's.
    """
    first, head = tl.program_id(0) * ROWS, tl.program_id(1).to(tl.int64)
    block, blocks = first // BLOCK_Q, tl.cdiv(queries, BLOCK_Q)
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    batch, slot = head // heads, head % heads
    near_q += batch * q_stride_b + slot * q_stride_h
    near_k += batch * k_stride_b + slot * k_stride_h
    v += batch * v_stride_b + slot * v_stride_h
    kept += (head * blocks + block) * KEEP
    query = tl.load(near_q + row * q_stride_n + channel, mask=row < queries, other=0)
    if INT8:
        to_base_2 *= tl.load(q_scale + head * blocks + block)
    else:
        query = query.to(v.dtype.element_ty)
    top, weight_sum, near = start_softmax(ROWS, HEAD_DIM)
    PARTS: tl.constexpr = BLOCK_K // COLUMNS           # the first has a key that is real
    for i in range(KEEP * PARTS):                      # known when it is compiled: a run has a few shapes of video
        key_block = tl.load(kept + i // PARTS)
        key_row = (key_block * BLOCK_K + i % PARTS * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        real = (key_row < keys)[:, None]
        key = tl.load(near_k + key_row[:, None] * k_stride_n + channel, mask=real, other=0)
        value = tl.load(v + key_row[:, None] * v_stride_n + channel, mask=real, other=0.0)
        if INT8:
            key_scale = tl.load(k_scale + head * tl.cdiv(keys, BLOCK_K) + key_block)
            logits = tl.dot(query, tl.trans(key)).to(tl.float32) * (to_base_2 * key_scale)
        else:
            logits = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="tf32x3") * to_base_2
        logits = tl.where((key_row < keys)[None, :], logits, -float("inf"))
        top, weight_sum, near = softmax_step(logits, value, top, weight_sum, near)
    result = near / weight_sum[:, None]
    if LINEAR:
        q += batch * phi_stride_b + slot * phi_stride_h
        phi = channel_softmax(tl.load(q + row * phi_stride_n + channel, mask=row < queries, other=0.0))
        summary = tl.load(mixed + (head * HEAD_DIM + tl.arange(0, HEAD_DIM)[:, None]) * HEAD_DIM + channel)
        key_sum = tl.load(total + head * HEAD_DIM + channel)
        far = tl.dot(phi.to(summary.dtype), summary, input_precision="tf32x3")
        result += far / (tl.sum(phi * key_sum, 1) + linear_eps)[:, None] + tl.load(bias + channel).to(tl.float32)
    place = (batch * queries + row) * heads + slot                              # of out [B, N, heads]
    tl.store(out + place * HEAD_DIM + channel, result.to(out.dtype.element_ty), mask=row < queries)


@triton.jit
def channel_softmax(x):
    """The feature map of the linear branch, in fp32."""
    x = x.to(tl.float32)
    x = tl.exp(x - tl.max(x, 1)[:, None])
    return x / tl.sum(x, 1)[:, None]


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, keep_ratio: float,
                     int8: bool, block_q: int, block_k: int) -> Tensor:
    kept = kept_blocks(pool_blocks(q, block_q), pool_blocks(k, block_k), keep_ratio)
    linear = None if weight is None else (*projected_summary(k, v, weight), bias)
    return attend_kept_blocks(q, k, v, kept, linear, int8, block_q, block_k)


def pool_blocks(x: Tensor, block: int) -> Tensor:
    """reference.pool_blocks"""
    batch, rows, heads, head_dim = x.shape
    means = x.new_empty((batch, heads, triton.cdiv(rows, block), head_dim), dtype=torch.float32)
    with torch.cuda.device_of(x):
        pool_kernel[(means.shape[2], batch * heads)](
            x, means, rows, heads, *x.stride()[:3], HEAD_DIM=head_dim, BLOCK=block)
    return means


def projected_summary(k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """proj(mean of phi(k)^T v) [B, heads, d, d] in v's dtype, and the mean of phi(k) [B, heads, d] in fp32.

    Means, not sums: the quotient is the same, and fp16 holds them however many keys there are.
    """
    batch, keys, heads, head_dim = k.shape
    stretches = triton.cdiv(keys, STRETCH)
    mixed = k.new_empty((batch, heads, stretches, head_dim, head_dim), dtype=torch.float32)
    total = k.new_empty((batch, heads, stretches, head_dim), dtype=torch.float32)
    with torch.cuda.device_of(k):
        summary_kernel[(stretches, batch * heads)](
            k, v, mixed, total, keys, heads, *k.stride()[:3], *v.stride()[:3],
            HEAD_DIM=head_dim, STRETCH=STRETCH, TILE=TILE, TILES=triton.cdiv(min(STRETCH, keys), TILE), num_warps=8,
            num_stages=num_stages_on(v))
    return (mixed.sum(2) / keys @ weight.float().T).to(v.dtype), total.sum(2) / keys


def attend_kept_blocks(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, linear: tuple[Tensor, Tensor, Tensor] | None,
                       int8: bool, block_q: int, block_k: int) -> Tensor:
    """Softmax attention over kept [B, heads, q blocks, kept], plus the linear branch: two summaries and the bias."""
    batch, queries, heads, head_dim = q.shape
    out = v.new_empty(q.shape)
    if int8:
        near_q, q_scale = quantize_row_blocks(q, block_q, INT8_EPS)
        near_k, k_scale = quantize_row_blocks(k, block_k, INT8_EPS, mean=key_mean(k))
        near_q, near_k = near_q.transpose(1, 2), near_k.transpose(1, 2)
    else:
        near_q, near_k = q, k
        q_scale = k_scale = kept                       # a pointer that is not followed
    mixed, total, bias = linear or (kept, kept, kept)
    rows, columns, warps = attend_tile(v.dtype, block_q, block_k)
    with torch.cuda.device_of(q):
        sparse_attention_kernel[(triton.cdiv(queries, rows), batch * heads)](
            near_q, near_k, v, q, q_scale, k_scale, kept, mixed, total, bias, out, queries, k.shape[1], heads,
            *near_q.stride()[:3], *near_k.stride()[:3], *v.stride()[:3], *q.stride()[:3],
            head_dim ** -0.5 * LOG2_E, LINEAR_EPS / k.shape[1], KEEP=kept.shape[-1], HEAD_DIM=head_dim,
            BLOCK_Q=block_q, BLOCK_K=block_k, ROWS=rows, COLUMNS=columns, INT8=int8, LINEAR=linear is not None,
            num_warps=warps, num_stages=num_stages_on(v))
    return out


def attend_tile(dtype: torch.dtype, block_q: int, block_k: int) -> tuple[int, int, int]:
    """Queries and keys that a program holds at once, and its warps: the whole blocks, but for fp32 parts of them.

    Whole blocks of 128 channels in fp32 need 128 to 192 KB of shared memory, of which most GPUs have 99, and more
    registers than there are.
    """
    if dtype == torch.float32:
        return min(block_q, 32), min(block_k, 32), 8
    return block_q, block_k, 8 if block_q > 64 else 4
