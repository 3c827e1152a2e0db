"""INT8 attention on a CPU: integer products of one block of queries with all keys, whose logits fit a cache."""

import math

import torch
from torch import Tensor

from kernels.int8_attention.reference import BLOCK_K, BLOCK_Q, EPS, LOG2_E, quantize_blocks, smooth


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    q_int8, q_scale = quantize_blocks(q, BLOCK_Q, EPS, factor=head_dim ** -0.5 * LOG2_E)
    k_int8, k_scale = quantize_blocks(smooth(k), BLOCK_K, EPS)
    k_scale = k_scale.repeat_interleave(BLOCK_K, -1)[..., :keys] * math.log(2)     # torch's softmax is in base e
    values = v.transpose(1, 2).contiguous()
    out = v.new_empty(q.shape)
    for b in range(batch):
        for h in range(heads):
            for i, start in enumerate(range(0, queries, BLOCK_Q)):
                rows = slice(start, start + BLOCK_Q)
                products = torch._int_mm(q_int8[b, h, rows], k_int8[b, h].T)
                weights = (products.float() * (k_scale[b, h] * q_scale[b, h, i])).softmax(-1)
                out[b, rows, h] = weights.to(v.dtype) @ values[b, h]
    return out
