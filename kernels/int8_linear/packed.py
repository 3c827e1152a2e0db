"""INT8 linear layers on a CPU with the weight packed once, as oneDNN multiplies it: no call lays it out again.

The product comes out as integers times the weight's scales, in fp32; the token's scale, the bias and what follows are
done a few rows at a time, while those rows are in the cache. Scales per row only. Same numbers as the reference, but
for the order of two products.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.int8_linear import Quantized, quantize_rows
from kernels.int8_linear.int_mm import gelu_of_twice_, joined, pieces, quantize_rows_

TILE = 256                                             # rows of one product: its result is still near when it is used
PIECE_BYTES = 512 * 1024                               # of fp32 rows that a thread works on at a time


class Packed(NamedTuple):
    """A weight [N, K] in oneDNN's layout, for this process alone: it cannot be saved."""

    values: Tensor
    scales: Tensor                                     # fp32 [N]
    zeros: Tensor                                      # int32 [N]: the weights are symmetric

    @property
    def out_features(self) -> int:
        return len(self.scales)


def pack(weight: Quantized) -> Packed:
    """weight: of quantize_rows."""
    return Packed(torch.ops.onednn.qlinear_prepack(weight.values, None), weight.scales.float(),
                  torch.zeros(len(weight.scales), dtype=torch.int32))


def linear(x: Tensor | Quantized, weight: Packed, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias in `dtype`.  x [..., K], floating or of quantize_rows.  bias fp32 [N]."""
    values, scales = x if isinstance(x, Quantized) else quantize_rows(x)
    y = torch.empty((*values.shape[:-1], weight.out_features), dtype=dtype)
    values, scales, into = values.reshape(-1, values.shape[-1]), scales.reshape(-1, 1), y.view(-1, weight.out_features)
    for tile in pieces(len(values), TILE):
        product = multiplied(values[tile], weight)
        for piece in small_pieces(product):
            rows = slice(tile.start + piece.start, tile.start + piece.stop)
            into[rows] = scaled_(product[piece], scales[rows], bias)
    return y


def feed_forward(x: Quantized, weight_in: Packed, bias_in: Tensor | None, weight_out: Packed, bias_out: Tensor | None,
                 gate: Tensor, residual: Tensor) -> Tensor:
    """residual + gate * out(gelu(in(x))) in residual's dtype. What is between the layers never leaves the cache whole.

    x [B, N, K], of quantize_rows.  gate [B, 1, D], residual [B, N, D].
    """
    values, scales = x
    # both halved, for gelu_of_twice_
    half = weight_in._replace(scales=weight_in.scales / 2), None if bias_in is None else bias_in / 2
    y = torch.empty_like(residual)
    for sample in range(len(values)):
        for tile in pieces(values.shape[1], TILE):
            product = multiplied(values[sample, tile], half[0])
            hidden = torch.empty(product.shape, dtype=torch.int8)
            hidden_scales = torch.empty(len(product), 1)
            spare = torch.empty_like(product[:small_pieces(product)[0].stop])
            for piece in small_pieces(product):
                rows = slice(tile.start + piece.start, tile.start + piece.stop)
                z = scaled_(product[piece], scales[sample, rows, None], half[1])
                gelu_of_twice_(z, spare[:len(z)])
                quantize_rows_(z, spare[:len(z)], hidden[piece], hidden_scales[piece])
            product = multiplied(hidden, weight_out)
            for piece in small_pieces(product):
                rows = slice(tile.start + piece.start, tile.start + piece.stop)
                z = scaled_(product[piece], hidden_scales[piece], bias_out)
                joined(residual[sample, rows], z, gate[sample], out=y[sample, rows])
    return y


def multiplied(values: Tensor, weight: Packed) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(values, 1.0, 0, weight.values, weight.scales, weight.zeros, None, 1.0, 0,
                                              torch.float32, "none", [], "")


def scaled_(z: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return z.mul_(scales) if bias is None else torch.addcmul(bias, z, scales, out=z)


def small_pieces(rows: Tensor) -> list[slice]:
    return pieces(len(rows), max(1, torch.get_num_threads() * PIECE_BYTES // (4 * rows.shape[-1])))
