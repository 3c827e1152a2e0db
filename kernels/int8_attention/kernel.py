"""INT8 attention in Triton: a program quantises a block of rows of q or k; a program attends for a block of queries.

All addresses are int64, all sums fp32 or int32. Nothing is summed across programs: the result is the same every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dailies.kernels.int8_attention.reference import BLOCK_K, BLOCK_Q, EPS, LOG2_E


@triton.jit
def quantize_kernel(x, mean, x_int8, scale, rows, heads, stride_b, stride_n, stride_h, factor, eps,
                    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WITH_MEAN: tl.constexpr):
    """One block of rows of one head."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    real = row < rows
    x += head // heads * stride_b + head % heads * stride_h
    values = tl.load(x + row * stride_n + channel, mask=real, other=0.0)
    if WITH_MEAN:
        centre = tl.load(mean + head * HEAD_DIM + channel)
        values = (values.to(tl.float32) - centre.to(tl.float32)).to(values.dtype)
        values = tl.where(real, values, 0.0)
    values = values.to(tl.float32) * factor
    divisor = tl.max(tl.max(tl.abs(values), 1), 0) / 127.0 + eps
    values = tl.div_rn(values, tl.zeros_like(values) + divisor)
    rounded = (values + tl.where(values >= 0, 0.5, -0.5)).to(tl.int8)           # which cuts the fraction off
    tl.store(x_int8 + (head * rows + row) * HEAD_DIM + channel, rounded, mask=real)
    tl.store(scale + head * tl.num_programs(0) + block, divisor)


@triton.jit
def int8_attention_kernel(q, k, v, q_scale, k_scale, out, queries, keys, heads, stride_b, stride_n, stride_h,
                          KEY_BLOCKS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
                          BLOCK_K: tl.constexpr):
    """One block of queries of one head over all its keys.  q, k int8 [B, heads, N or M, d]; strides are those of v."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = (block * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    v += head // heads * stride_b + head % heads * stride_h
    query = tl.load(q + (head * queries + row) * HEAD_DIM + channel, mask=row < queries, other=0)
    query_scale = tl.load(q_scale + head * tl.num_programs(0) + block)
    top, total, mixed = start_softmax(BLOCK_Q, HEAD_DIM)
    for i in range(KEY_BLOCKS):                        # known when it is compiled: a run has a few shapes of video
        key_row = (i * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
        real = (key_row < keys)[:, None]
        key = tl.load(k + (head * keys + key_row[:, None]) * HEAD_DIM + channel, mask=real, other=0)
        value = tl.load(v + key_row[:, None] * stride_n + channel, mask=real, other=0.0)
        key_scale = tl.load(k_scale + head * KEY_BLOCKS + i)
        logits = tl.dot(query, tl.trans(key)).to(tl.float32) * (query_scale * key_scale)
        logits = tl.where((key_row < keys)[None, :], logits, -float("inf"))
        top, total, mixed = softmax_step(logits, value, top, total, mixed)
    place = (head // heads * queries + row) * heads + head % heads              # of out [B, N, heads]
    tl.store(out + place * HEAD_DIM + channel, (mixed / total[:, None]).to(out.dtype.element_ty), mask=row < queries)


@triton.jit
def start_softmax(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Largest logit, sum of weights and weighted sum of values, per row, before any key."""
    top = tl.full([ROWS], -float("inf"), tl.float32)
    return top, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, HEAD_DIM], tl.float32)


@triton.jit
def softmax_step(logits, value, top, total, mixed):
    """Take in one block of keys, of which one is real or more.  logits in base 2, -inf past the last key."""
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None], input_precision="tf32x3")
    return new_top, total, mixed


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    q_int8, q_scale = quantize_row_blocks(q, BLOCK_Q, EPS, factor=head_dim ** -0.5 * LOG2_E)
    k_int8, k_scale = quantize_row_blocks(k, BLOCK_K, EPS, mean=key_mean(k))
    out = v.new_empty(q.shape)
    with torch.cuda.device_of(q):
        int8_attention_kernel[(triton.cdiv(queries, BLOCK_Q), batch * heads)](
            q_int8, k_int8, v, q_scale, k_scale, out, queries, keys, heads, *v.stride()[:3],
            KEY_BLOCKS=triton.cdiv(keys, BLOCK_K), HEAD_DIM=head_dim, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, num_warps=8,
            num_stages=num_stages_on(v))
    return out


def key_mean(k: Tensor) -> Tensor:
    """[B, heads, head_dim], rounded to k's dtype as released."""
    return k.mean(1, dtype=torch.float32).to(k.dtype)


def quantize_row_blocks(x: Tensor, block: int, eps: float, factor: float = 1.0,
                        mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """reference.quantize_row_blocks of x, or of x - mean rounded to x's dtype."""
    batch, rows, heads, head_dim = x.shape
    blocks = triton.cdiv(rows, block)
    x_int8 = x.new_empty((batch, heads, rows, head_dim), dtype=torch.int8)
    scale = x.new_empty((batch, heads, blocks), dtype=torch.float32)
    with torch.cuda.device_of(x):
        quantize_kernel[(blocks, batch * heads)](
            x, x if mean is None else mean, x_int8, scale, rows, heads, *x.stride()[:3], factor, eps,
            HEAD_DIM=head_dim, BLOCK=block, WITH_MEAN=mean is not None, num_warps=4)
    return x_int8, scale


def num_stages_on(v: Tensor) -> int:
    """How many blocks of keys are on their way at once: what fits shared memory, 99 KB but on data-centre GPUs.

    fp32 values of 128 channels fit those alone, in blocks of 64 keys; elsewhere Triton says OutOfResources.
    """
    on_gpu = v.device.type == "cuda"
    return num_stages(v.dtype, on_gpu and torch.cuda.get_device_capability(v.device) in ((8, 0), (9, 0), (10, 0)))


def num_stages(dtype: torch.dtype, roomy: bool) -> int:
    if dtype == torch.float32:
        return 1
    return 3 if roomy else 2
