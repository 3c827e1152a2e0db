"""Sparse-linear attention in plain torch, all logits with a mask: to be believed, not to be fast."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.kernels.int8_attention.reference import dequantized_logits, quantize_row_blocks, smooth_keys

LINEAR_EPS = 1e-5                                      # on the linear branch's denominator, as released
INT8_EPS = 1e-7                                        # on the scales, as SpargeAttn released them


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, bias: Tensor | None, keep_ratio: float,
                     int8: bool, block_q: int, block_k: int) -> Tensor:
    kept = kept_blocks(pool_blocks(q, block_q), pool_blocks(k, block_k), keep_ratio)
    out = attend_kept_blocks(q, k, v, kept, int8, block_q, block_k)
    if weight is not None:
        out = out + F.linear(linear_attention(q, k, v), weight.float(), bias.float())
    return out.to(v.dtype).contiguous()


def pool_blocks(x: Tensor, block: int) -> Tensor:
    """Mean of each block of rows, the last over the rows it has.  [B, N, heads, d] -> [B, heads, blocks, d] in fp32."""
    whole = x.shape[1] // block
    means = [x[:, :whole * block].unflatten(1, (whole, block)).mean(2, dtype=torch.float32)]
    if x.shape[1] % block:
        means.append(x[:, whole * block:].mean(1, keepdim=True, dtype=torch.float32))
    return torch.cat(means, dim=1).transpose(1, 2)


def kept_blocks(pooled_q: Tensor, pooled_k: Tensor, keep_ratio: float) -> Tensor:
    """int32 [B, heads, q blocks, kept], ascending, so that only the last of a row can be the ragged block.

    What is taken from every key changes the scores of a row alike. The release takes the mean of the keys; that of the
    blocks serves as well, to keep the scores of keys with a large mean apart, and costs no pass over the keys.
    """
    keep = max(1, int(keep_ratio * pooled_k.shape[2]))
    scores = pooled_q @ (pooled_k - pooled_k.mean(2, keepdim=True)).mT
    return scores.topk(keep, dim=-1).indices.sort(dim=-1).values.int()


def attend_kept_blocks(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, int8: bool, block_q: int, block_k: int) -> Tensor:
    """Softmax attention of each q block to its kept key blocks alone.  -> [B, N, heads, d] in fp32."""
    if int8:
        q_int8, q_scale = quantize_row_blocks(q, block_q, INT8_EPS)
        k_int8, k_scale = quantize_row_blocks(smooth_keys(k), block_k, INT8_EPS)
        logits = dequantized_logits(q_int8, q_scale, block_q, k_int8, k_scale, block_k)
    else:
        logits = torch.einsum("bnhd,bmhd->bhnm", q.to(v.dtype).float(), k.to(v.dtype).float())
    logits = logits * q.shape[-1] ** -0.5
    blocks = -(-logits.shape[-1] // block_k)
    keep = F.one_hot(kept.long(), blocks).sum(-2)                               # [B, heads, q blocks, key blocks]
    keep = keep.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :logits.shape[2], :logits.shape[3]]
    return (logits.masked_fill(keep == 0, -torch.inf).softmax(-1) @ v.float().transpose(1, 2)).transpose(1, 2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """phi(q) (phi(k)^T v) / (phi(q) . sum phi(k)), phi = softmax over channels.  -> [B, N, heads, d] in fp32."""
    phi_q, phi_k = (x.float().softmax(-1) for x in (q, k))
    keys_values = torch.einsum("bmhd,bmhe->bhde", phi_k, v.float())
    denominator = torch.einsum("bnhd,bhd->bnh", phi_q, phi_k.sum(1)) + LINEAR_EPS
    return torch.einsum("bnhd,bhde->bnhe", phi_q, keys_values) / denominator[..., None]
