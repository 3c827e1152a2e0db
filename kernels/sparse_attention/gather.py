"""Sparse-linear attention on a CPU: head by head, the kept keys of a block of queries are copied together in cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8_attention.reference import quantize_blocks, smooth
from kernels.sparse_attention.reference import INT8_EPS, LINEAR_EPS, kept_blocks, pool


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, keep_ratio: float,
                     int8: bool, block_q: int, block_k: int) -> Tensor:
    out = v.new_empty(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            head = tuple(x[b:b + 1, :, h:h + 1].contiguous() for x in (q, k, v))
            attend(*head, keep_ratio, int8, block_q, block_k, out[b, :, h])
            if weight is not None:
                add_linear_attention(*(x[0, :, 0] for x in head), weight, bias, out[b, :, h])
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, keep_ratio: float, int8: bool, block_q: int, block_k: int,
           out: Tensor) -> None:
    """Softmax attention of one head to the kept keys.  q [1, N, 1, d], k and v [1, M, 1, d], out [N, d]."""
    head_dim = q.shape[-1]
    pooled_q, pooled_k, mean_k = pool(q.float(), block_q), pool(k.float(), block_k), k.mean(1, dtype=torch.float32)
    kept = kept_blocks(pooled_q, pooled_k, mean_k, keep_ratio)[0, 0].long()
    if int8:
        queries, q_scale = (x[0, 0] for x in quantize_blocks(q, block_q, INT8_EPS))
        keys, k_scale = (x[0, 0] for x in quantize_blocks(smooth(k), block_k, INT8_EPS))
        k_scale = k_scale * head_dim ** -0.5
    else:
        queries, keys = (x.to(v.dtype)[0, :, 0] for x in (q, k))
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
            out[rows] = logits.softmax(-1).to(v.dtype) @ near_values
        else:
            query, key, value = (x[None, None] for x in (queries[rows], near_keys, near_values))
            out[rows] = F.scaled_dot_product_attention(query, key, value)


def add_linear_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """out += the projected linear branch of one head, all [N, d]; what is projected is the d x d sum over the keys."""
    phi_q, phi_k = (x.float().softmax(-1) for x in (q, k))
    keys_values = (phi_k.to(v.dtype).T @ v).float() @ weight.float().T
    denominator = phi_q @ phi_k.sum(0) + LINEAR_EPS
    out += (phi_q.to(v.dtype) @ keys_values.to(v.dtype)).float().div_(denominator[:, None]).add_(bias)
