"""Sparse-linear attention on a CPU: the kept blocks of keys are copied together, block of queries by block of queries."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8_attention.reference import quantize_blocks, smooth
from kernels.sparse_attention.reference import INT8_EPS, LINEAR_EPS, kept_blocks, pool


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, keep_ratio: float,
                     int8: bool, block_q: int, block_k: int) -> Tensor:
    kept = kept_blocks(pool(q, block_q), pool(k, block_k), k.float().mean(1), keep_ratio)
    out = attend(q, k, v, kept, int8, block_q, block_k)
    if weight is not None:
        add_linear_attention(out, q, k, v, weight, bias)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, int8: bool, block_q: int, block_k: int) -> Tensor:
    """Softmax attention of each q block to its kept key blocks.  -> [B, N, heads, d] in v's dtype.

    Logits are fp32 whatever v is: a bf16 product on a CPU would round them to bf16.
    """
    scale = q.shape[-1] ** -0.5
    if int8:
        queries, q_scale = quantize_blocks(q, block_q, INT8_EPS)
        keys, k_scale = quantize_blocks(smooth(k), block_k, INT8_EPS)
        q_scale = q_scale * scale
    else:
        queries = q.to(v.dtype).float().mul(scale).transpose(1, 2)
        keys = k.to(v.dtype).float().transpose(1, 2)
    pad = -k.shape[1] % block_k
    keys, values = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, block_k)).contiguous() for x in (keys, v.transpose(1, 2)))
    out = v.new_empty(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i, blocks in enumerate(kept[b, h].long()):
                rows = slice(i * block_q, (i + 1) * block_q)
                count = len(blocks) * block_k - (pad if blocks[-1] == keys.shape[2] - 1 else 0)
                near = keys[b, h].index_select(0, blocks).flatten(0, 1)[:count]
                if int8:
                    near_scale = k_scale[b, h].index_select(0, blocks).repeat_interleave(block_k)[:count] * q_scale[b, h, i]
                    logits = torch._int_mm(queries[b, h, rows], near.T).float() * near_scale
                else:
                    logits = queries[b, h, rows] @ near.T
                out[b, rows, h] = logits.softmax(-1).to(v.dtype) @ values[b, h].index_select(0, blocks).flatten(0, 1)[:count]
    return out


def add_linear_attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> None:
    """out += proj(linear attention), in place. The projection is folded into the d x d summary of keys and values."""
    phi_q, phi_k = (x.transpose(1, 2).float().softmax(-1) for x in (q, k))      # [B, heads, N, d]
    summary = phi_k.to(v.dtype).mT @ v.transpose(1, 2)
    summary = (summary.float() @ weight.float().mT).to(v.dtype)
    denominator = phi_q @ phi_k.sum(2)[..., None] + LINEAR_EPS
    linear = (phi_q.to(v.dtype) @ summary) / denominator + bias.float()
    out += linear.transpose(1, 2)
