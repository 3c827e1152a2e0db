"""SageAttention: dense attention whose logits come from an INT8 product.

Source   SageAttention release, sageattn_qk_int8_pv_fp16_triton: smoothed K, a scale per block of rows, base-2 softmax.
"""

import torch
from torch import Tensor

from dailies.kernels import FLOATS, Impl, chosen_impl, implementation

HEAD_DIMS = (16, 32, 64, 128)                          # powers of two for Triton; 256 would not fit shared memory


def int8_attention(q: Tensor, k: Tensor, v: Tensor, *, impl: Impl = "auto") -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v with q and k - mean(k) rounded to INT8, one scale per 128 or 64 rows of a head.

    q [B, N, heads, head_dim], k and v [B, M, heads, head_dim], any strides with channels adjacent; q and k of one
    dtype, bf16, fp16 or fp32.  Returns [B, N, heads, head_dim] in v's dtype, in which the weights meet v; sums in fp32.
    The mean of k over its tokens adds one number to a whole row of logits, which softmax does not see: without it a
    channel that is large for every key would use up the INT8 range. It is rounded to k's dtype, as is the difference.
    No gradient.  Raises ValueError for any other shape or dtype.
    """
    check_attention(q, k, v)
    return torch.ops.dailies.int8_attention(q, k, v, chosen_impl(impl, q))


@torch.library.custom_op("dailies::int8_attention", mutates_args=())
def int8_attention_op(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
    return implementation("int8_attention", impl).int8_attention(q, k, v)


@int8_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, impl: str) -> Tensor:
    return v.new_empty(q.shape)


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What every attention here asks of its tensors."""
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError("attention needs q [B, N, heads, head_dim], k and v [B, M, heads, head_dim]; "
                         f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if q.shape[1] == 0 or k.shape[1] == 0:
        raise ValueError(f"attention needs at least one query and one key; got {q.shape[1]} and {k.shape[1]}")
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS}; got {q.shape[-1]}. Pad the channels with zeros")
    if q.dtype != k.dtype or q.dtype not in FLOATS or v.dtype not in FLOATS:
        raise ValueError("q and k must share a dtype, and all be bf16, fp16 or fp32; "
                         f"got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError("channels must be adjacent in memory (stride 1); call .contiguous() first")
