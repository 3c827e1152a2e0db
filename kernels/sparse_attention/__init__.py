"""Sparse-linear attention (SLA): exact attention to the best blocks of keys, linear attention to all of them.

Source   TurboDiffusion release, SLA/core.py, SparseLinearAttention and SageSparseLinearAttention, at inference.
"""

import torch
from torch import Tensor

from dailies.kernels import FLOATS, Impl, chosen_impl, implementation
from dailies.kernels.int8_attention import check_attention


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, *, keep_ratio: float, proj: tuple[Tensor, Tensor] | None = None,
                     int8: bool = False, block_q: int = 128, block_k: int = 64, impl: Impl = "auto") -> Tensor:
    """softmax over the kept blocks of keys, plus proj(linear attention over all keys).

    q [B, N, heads, head_dim], k and v [B, M, heads, head_dim], any strides with channels adjacent; q and k of one
    dtype, bf16, fp16 or fp32.  Returns [B, N, heads, head_dim] in v's dtype, that of the products; sums in fp32.

    A block of block_q queries keeps max(1, floor(keep_ratio * blocks)) blocks of block_k keys, those whose mean key,
    less the mean of all keys, agrees best with the mean query.  keep_ratio in (0, 1]; 1 is dense attention.
    The linear branch has the feature map softmax over channels and sees every key, the kept ones too.
    proj: weight [head_dim, head_dim] and bias [head_dim], one for all heads.  None leaves the linear branch out: what a
    model does that was never tuned for it, since the release starts proj at zero.
    int8: the logits of the kept blocks as in int8_attention, a scale per block_q or block_k rows (SageSLA).

    As released, but for: a keep count of 0 (the release then divides 0 by 0) is 1; block means and their agreement stay
    in fp32 where the release rounds to bf16, so near ties may fall otherwise; with int8 the weights meet v in v's
    dtype, not in fp8.  Its blocks are (128, 64), and for int8 on Hopper (64, 128); no checkpoint depends on them.

    No gradient.  Raises ValueError for any other shape, dtype or share.
    """
    check_attention(q, k, v)
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio is the share of key blocks to keep, above 0 and at most 1; got {keep_ratio}")
    if any(block not in (16, 32, 64, 128) for block in (block_q, block_k)):
        raise ValueError(f"block_q and block_k must be 16, 32, 64 or 128 rows; got {block_q} and {block_k}")
    weight, bias = proj or (None, None)
    if proj and (list(weight.shape) != [q.shape[-1]] * 2 or list(bias.shape) != [q.shape[-1]]
                 or weight.dtype not in FLOATS or bias.dtype not in FLOATS):
        raise ValueError(f"proj must be a weight {[q.shape[-1]] * 2} and a bias {[q.shape[-1]]} of floats; "
                         f"got {list(weight.shape)} {weight.dtype} and {list(bias.shape)} {bias.dtype}")
    impl = chosen_impl(impl, q)
    return torch.ops.dailies.sparse_attention(q, k, v, weight, bias, keep_ratio, int8, block_q, block_k, impl)


@torch.library.custom_op("dailies::sparse_attention", mutates_args=())
def sparse_attention_op(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, keep_ratio: float,
                      int8: bool, block_q: int, block_k: int, impl: str) -> Tensor:
    attention = implementation("sparse_attention", impl).sparse_attention
    return attention(q, k, v, weight, bias, keep_ratio, int8, block_q, block_k)


@sparse_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, keep_ratio: float, int8: bool,
      block_q: int, block_k: int, impl: str) -> Tensor:
    return v.new_empty(q.shape)
