"""Sparse-linear attention on a CPU: head by head and block by block of queries, whose kept keys are copied together.

The tensors of a block stay in the cache, and torch's attention needs no mask: a block that is ragged is just shorter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8_attention.reference import quantize_blocks, smooth
from kernels.sparse_attention.reference import INT8_EPS, LINEAR_EPS, kept_blocks, pool


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, keep_ratio: float,
                     int8: bool, block_q: int, block_k: int) -> Tensor:
    heads = range(q.shape[2])
    pooled_q, pooled_k = (torch.cat([pool(x[:, :, h:h + 1].float(), block) for h in heads], dim=1)
                          for x, block in ((q, block_q), (k, block_k)))
    kept = kept_blocks(pooled_q, pooled_k, keep_ratio).long()
    out = v.new_empty(q.shape)
    for b in range(q.shape[0]):
        for h in heads:
            head = tuple(x[b:b + 1, :, h:h + 1] for x in (q, k, v))
            far = None if weight is None else linear_attention(*(x[0, :, 0] for x in head), weight, bias)
            attend(*head, kept[b, h], far, int8, block_q, block_k, out[b, :, h])
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, far: Tensor | None, int8: bool, block_q: int, block_k: int,
           out: Tensor) -> None:
    """out [N, d] = the sparse branch of one head + far.  q [1, N, 1, d], k and v [1, M, 1, d], kept [q blocks, kept]."""
    head_dim = q.shape[-1]
    if int8:
        queries, q_scale = (x[0, 0] for x in quantize_blocks(q, block_q, INT8_EPS))
        keys, k_scale = (x[0, 0] for x in quantize_blocks(smooth(k), block_k, INT8_EPS))
        k_scale = k_scale * head_dim ** -0.5
    else:
        queries, keys = (x[0, :, 0].to(v.dtype) for x in (q, k))
    pad = -len(keys) % block_k
    keys, values = (F.pad(x, (0, 0, 0, pad)).view(-1, block_k * head_dim) for x in (keys, v[0, :, 0]))  # [blocks, ...]
    ragged = (kept[:, -1] == len(keys) - 1).tolist()    # ids ascend: the last block of all is the last of the kept
    for i, blocks in enumerate(kept):
        rows = slice(i * block_q, (i + 1) * block_q)
        count = len(blocks) * block_k - (pad if ragged[i] else 0)
        near_keys, near_values = (x.index_select(0, blocks).view(-1, head_dim)[:count] for x in (keys, values))
        if int8:
            scale = (k_scale.index_select(0, blocks) * q_scale[i]).repeat_interleave(block_k)[:count]
            logits = torch._int_mm(queries[rows], near_keys.T) * scale
            near = logits.softmax(-1).to(v.dtype) @ near_values
        else:
            query, key, value = (x[None, None] for x in (queries[rows], near_keys, near_values))
            near = F.scaled_dot_product_attention(query, key, value)[0, 0]
        out[rows] = near if far is None else near.float() + far[rows]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The projected linear branch of one head, [N, d] in fp32; what is projected is the d x d sum over the keys."""
    mixed, total = 0, 0
    for some_k, some_v in zip(k.split(256), v.split(256), strict=True):
        phi = some_k.float().softmax(-1)
        mixed, total = mixed + (phi.to(v.dtype).T @ some_v).float(), total + phi.sum(0)
    mixed = (mixed @ weight.float().T).to(v.dtype)
    phi = q.float().softmax(-1)
    return (phi.to(v.dtype) @ mixed).float().div_((phi @ total + LINEAR_EPS)[:, None]).add_(bias)
