"""INT8 layers as a CPU with such products runs them: weights packed once, and what follows done while rows are near.

The stream is changed in place: fresh pages for each new one cost more than the sum.
"""

from torch import Tensor, nn

from dailies.kernels import processor
from dailies.kernels.int8_linear import Quantized, dequantize, pack, packed_feed_forward_, packed_linear, quantize_rows
from dailies.kernels.norm import (
    Affine,
    Update,
    packed_modulated_norm_,
    packed_rms_norm,
    packed_rms_rope,
    packed_rms_rope_halves,
)
from dailies.model.block import Rope, SelfAttention
from dailies.model.fused import FusedOps, Int8Linear, joined_norm, tokens_differ
from dailies.model.layers import RMSNorm


class PackedInt8Linear(nn.Module):
    """An Int8Linear in rows, whatever it was before, and packed."""

    takes = "rows"

    def __init__(self, layer: Int8Linear):
        super().__init__()
        rows = layer.quantized if layer.takes == "rows" else quantize_rows(dequantize(layer.quantized))
        self.weight = pack(rows, layer.bias)
        self.dtype = processor.dtype_of("int8", "cpu")  # of what it makes

    def forward(self, x: Tensor | Quantized) -> Tensor:
        return packed_linear(x, self.weight, self.dtype)


class PackedOps(FusedOps):
    """Of a model whose blocks have PackedInt8Linear layers. A caller's stream is used up."""

    def join(self, x: Tensor, y: Tensor, out: PackedInt8Linear, gate: Tensor | None, norm: nn.LayerNorm,
             before: PackedInt8Linear, scale: Tensor | None = None, shift: Tensor | None = None, *,
             last: bool = False) -> tuple[Tensor, Quantized]:
        if tokens_differ(gate, scale):
            return joined_norm(x, [Update(out(y), gate)], norm, before, scale, shift)
        affine = Affine(norm.weight, norm.bias, scale, shift)
        return x, packed_modulated_norm_(x, y, out.weight, affine, gate=gate, eps=norm.eps,
                                         centred=getattr(norm, "centred", True))

    def feed_forward(self, x: Tensor, h: Quantized, into: PackedInt8Linear, out: PackedInt8Linear,
                     gate: Tensor) -> Tensor:
        if tokens_differ(gate):
            return super().feed_forward(x, h, into, out, gate)
        packed_feed_forward_(x, h, into.weight, out.weight, gate)
        return x

    def query(self, h: Quantized, layer: PackedInt8Linear, norm: RMSNorm) -> Tensor:
        return packed_rms_norm(h, layer.weight, norm.weight, eps=norm.eps, dtype=layer.dtype)

    def query_halves(self, h: Quantized, layer: PackedInt8Linear, norm: RMSNorm, heads: int, rope: Rope) -> Tensor:
        if len(rope[0]) > 1:
            return super().query_halves(h, layer, norm, heads, rope)
        return packed_rms_rope_halves(h, layer.weight, norm.weight, (rope[0][0], rope[1][0]), heads=heads, eps=norm.eps,
                                      dtype=layer.dtype)

    def query_key(self, h: Quantized, attn: SelfAttention, rope: Rope) -> tuple[Tensor, Tensor]:
        return tuple(packed_rms_rope(h, layer.weight, norm.weight, rope, heads=attn.heads, eps=norm.eps,
                                     dtype=layer.dtype)
                     for layer, norm in ((attn.q, attn.norm_q), (attn.k, attn.norm_k)))
