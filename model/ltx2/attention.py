"""Attention and layers as every block of LTX-2 has them: of the transformer's streams, and of the connectors.

Letters  B clips  N tokens  M tokens attended to  D width of the attention, of all its heads
"""

from typing import Any

import torch
from torch import Tensor, nn

from dailies.model.block import TORCH_OPS
from dailies.model.layers import Linear, RMSNorm, attention, rotate
from dailies.model.ltx2.rope import RotaryTable


class RootMeanSquare(nn.Module):
    """x / rms(x) over the last axis, without weights."""

    weight = bias = None
    centred = False                                     # unlike a layer norm (kernels/norm)

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], eps=self.eps)


class LtxAttention(nn.Module):
    """But for its last layer `out`, which is part of the link behind it (model/block.py)."""

    ops = TORCH_OPS

    def __init__(self, query_width: int, source_width: int, width: int, heads: int, *, gated: bool,
                 spread: bool = False):
        """spread: it is the picture's attention to itself, which may be sparse or in INT8."""
        super().__init__()
        self.heads, self.spread = heads, spread
        self.to_q, self.to_k, self.to_v = (Linear(size, width) for size in (query_width, source_width, source_width))
        self.to_out = nn.ModuleList([Linear(width, query_width)])
        self.q_norm, self.k_norm = RMSNorm(width), RMSNorm(width)
        self.to_gate_logits = Linear(query_width, heads) if gated else None

    @property
    def out(self) -> Linear:
        return self.to_out[0]

    def forward(self, h: Any, source: Any, query_rope: RotaryTable | None = None, key_rope: RotaryTable | None = None,
                *, skip: bool = False) -> Tensor:
        """[B, N, D].  h [B, N, ..], source [B, M, ..]: as the layers take them; or source is of key_value.
        skip: a token gets its own value."""
        if skip:
            y = self.to_v(source).unflatten(-1, (self.heads, -1))
        else:
            key, value = source if type(source) is tuple else self.key_value(source, key_rope)
            query = self.headed(h, self.to_q, self.q_norm, query_rope).to(value.dtype)
            y = self.ops.attend(query, key, value, None) if self.spread else attention(query, key, value)
            y = y.unflatten(-1, (self.heads, -1))
        if self.to_gate_logits is not None:
            y = y * (2 * torch.sigmoid(self.to_gate_logits(h)))[..., None].to(y.dtype)
        return y.flatten(2)

    def key_value(self, source: Any, rope: RotaryTable | None = None) -> tuple[Tensor, Tensor]:
        """[B, M, heads, head_dim] each."""
        value = self.to_v(source).unflatten(-1, (self.heads, -1))
        return self.headed(source, self.to_k, self.k_norm, rope).to(value.dtype), value

    def headed(self, h: Any, layer: Linear, norm: RMSNorm, rope: RotaryTable | None) -> Tensor:
        """[B, N, heads, head_dim], normed over all heads together and turned."""
        if rope is not None and rope.halves:
            return self.ops.query_halves(h, layer, norm, self.heads, (rope.cos, rope.sin))
        x = self.ops.query(h, layer, norm).unflatten(-1, (self.heads, -1))
        return x if rope is None else rotate(x, (rope.cos, rope.sin))


class FeedForward(nn.Module):
    def __init__(self, width: int, *, bias: bool):
        super().__init__()
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": Linear(width, 4 * width, bias=bias)}),
                                  "2": Linear(4 * width, width, bias=bias)})

    @property
    def into(self) -> Linear:
        return self.net["0"]["proj"]

    @property
    def out(self) -> Linear:
        return self.net["2"]
