"""The links of a transformer block by kernels, of layers in fp32, bf16 or INT8: one pass over memory each."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.kernels import processor
from dailies.kernels.int8_attention import int8_attention
from dailies.kernels.int8_linear import BLOCK, Quantized, dequantize, int8_linear, quantize_rows
from dailies.kernels.norm import Affine, Update, modulated_norm, rms_norm, rms_rope, rms_rope_halves
from dailies.kernels.sparse_attention import sparse_attention
from dailies.model.block import Ops, Rope, SelfAttention
from dailies.model.card import Sparsity
from dailies.model.layers import Linear, RMSNorm, attention


class Int8Linear(nn.Module):
    """A linear layer in INT8; what it is given is quantised in the scheme of its weight. bf16 out."""

    def __init__(self, in_features: int, out_features: int, *, scheme: str, bias: bool):
        super().__init__()
        scales = (out_features,) if scheme == "rows" else (-(-out_features // BLOCK), -(-in_features // BLOCK))
        self.register_buffer("int8_weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(scales))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        """Quantised in rows, which is the faster and the more exact of the two schemes."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, scheme="rows", bias=linear.bias is not None)
        layer.int8_weight, layer.scale = quantize_rows(linear.weight.detach())
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        return layer

    @property
    def quantized(self) -> Quantized:
        return Quantized(self.int8_weight, self.scale)

    @property
    def takes(self) -> str:
        """The scheme, as modulated_norm is to leave what this layer takes."""
        return "rows" if self.scale.ndim == 1 else "blocks"

    def dequantized(self, dtype: torch.dtype) -> Linear:
        rows, columns = self.int8_weight.shape
        with torch.device("meta"):
            linear = Linear(columns, rows, bias=self.bias is not None)
        linear.weight = nn.Parameter(dequantize(self.quantized, dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return int8_linear(x, self.quantized, self.bias, dtype=torch.bfloat16)


class Unjoined(NamedTuple):
    """A residual stream [B, N, D], and an update that the next norm joins to it in its own pass."""

    stream: Tensor
    update: Update


class FusedOps(Ops):
    """On a GPU a stream is written once for two updates: after the first it is `Unjoined`; the next norm joins both."""

    def __init__(self, attention: str, sparsity: Sparsity):
        self.attention, self.sparsity = attention, sparsity
        self.has_gelu_in_product = processor.has_gelu_in_product()         # asked here, because a compiler cannot

    def norm(self, x: Tensor | Unjoined, norm: nn.LayerNorm, before: Linear | Int8Linear, scale: Tensor | None = None,
             shift: Tensor | None = None) -> tuple[Tensor, Tensor | Quantized]:
        x, *updates = x if isinstance(x, Unjoined) else (x,)
        return joined_norm(x, updates, norm, before, scale, shift)

    def join(self, x: Tensor | Unjoined, y: Tensor, out: Linear | Int8Linear, gate: Tensor | None, norm: nn.LayerNorm,
             before: Linear | Int8Linear, scale: Tensor | None = None, shift: Tensor | None = None, *,
             last: bool = False) -> tuple[Tensor | Unjoined, Tensor | Quantized]:
        update = Update(out(y), gate)
        if isinstance(x, Unjoined):
            return joined_norm(x.stream, [x.update, update], norm, before, scale, shift)
        later = x.is_cuda and not last
        stream, h = joined_norm(x, [update], norm, before, scale, shift, keep=not later)
        return Unjoined(x, update) if later else stream, h

    def feed_forward(self, x: Tensor, h: Tensor | Quantized, into: Linear | Int8Linear, out: Linear | Int8Linear,
                     gate: Tensor) -> Tensor | Unjoined:
        if tokens_differ(gate):
            x, *updates = x if isinstance(x, Unjoined) else (x,)
            return torch.addcmul(joined_stream(x, updates), gate, out(F.gelu(into(h), approximate="tanh")).to(x.dtype))
        if isinstance(into, Int8Linear):
            h = int8_linear(h, into.quantized, into.bias, gelu=True, dtype=torch.bfloat16)
            return int8_linear(h, out.quantized, out.bias, gate=gate, residual=x)
        update = out(gelu_linear(h, into, self.has_gelu_in_product))
        return Unjoined(x, Update(update, gate)) if x.is_cuda else torch.addcmul(x, gate, update)

    def query(self, h: Tensor | Quantized, layer: Linear | Int8Linear, norm: RMSNorm) -> Tensor:
        return rms_norm(layer(h), norm.weight, eps=norm.eps)

    def query_halves(self, h: Tensor | Quantized, layer: Linear | Int8Linear, norm: RMSNorm, heads: int,
                     rope: Rope) -> Tensor:
        if len(rope[0]) > 1:                            # each clip its own positions; a kernel takes one table
            return super().query_halves(h, layer, norm, heads, rope)
        return rms_rope_halves(layer(h), norm.weight, (rope[0][0], rope[1][0]), heads=heads, eps=norm.eps)

    def query_key(self, h: Tensor | Quantized, attn: SelfAttention, rope: Rope) -> tuple[Tensor, Tensor]:
        return rms_rope(attn.q(h), attn.k(h), attn.norm_q.weight, attn.norm_k.weight, rope, heads=attn.heads,
                        eps=attn.norm_q.eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, proj: Linear | None) -> Tensor:
        """Of weights tuned for sparse attention sage is sparse with INT8 logits, as published; of others, dense."""
        of = self.sparsity
        if self.attention == "sparse" or self.attention == "sage" and of.tuned:
            y = sparse_attention(q, k, v, keep_ratio=of.keep_ratio, block_q=of.block_q, block_k=of.block_k,
                                 int8=self.attention == "sage", proj=None if proj is None else (proj.weight, proj.bias))
            return y.flatten(2)
        return int8_attention(q, k, v).flatten(2) if self.attention == "sage" else attention(q, k, v)


def joined_norm(x: Tensor, updates: list[Update], norm: nn.LayerNorm, before: Linear | Int8Linear,
                scale: Tensor | None, shift: Tensor | None, *, keep: bool = True) -> tuple[Tensor, Tensor | Quantized]:
    how = dict(eps=norm.eps, centred=getattr(norm, "centred", True))
    if not tokens_differ(scale, *(update.gate for update in updates)):
        return modulated_norm(x, Affine(norm.weight, norm.bias, scale, shift), updates=updates, keep=keep,
                              output=before.takes, **how)
    stream = joined_stream(x, updates)
    h: Any = modulated_norm(stream, Affine(norm.weight, norm.bias), output=torch.float32, **how)[1]
    h = h if scale is None else torch.addcmul(shift, h, 1 + scale)
    return stream, h if isinstance(before.takes, str) else h.to(before.takes)


def tokens_differ(*rows: Tensor | None) -> bool:
    """Whether scales or gates are [B, N, D], of tokens that are not at one time, and not [B, 1, D]; kernels take that
    alone."""
    return any(row is not None and row.shape[1] != 1 for row in rows)


def joined_stream(x: Tensor, updates: list[Update]) -> Tensor:
    for value, gate in updates:
        x = x + value if gate is None else torch.addcmul(x, gate, value.to(x.dtype))
    return x


def gelu_linear(x: Tensor, linear: Linear, has_gelu_in_product: bool) -> Tensor:
    """gelu(linear(x)); in bf16 oneDNN on a CPU, or cuBLASLt on a GPU, does both in one."""
    if x.is_cpu and linear.weight.dtype == torch.bfloat16 and has_gelu_in_product:
        return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "gelu", [], "tanh")
    if x.is_cuda and linear.weight.dtype == torch.bfloat16:
        y = torch._addmm_activation(linear.bias, x.flatten(0, 1), linear.weight.mT, use_gelu=True)      # the tanh form
        return y.view(*x.shape[:-1], -1)
    return torch.ops.aten.gelu_(linear(x), approximate="tanh")         # in place: fresh pages cost as much as the sum
