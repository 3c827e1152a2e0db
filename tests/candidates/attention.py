"""Attention to kept blocks of keys, or to all, in Triton: no mask but on the last block, several blocks at a time.

The same sums as in kernels/sparse_attention and kernels/int8_attention, in other shapes of the loop:

mask      kept blocks ascend, so only the last can be ragged: it is taken behind the loop, and the others need no mask
wide      blocks that meet the queries as one product of 128 keys, fetched row by row by their pointers
unroll    blocks that meet the queries one after another and share one change of the largest logit
overlap   a tile's weights meet the values one turn later, so that the product runs while the next weights are made
share     programs that take the queries of one block between them, each fewer and with fewer registers
loads     by pointers, or by descriptors (Hopper's copy engine), a block at a time
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dailies.kernels.int8_attention.kernel import key_mean, quantize_row_blocks, start_softmax
from dailies.kernels.int8_attention.reference import BLOCK_K, BLOCK_Q, EPS, LOG2_E
from dailies.kernels.sparse_attention.kernel import channel_softmax
from dailies.kernels.sparse_attention.reference import INT8_EPS, LINEAR_EPS


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """wide, unroll and share: 1 or 2.  ahead: the next block's number is fetched before this one is used.

    Not together: unroll with wide, overlap or ahead; descriptors with wide; ahead with wide or overlap.
    registers: at most so many a thread, so that two programs fit.
    """

    wide: int = 1
    unroll: int = 1
    overlap: bool = False
    share: int = 1
    descriptors: bool = False
    ahead: bool = False
    warps: int = 8
    stages: int = 3
    registers: int | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, linear: tuple[Tensor, Tensor, Tensor] | None,
           int8: bool, block_q: int, block_k: int, tiling: Tiling) -> Tensor:
    """attend of kernels/sparse_attention/kernel.py, as `tiling` says."""
    if int8:
        near_q, q_scale = quantize_row_blocks(q, block_q, INT8_EPS)
        near_k, k_scale = quantize_row_blocks(k, block_k, INT8_EPS, mean=key_mean(k))
        near_q, near_k = near_q.transpose(1, 2), near_k.transpose(1, 2)
    else:
        near_q, near_k, q_scale, k_scale = q, k, kept, kept                     # pointers that are not followed
    return launch(near_q, near_k, v, q, q_scale, k_scale, kept, linear, q.shape[-1] ** -0.5 * LOG2_E, kept.shape[-1],
                  int8, block_q, block_k, tiling)


def int8_attention(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> Tensor:
    """int8_attention of kernels/int8_attention/kernel.py, as `tiling` says."""
    q_int8, q_scale = quantize_row_blocks(q, BLOCK_Q, EPS, factor=q.shape[-1] ** -0.5 * LOG2_E)
    k_int8, k_scale = quantize_row_blocks(k, BLOCK_K, EPS, mean=key_mean(k))
    return launch(q_int8.transpose(1, 2), k_int8.transpose(1, 2), v, q, q_scale, k_scale, None, None, 1.0,
                  triton.cdiv(k.shape[1], BLOCK_K), True, BLOCK_Q, BLOCK_K, tiling)


def launch(near_q: Tensor, near_k: Tensor, v: Tensor, q: Tensor, q_scale: Tensor, k_scale: Tensor,
           kept: Tensor | None, linear: tuple[Tensor, Tensor, Tensor] | None, to_base_2: float, keep: int, int8: bool,
           block_q: int, block_k: int, tiling: Tiling) -> Tensor:
    """kept None: all `keep` blocks."""
    batch, queries, heads, head_dim = q.shape
    keys = near_k.shape[1]
    out = v.new_empty(q.shape)
    mixed, total, bias = linear or (None, None, None)
    k_strides, v_strides = near_k.stride()[:3], v.stride()[:3]
    by_descriptor = tiling.descriptors and near_k.element_size() < 4 and lies_in_rows(v) and (
        int8 or near_k.dtype == v.dtype and lies_in_rows(near_k))
    if by_descriptor:
        near_k = descriptor(near_k.transpose(1, 2) if int8 else near_k, block_k)
        v = descriptor(v, block_k)
    options = {} if tiling.registers is None else {"maxnreg": tiling.registers}
    with torch.cuda.device_of(q):
        attend_tiles_kernel[(triton.cdiv(queries, block_q) * tiling.share, batch * heads)](
            near_q, near_k, v, q, q_scale, k_scale, kept, mixed, total, bias, out, queries, keys, heads,
            *near_q.stride()[:3], *k_strides, *v_strides, *q.stride()[:3], to_base_2, LINEAR_EPS / keys, KEEP=keep,
            HEAD_DIM=head_dim, BLOCK_Q=block_q // tiling.share, BLOCK_K=block_k, INT8=int8, LINEAR=linear is not None,
            EVERY=kept is None, WIDE=tiling.wide, UNROLL=tiling.unroll, OVERLAP=tiling.overlap, SHARE=tiling.share,
            DESCRIPTORS=by_descriptor, AHEAD=tiling.ahead, num_warps=tiling.warps, num_stages=tiling.stages,
            **options)
    return out


def lies_in_rows(x: Tensor) -> bool:
    """Whether [B, M, heads, d] is one matrix [B * M, heads * d] with adjacent columns, its rows at addresses in 16s."""
    batch, rows, heads, head_dim = x.shape
    return ((heads == 1 or x.stride(2) == head_dim) and (batch == 1 or x.stride(0) == rows * x.stride(1))
            and x.stride(1) * x.element_size() % 16 == 0)


def descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Blocks of one head of x, [B, M, heads, d] that lies in rows, or contiguous [B, heads, M, d]."""
    head_dim = x.shape[-1]
    if x.is_contiguous() and x.dtype == torch.int8:
        return TensorDescriptor.from_tensor(x.view(-1, head_dim), [block, head_dim])
    return TensorDescriptor(x, [x.shape[0] * x.shape[1], x.shape[2] * head_dim], [x.stride(1), 1], [block, head_dim])


@triton.jit
def attend_tiles_kernel(near_q, near_k, v, q, q_scale, k_scale, kept, mixed, total, bias, out, queries, keys, heads,
                        q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h,
                        v_stride_b, v_stride_n, v_stride_h, phi_stride_b, phi_stride_n, phi_stride_h,
                        to_base_2, linear_eps,
                        KEEP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                        INT8: tl.constexpr, LINEAR: tl.constexpr, EVERY: tl.constexpr, WIDE: tl.constexpr,
                        UNROLL: tl.constexpr, OVERLAP: tl.constexpr, SHARE: tl.constexpr, DESCRIPTORS: tl.constexpr,
                        AHEAD: tl.constexpr):
    """BLOCK_Q queries of one head over their kept blocks.  near_q, near_k: q and k or their int8; phi strides: q's.

    Logits leave the product as they are; scaled to base 2 they are first met in the largest and in the exponent.
    """
    GROUPS: tl.constexpr = (KEEP - 1) // (WIDE * UNROLL)                         # steps of the loop
    SINGLES: tl.constexpr = (KEEP - 1 - GROUPS * UNROLL) if WIDE == 1 else 0     # whole blocks behind it
    TILE: tl.constexpr = WIDE * BLOCK_K
    block, head = tl.program_id(0) // SHARE, tl.program_id(1).to(tl.int64)      # block: of SHARE * BLOCK_Q queries
    row = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    batch, slot = head // heads, head % heads
    near_q += batch * q_stride_b + slot * q_stride_h
    k_row, k_column, v_row, v_column = 0, 0, 0, 0
    if DESCRIPTORS:
        v_row, v_column = (batch * keys).to(tl.int32), (slot * HEAD_DIM).to(tl.int32)
        if INT8:
            k_row = (head * keys).to(tl.int32)
        else:
            k_row, k_column = v_row, v_column
    else:
        near_k += batch * k_stride_b + slot * k_stride_h
        v += batch * v_stride_b + slot * v_stride_h
    blocks = tl.num_programs(0) // SHARE
    if not EVERY:
        kept += (head * blocks + block) * KEEP
    query = tl.load(near_q + row * q_stride_n + channel, mask=row < queries, other=0)
    if INT8:
        to_base_2 *= tl.load(q_scale + head * blocks + block)
        k_scale += head * tl.cdiv(keys, BLOCK_K)
    top, weight_sum, near = start_softmax(BLOCK_Q, HEAD_DIM)
    part = tl.arange(0, TILE) // BLOCK_K if WIDE == 2 else 0                    # of a wide tile: the block of each row

    if OVERLAP and GROUPS > 0:
        number = _number(kept, part, EVERY)
        raw, scale = _logits(query, near_k, k_row, k_column, k_stride_n, number, v, k_scale, to_base_2, HEAD_DIM,
                             BLOCK_K, TILE, DESCRIPTORS, INT8, WIDE)
        top, weight_sum, weights, shrink = _weigh(raw, scale, top, weight_sum)
        for i in range(1, GROUPS):                     # known when it is compiled: a run has a few shapes of video
            following = _number(kept, WIDE * i + part, EVERY)
            raw, scale = _logits(query, near_k, k_row, k_column, k_stride_n, following, v, k_scale, to_base_2, HEAD_DIM,
                                 BLOCK_K, TILE, DESCRIPTORS, INT8, WIDE)
            # Triton pipelines no loop that carries its own counter on, as `following` is where every block is kept
            before = _number(kept, WIDE * (i - 1) + part, EVERY) if EVERY else number
            value = _rows(v, v_row, v_column, v_stride_n, before, HEAD_DIM, BLOCK_K, TILE, DESCRIPTORS)
            near = tl.dot(weights.to(value.dtype), value, near * shrink[:, None], input_precision="tf32x3")
            top, weight_sum, weights, shrink = _weigh(raw, scale, top, weight_sum)
            if not EVERY:
                number = following
        if EVERY:
            number = _number(kept, WIDE * (GROUPS - 1) + part, EVERY)
        value = _rows(v, v_row, v_column, v_stride_n, number, HEAD_DIM, BLOCK_K, TILE, DESCRIPTORS)
        near = tl.dot(weights.to(value.dtype), value, near * shrink[:, None], input_precision="tf32x3")
    elif UNROLL == 2:
        for i in range(GROUPS):
            one, two = _number(kept, 2 * i, EVERY), _number(kept, 2 * i + 1, EVERY)
            raw_one, by_one = _logits(query, near_k, k_row, k_column, k_stride_n, one, v, k_scale, to_base_2, HEAD_DIM,
                                      BLOCK_K, TILE, DESCRIPTORS, INT8, WIDE)
            raw_two, by_two = _logits(query, near_k, k_row, k_column, k_stride_n, two, v, k_scale, to_base_2, HEAD_DIM,
                                      BLOCK_K, TILE, DESCRIPTORS, INT8, WIDE)
            new_top = tl.maximum(top, tl.maximum(tl.max(raw_one, 1) * by_one, tl.max(raw_two, 1) * by_two))
            shrink = tl.exp2(top - new_top)
            weights_one = tl.exp2(raw_one * by_one - new_top[:, None])
            weights_two = tl.exp2(raw_two * by_two - new_top[:, None])
            weight_sum = weight_sum * shrink + tl.sum(weights_one, 1) + tl.sum(weights_two, 1)
            value = _rows(v, v_row, v_column, v_stride_n, one, HEAD_DIM, BLOCK_K, TILE, DESCRIPTORS)
            near = tl.dot(weights_one.to(value.dtype), value, near * shrink[:, None], input_precision="tf32x3")
            value = _rows(v, v_row, v_column, v_stride_n, two, HEAD_DIM, BLOCK_K, TILE, DESCRIPTORS)
            near = tl.dot(weights_two.to(value.dtype), value, near, input_precision="tf32x3")
            top = new_top
    else:
        following = _number(kept, 0, EVERY) if AHEAD else 0
        for i in range(GROUPS):
            if AHEAD:                                  # the last is fetched, and taken behind the loop
                number, following = following, _number(kept, i + 1, EVERY)
            else:
                number = _number(kept, WIDE * i + part, EVERY)
            raw, scale = _logits(query, near_k, k_row, k_column, k_stride_n, number, v, k_scale, to_base_2, HEAD_DIM,
                                 BLOCK_K, TILE, DESCRIPTORS, INT8, WIDE)
            value = _rows(v, v_row, v_column, v_stride_n, number, HEAD_DIM, BLOCK_K, TILE, DESCRIPTORS)
            top, weight_sum, weights, shrink = _weigh(raw, scale, top, weight_sum)
            near = tl.dot(weights.to(value.dtype), value, near * shrink[:, None], input_precision="tf32x3")
    for i in tl.static_range(SINGLES):
        number = _number(kept, GROUPS * UNROLL + i, EVERY)
        raw, scale = _logits(query, near_k, k_row, k_column, k_stride_n, number, v, k_scale, to_base_2, HEAD_DIM,
                             BLOCK_K, TILE, DESCRIPTORS, INT8, WIDE)
        value = _rows(v, v_row, v_column, v_stride_n, number, HEAD_DIM, BLOCK_K, TILE, DESCRIPTORS)
        top, weight_sum, weights, shrink = _weigh(raw, scale, top, weight_sum)
        near = tl.dot(weights.to(value.dtype), value, near * shrink[:, None], input_precision="tf32x3")

    # the last step: of one block, or of a wide tile whose second half may be missing; its rows may end before it does
    place = GROUPS * WIDE + part if WIDE == 2 else KEEP - 1
    number = _number(kept, tl.minimum(place, KEEP - 1), EVERY)
    lane = tl.arange(0, TILE) % BLOCK_K
    real = (number * BLOCK_K + lane < keys) & (place < KEEP)
    if DESCRIPTORS:                                    # rows past the last are zero, or those of another sample
        key = near_k.load([k_row + number * BLOCK_K, k_column])
        value = tl.where(real[:, None], v.load([v_row + number * BLOCK_K, v_column]), 0.0)
    else:
        key_row = (number * BLOCK_K + lane).to(tl.int64)[:, None]
        key = tl.load(near_k + key_row * k_stride_n + channel, mask=real[:, None], other=0)
        value = tl.load(v + key_row * v_stride_n + channel, mask=real[:, None], other=0.0)
    raw, scale = _scaled(_dot(query, key, v, DESCRIPTORS, INT8), number, k_scale, to_base_2, INT8, WIDE)
    raw = tl.where(real[None, :], raw, -float("inf"))
    top, weight_sum, weights, shrink = _weigh(raw, scale, top, weight_sum)
    near = tl.dot(weights.to(value.dtype), value, near * shrink[:, None], input_precision="tf32x3")

    result = near / weight_sum[:, None]
    if LINEAR:
        q += batch * phi_stride_b + slot * phi_stride_h
        phi = channel_softmax(tl.load(q + row * phi_stride_n + channel, mask=row < queries, other=0.0))
        summary = tl.load(mixed + (head * HEAD_DIM + tl.arange(0, HEAD_DIM)[:, None]) * HEAD_DIM + channel)
        key_sum = tl.load(total + head * HEAD_DIM + channel)
        far = tl.dot(phi.to(summary.dtype), summary, input_precision="ieee")      # once: tf32x3 is short of room
        result += far / (tl.sum(phi * key_sum, 1) + linear_eps)[:, None] + tl.load(bias + channel).to(tl.float32)
    place = (batch * queries + row) * heads + slot                              # of out [B, N, heads]
    tl.store(out + place * HEAD_DIM + channel, result.to(out.dtype.element_ty), mask=row < queries)


@triton.jit
def _number(kept, place, EVERY: tl.constexpr):
    """Which block of keys is the place-th."""
    return place if EVERY else tl.load(kept + place)


@triton.jit
def _rows(x, first_row, first_column, stride_n, number, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
          TILE: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Whole blocks of keys or values of one head, [TILE, HEAD_DIM]; number: one, or one for each row of a wide tile."""
    if DESCRIPTORS:
        return x.load([first_row + number * BLOCK, first_column])
    else:
        row = (number * BLOCK + tl.arange(0, TILE) % BLOCK).to(tl.int64)[:, None]
        return tl.load(x + row * stride_n + tl.arange(0, HEAD_DIM)[None, :])


@triton.jit
def _dot(query, key, v, DESCRIPTORS: tl.constexpr, INT8: tl.constexpr):
    """Unscaled logits in fp32; the operands meet in v's dtype unless they are int8."""
    if INT8:
        return tl.dot(query, tl.trans(key)).to(tl.float32)
    elif DESCRIPTORS:
        return tl.dot(query.to(v.dtype), tl.trans(key), input_precision="tf32x3")
    else:
        return tl.dot(query.to(v.dtype.element_ty), tl.trans(key.to(v.dtype.element_ty)), input_precision="tf32x3")


@triton.jit
def _logits(query, near_k, k_row, k_column, k_stride_n, number, v, k_scale, to_base_2, HEAD_DIM: tl.constexpr,
            BLOCK: tl.constexpr, TILE: tl.constexpr, DESCRIPTORS: tl.constexpr, INT8: tl.constexpr,
            WIDE: tl.constexpr):
    """Of whole blocks: what to multiply, and what by, for logits in base 2."""
    key = _rows(near_k, k_row, k_column, k_stride_n, number, HEAD_DIM, BLOCK, TILE, DESCRIPTORS)
    return _scaled(_dot(query, key, v, DESCRIPTORS, INT8), number, k_scale, to_base_2, INT8, WIDE)


@triton.jit
def _scaled(raw, number, k_scale, to_base_2, INT8: tl.constexpr, WIDE: tl.constexpr):
    if INT8 and WIDE == 2:                             # a scale per block, of which a wide tile has two
        return raw * (to_base_2 * tl.load(k_scale + number))[None, :], 1.0
    elif INT8:
        return raw, to_base_2 * tl.load(k_scale + number)
    else:
        return raw, to_base_2


@triton.jit
def _weigh(raw, scale, top, total):
    """One tile of keys, of which one is real or more: largest logit and sum so far, weights, and by how much what was
    weighed before shrinks.  raw * scale: logits in base 2, scale above zero."""
    new_top = tl.maximum(top, tl.max(raw, 1) * scale)
    weights = tl.exp2(raw * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return new_top, total * shrink + tl.sum(weights, 1), weights, shrink


def kept_blocks(pooled_q: Tensor, pooled_k: Tensor, keep_ratio: float) -> Tensor:
    """kept_blocks of kernels/sparse_attention/reference.py; of equal scores the first."""
    keep = max(1, int(keep_ratio * pooled_k.shape[2]))
    scores = (pooled_q @ (pooled_k - pooled_k.mean(2, keepdim=True)).mT).contiguous()
    kept = torch.empty((*scores.shape[:-1], keep), dtype=torch.int32, device=scores.device)
    with torch.cuda.device_of(scores):
        choose_kernel[(kept.numel() // keep,)](scores, kept, scores.shape[-1], keep,
                                               BLOCKS=triton.next_power_of_2(scores.shape[-1]), num_warps=4)
    return kept


@triton.jit
def choose_kernel(scores, kept, blocks, keep, BLOCKS: tl.constexpr):
    """A program lists the `keep` largest of one row of scores, ascending by place.

    A float's bits, with those below the sign turned where it is negative, order as integers do: the keep-th largest
    is found from the highest bit to the lowest, by counting how many are no smaller.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCKS)
    score = tl.load(scores + row * blocks + place, mask=place < blocks, other=-float("inf"))
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648    # 0 to 2^32 - 1
    least = tl.zeros([], tl.int64)
    for i in tl.static_range(32):
        higher = least + (1 << (31 - i))
        enough = tl.sum((rank >= higher).to(tl.int32), 0) >= keep
        least = tl.where(enough, higher, least)
    above, equal = rank > least, rank == least
    spare = keep - tl.sum(above.to(tl.int32), 0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    tl.store(kept + row * keep + tl.cumsum(chosen.to(tl.int32), 0) - 1, place, mask=chosen)
