"""Sparse-linear attention on a CPU: by heads and a few blocks of queries, whose kept keys are copied together.

What is copied stays in the cache, and torch's attention needs no mask: blocks that keep the ragged one have fewer keys.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.kernels import processor
from dailies.kernels.int8_attention.reference import quantize_row_blocks, smooth_keys
from dailies.kernels.sparse_attention.reference import INT8_EPS, LINEAR_EPS, kept_blocks, pool_blocks

GATHERED = 1 << 19                                     # keys times channels copied together, for several query blocks


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, keep_ratio: float,
                     int8: bool, block_q: int, block_k: int) -> Tensor:
    out = v.new_empty(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            head = tuple(x[b, :, h] for x in (q, k, v, out))
            attend_head_sparse(*head, weight, bias, keep_ratio, int8, block_q, block_k)
    return out


def attend_head_sparse(q: Tensor, k: Tensor, v: Tensor, out: Tensor, weight: Tensor | None, bias: Tensor | None,
                       keep_ratio: float, int8: bool, block_q: int, block_k: int) -> None:
    """One head: fills out [N, d] from q [N, d], k and v [M, d]."""
    head_dim, pad = q.shape[-1], -len(k) % block_k
    pooled = (pool_blocks(x.float()[None, :, None], block) for x, block in ((q, block_q), (k, block_k)))
    kept = kept_blocks(*pooled, keep_ratio)[0, 0].long()
    if int8:
        queries, q_scale = (x[0, 0] for x in quantize_row_blocks(q[None, :, None], block_q, INT8_EPS))
        keys, k_scale = (x[0, 0] for x in quantize_row_blocks(smooth_keys(k[None, :, None]), block_k, INT8_EPS))
        k_scale = k_scale * head_dim ** -0.5
    else:
        queries, keys = q.to(v.dtype), k.to(v.dtype)
    keys, values = (F.pad(x, (0, 0, 0, pad)) for x in (keys, v))
    far = None if weight is None else linear_attention(q, k, values[:len(k)], weight, bias)
    keys, values = (x.view(-1, block_k * head_dim) for x in (keys, values))     # [blocks, ...]
    length = kept.shape[1] * block_k
    at_once = 1 if int8 else max(torch.get_num_threads(), GATHERED // (length * head_dim))
    # ids ascend: the last block of all is the last of the kept
    for first, count, ragged in alike_runs((kept[:, -1] == len(keys) - 1).tolist(), at_once, len(q) // block_q):
        rows, blocks = slice(first * block_q, (first + count) * block_q), kept[first:first + count].flatten()
        near_keys, near_values = (x.index_select(0, blocks).view(count, length, head_dim) for x in (keys, values))
        if ragged:
            near_keys, near_values = near_keys[:, :length - pad], near_values[:, :length - pad]
        if int8:
            scale = (k_scale.index_select(0, blocks) * q_scale[first]).repeat_interleave(block_k)
            logits = processor.int8_product(queries[rows], processor.int8_operand(near_keys[0].T)).float()
            logits.mul_(scale[:near_keys.shape[1]])
            near = logits.softmax(-1).to(v.dtype) @ near_values[0]
        else:
            query = queries[rows].unflatten(0, (count, -1))
            query, key, value = (x[:, None] for x in (query, near_keys, near_values))
            near = F.scaled_dot_product_attention(query, key, value).flatten(0, 2)
        out[rows] = near if far is None else near.float() + far[rows]


def alike_runs(ragged: list[bool], most: int, whole: int) -> Iterator[tuple[int, int, bool]]:
    """Blocks that can go together, as the first, how many, and whether they are ragged: neighbours that are alike.

    whole: how many blocks have all their rows; one behind them goes alone.
    """
    first = 0
    for (is_ragged, _), group in groupby(enumerate(ragged), key=lambda block: (block[1], block[0] < whole)):
        end = first + sum(1 for _ in group)
        for start in range(first, end, most):
            yield start, min(most, end - start), is_ragged
        first = end


def linear_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The projected linear branch of one head, [N, d] in fp32; what is projected is the d x d sum over the keys."""
    phi_q, phi_k = (x.to(v.dtype).softmax(-1) for x in (q, k))
    mixed = (phi_k.T @ v).float() @ weight.float().T
    total = (phi_q @ phi_k.sum(0)).float() + LINEAR_EPS
    return (phi_q @ mixed.to(v.dtype)).float().div_(total[:, None]).add_(bias)
