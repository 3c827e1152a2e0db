"""The transformer block of Linum and of Wan, and the operators that it is computed by.

Letters  B clips  N tokens  D width  L rows of text  I rows of an image

A block is a chain of links: an update joins the residual stream, that is normed and modulated, a layer takes the norm.
A link is one call of `Ops`, so that a kernel can do it in one pass over memory. Here are torch's own operators, which
have gradients; those that are faster come from outside (model/turbo.py).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model.layers import Linear, RMSNorm, attention, rotate, rotate_halves

Rope = tuple[Tensor, Tensor]


class Ops:
    """The links, by torch's operators. `Any` is a stream [B, N, D] or what a layer takes; other Ops have their own."""

    def norm(self, x: Any, norm: nn.LayerNorm, before: Linear, scale: Tensor | None = None,
             shift: Tensor | None = None) -> tuple[Any, Any]:
        """The stream, and its norm as the layer behind takes it; modulated if scale and shift [B, 1, D] are given."""
        h = norm(x)
        return x, (h if scale is None else h * (1 + scale) + shift).to(before.takes)

    def join(self, x: Any, y: Tensor, out: Linear, gate: Tensor | None, norm: nn.LayerNorm, before: Linear,
             scale: Tensor | None = None, shift: Tensor | None = None, *, last: bool = False) -> tuple[Any, Any]:
        """`norm` of x + gate * out(y).  gate [B, 1, D].  last: `feed_forward` is what joins the stream next."""
        update = out(y)
        return self.norm(x + (update if gate is None else gate * update), norm, before, scale, shift)

    def feed_forward(self, x: Any, h: Any, into: Linear, out: Linear, gate: Tensor) -> Any:
        """x + gate * out(gelu(into(h)))."""
        return x + gate * out(F.gelu(into(h), approximate="tanh"))

    def query(self, h: Any, layer: Linear, norm: RMSNorm) -> Tensor:
        """[B, N, D]"""
        return norm(layer(h))

    def query_halves(self, h: Any, layer: Linear, norm: RMSNorm, heads: int, rope: Rope) -> Tensor:
        """[B, N, heads, head_dim] of queries, or of keys; normed over all heads together and turned, each channel of a
        head's first half with that of its second.  rope: cos and sin [1 or B, N, heads, head_dim / 2]."""
        return rotate_halves(norm(layer(h)).unflatten(-1, (heads, -1)), rope)

    def query_key(self, h: Any, attn: "SelfAttention", rope: Rope) -> tuple[Tensor, Tensor]:
        """[B, N, heads, head_dim] each, normed over all heads together and turned."""
        return tuple(rotate(norm(layer(h)).unflatten(-1, (attn.heads, -1)), rope)
                     for layer, norm in ((attn.q, attn.norm_q), (attn.k, attn.norm_k)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, proj: Linear | None) -> Tensor:
        """Self-attention -> [B, N, D].  proj: of weights that were tuned for sparse attention."""
        return attention(q, k, v)


TORCH_OPS = Ops()


def use_ops(model: nn.Module, ops: Ops) -> None:
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops


class SelfAttention(nn.Module):
    """But for its last layer `o`, which is part of the link behind it."""

    ops = TORCH_OPS

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.proj = heads, None
        self.q, self.k, self.v, self.o = (Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(width), RMSNorm(width)

    def forward(self, h: Any, rope: Rope) -> Tensor:
        q, k = self.ops.query_key(h, self, rope)
        return self.ops.attend(q, k, self.v(h).unflatten(-1, (self.heads, -1)), self.proj)


class CrossAttention(nn.Module):
    """Attention to the text and, by a softmax of its own, to an image's rows, added up; but for the last layer `o`.

    A family makes q, k, v, o, norm_q and norm_k.
    """

    ops = TORCH_OPS

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, L, D] -> key and value, each [B, L, heads, head_dim]."""
        return self.normed_key_value(text, self.k, self.norm_k, self.v)

    def normed_key_value(self, rows: Tensor, k: Linear, norm: RMSNorm, v: Linear) -> tuple[Tensor, Tensor]:
        value = v(rows).unflatten(-1, (self.heads, -1))
        return norm(k(rows)).to(value.dtype).unflatten(-1, (self.heads, -1)), value

    def forward(self, h: Any, key: Tensor, value: Tensor, image_key: Tensor | None = None,
                image_value: Tensor | None = None) -> Tensor:
        q = self.ops.query(h, self.q, self.norm_q).unflatten(-1, (self.heads, -1))
        y = attention(q, key, value)
        return y if image_key is None else y + attention(q, image_key, image_value)


class Block(nn.Module):
    """A family makes modulation, norm_attn, norm_cross, norm_ffn, attn, cross, ffn_in and ffn_out."""

    ops = TORCH_OPS

    def forward(self, x: Any, modulation: Tensor, context: tuple[Tensor, ...], rope: Rope) -> Any:
        """x [B, N, D] fp32, or what the block before returned.  modulation [B, 6, D].

        context: key and value of the text [B, L, heads, head_dim], and of the image [B, I, heads, head_dim] if any.
        """
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = (
            self.modulation + modulation).split(1, dim=1)
        ops, attn, cross = self.ops, self.attn, self.cross
        x, h = ops.norm(x, self.norm_attn, attn.q, scale_attn, shift_attn)
        x, h = ops.join(x, attn(h, rope), attn.o, gate_attn, self.norm_cross, cross.q)       # not modulated
        x, h = ops.join(x, cross(h, *context), cross.o, None, self.norm_ffn, self.ffn_in, scale_ffn, shift_ffn)
        return ops.feed_forward(x, h, self.ffn_in, self.ffn_out, gate_ffn)


class Head(nn.Module):
    """The last norm and layer.  A family makes modulation, norm and linear."""

    ops = TORCH_OPS

    def forward(self, x: Any, time: Tensor) -> Tensor:
        """x: what the last block returned.  time [B, D].  -> [B, N, cells]."""
        shift, scale = (self.modulation + time[:, None]).split(1, dim=1)
        return self.linear(self.ops.norm(x, self.norm, self.linear, scale, shift)[1])
