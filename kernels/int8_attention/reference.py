"""INT8 attention in plain torch, all logits at once: to be believed, not to be fast."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_Q, BLOCK_K = 128, 64                             # rows that share a scale, as released
LOG2_E = 1.44269504
EPS = 1e-12                                            # on a scale: too small for any but that of a block of zeros


def int8_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q_int8, q_scale = quantize_row_blocks(q, BLOCK_Q, EPS, factor=q.shape[-1] ** -0.5 * LOG2_E)
    k_int8, k_scale = quantize_row_blocks(smooth_keys(k), BLOCK_K, EPS)
    logits = dequantized_logits(q_int8, q_scale, BLOCK_Q, k_int8, k_scale, BLOCK_K)
    weights = torch.exp2(logits - logits.amax(-1, keepdim=True))
    out = weights @ v.float().transpose(1, 2) / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(v.dtype).contiguous()


def dequantized_logits(q_int8: Tensor, q_scale: Tensor, block_q: int,
                       k_int8: Tensor, k_scale: Tensor, block_k: int) -> Tensor:
    """[B, heads, N, M] in fp32."""
    products = q_int8.float() @ k_int8.float().mT       # exact in fp32: at most 128 * 127^2 < 2^24
    q_scale, k_scale = q_scale.repeat_interleave(block_q, -1), k_scale.repeat_interleave(block_k, -1)
    return products * (q_scale[..., :q_int8.shape[2], None] * k_scale[..., None, :k_int8.shape[2]])


def smooth_keys(k: Tensor) -> Tensor:
    """k [B, M, heads, head_dim] without its mean over the tokens, both rounded to k's dtype as released."""
    return k - k.mean(dim=1, keepdim=True, dtype=torch.float32).to(k.dtype)


def quantize_row_blocks(x: Tensor, block: int, eps: float, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """int8 [B, heads, N, head_dim] and fp32 scales [B, heads, blocks] of x [B, N, heads, head_dim].

    x * factor = int8 * scale, with scale = max|x * factor| / 127 + eps over `block` rows of a head; halves are rounded
    away from zero, as released.
    """
    rows = x.transpose(1, 2).float() * factor
    amax = F.pad(rows.abs().amax(-1), (0, -x.shape[1] % block)).unflatten(-1, (-1, block)).amax(-1)
    scale = amax / 127 + eps
    scaled = rows / scale.repeat_interleave(block, -1)[..., :x.shape[1], None]
    return scaled.add(scaled.sign(), alpha=0.5).to(torch.int8).contiguous(), scale        # which cuts the fraction off
