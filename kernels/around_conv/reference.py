"""Norm with SiLU, bias with residual and the larger picture, in plain torch; written to be believed."""

import torch.nn.functional as F
from torch import Tensor


def norm_silu(x: Tensor, gamma: Tensor, bias: Tensor | None, out: Tensor) -> None:
    z = x.float() if bias is None else x.float() + per_channel(bias)
    length = z.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)      # a floor, not a term inside the root
    out.copy_(F.silu(z / length * x.shape[1] ** 0.5 * per_channel(gamma)))


def add_bias(x: Tensor, bias: Tensor, residual: Tensor | None, out: Tensor) -> None:
    y = x.float() + per_channel(bias)
    out.copy_(y if residual is None else y + residual.float())


def enlarge(x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    y = x.float() if bias is None else x.float() + per_channel(bias)
    pairs = y.unflatten(1, (-1, out.shape[1]))                             # [B, 1 or 2, C, T, H, W]
    frames = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
    out.copy_(frames.repeat_interleave(2, 3).repeat_interleave(2, 4))


def per_channel(vector: Tensor) -> Tensor:
    return vector.float().view(-1, 1, 1, 1)
