"""INT8 attention on a CPU: head by head, one block of queries with all keys at a time, so that it stays in the cache."""

import math

import torch
from torch import Tensor

from kernels.int8_attention.reference import BLOCK_K, BLOCK_Q, EPS, LOG2_E, quantize_blocks, smooth


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, queries, heads, head_dim = q.shape
    out = v.new_empty(q.shape)
    for b in range(batch):
        for h in range(heads):
            one = (slice(b, b + 1), slice(None), slice(h, h + 1))
            (q_int8,), (q_scale,) = (x[0] for x in quantize_blocks(q[one], BLOCK_Q, EPS, factor=head_dim ** -0.5 * LOG2_E))
            (k_int8,), (k_scale,) = (x[0] for x in quantize_blocks(smooth(k[one]), BLOCK_K, EPS))
            k_scale = k_scale.repeat_interleave(BLOCK_K)[:len(k_int8)] * math.log(2)        # torch's softmax is in base e
            values = v[b, :, h].contiguous()
            for i, start in enumerate(range(0, queries, BLOCK_Q)):
                rows = slice(start, start + BLOCK_Q)
                logits = torch._int_mm(q_int8[rows], k_int8.T).float().mul_(k_scale * q_scale[i])
                out[b, rows, h] = logits.softmax(-1).to(v.dtype) @ values
    return out
