"""INT8 attention on a CPU: head by head, a block of queries with all keys at a time, so that it stays in the cache."""

import math

import torch
from torch import Tensor

from kernels.int8_attention.reference import BLOCK_K, BLOCK_Q, EPS, LOG2_E, quantize_blocks, smooth


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = v.new_empty(q.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            attend(*(x[b:b + 1, :, h:h + 1].contiguous() for x in (q, k, v)), out[b, :, h])
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """One head: q [1, N, 1, d], k and v [1, M, 1, d], out [N, d]."""
    q_int8, q_scale = (x[0, 0] for x in quantize_blocks(q, BLOCK_Q, EPS, factor=q.shape[-1] ** -0.5 * LOG2_E))
    k_int8, k_scale = (x[0, 0] for x in quantize_blocks(smooth(k), BLOCK_K, EPS))
    k_scale = k_scale.repeat_interleave(BLOCK_K)[:len(k_int8)] * math.log(2)    # torch's softmax is in base e
    for i, scale in enumerate(q_scale):
        rows = slice(i * BLOCK_Q, (i + 1) * BLOCK_Q)
        logits = torch._int_mm(q_int8[rows], k_int8.T).float().mul_(k_scale * scale)
        out[rows] = logits.softmax(-1).to(v.dtype) @ v[0, :, 0]
