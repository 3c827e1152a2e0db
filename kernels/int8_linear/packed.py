"""INT8 linear layers on a CPU with the weight packed once, as oneDNN multiplies it: no call lays it out again.

The product comes out as integers times the weight's scales, in fp32; the token's scale, the bias and what follows are
done a few rows at a time, while those rows are in the cache. Scales per row only. Same numbers as the reference, but
for the order of two products.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dailies.kernels import cpu
from dailies.kernels.int8_linear import Quantized, int_mm
from dailies.kernels.int8_linear.int_mm import gelu_of_twice_, joined, pieces, quantize_rows_

TILE = 512                                             # rows of one product
HIDDEN_TILE = 256                                      # of one that is wider than the model: its result is still near
PIECE_BYTES = 512 * 1024                               # of fp32 rows that a thread works on at a time
GELU_DEPTH = 0.1701                                    # gelu(x) > -GELU_DEPTH


class Packed(NamedTuple):
    """A weight [N, K] in oneDNN's layout, for this process alone: it cannot be saved."""

    values: Tensor
    scales: Tensor                                     # fp32 [N]
    zeros: Tensor                                      # int32 [N]: the weights are symmetric
    bias: Tensor | None                                # fp32 [N]

    @property
    def out_features(self) -> int:
        return len(self.scales)


def pack(weight: Quantized, bias: Tensor | None = None) -> Packed:
    """weight: of quantize_rows.  bias [N].

    Raises ValueError on a CPU without INT8 products, where oneDNN's are slow and, adding in 16 bits, wrong.
    """
    if not cpu.has_int8_products():
        raise ValueError(f"a packed layer needs a CPU with INT8 products (VNNI); this is {cpu.described()}. "
                         "int8_linear takes the weight as it is")
    return Packed(torch.ops.onednn.qlinear_prepack(weight.values, None), weight.scales.float(),
                  torch.zeros(len(weight.scales), dtype=torch.int32), None if bias is None else bias.float())


def parts_of(x: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    """Values and, of what is quantised, scales: an operator takes tensors."""
    return x if isinstance(x, Quantized) else (x, None)


def linear(x: Tensor | Quantized, weight: Packed, dtype: torch.dtype) -> Tensor:
    """x W^T + bias in `dtype`.  x [..., K], floating or of quantize_rows."""
    return torch.ops.dailies.packed_linear(*parts_of(x), *weight, dtype)


def feed_forward_(residual: Tensor, x: Quantized, into: Packed, out: Packed, gate: Tensor) -> None:
    """residual += gate * out(gelu(into(x))). What is between the layers never leaves the cache whole.

    residual [B, N, D], x [B, N, K], of quantize_rows.  gate [B, 1, D].
    """
    torch.ops.dailies.packed_feed_forward_(residual, *x, *into, *out, gate)


@torch.library.custom_op("dailies::packed_linear", mutates_args=())
def packed_linear_op(x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor, zeros: Tensor,
                     bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch.empty((*x.shape[:-1], len(scales)), dtype=dtype)
    into = y.view(-1, len(scales))
    x_scales = None if x_scales is None else x_scales.reshape(-1)
    for rows, z in products(x.reshape(-1, x.shape[-1]), x_scales, Packed(weight, scales, zeros, bias)):
        into[rows] = z
    return y


@packed_linear_op.register_fake
def _(x: Tensor, x_scales: Tensor | None, weight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None,
      dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(scales)), dtype=dtype)


@torch.library.custom_op("dailies::packed_feed_forward_", mutates_args=("residual",))
def packed_feed_forward_op(residual: Tensor, x: Tensor, x_scales: Tensor,
                           weight_in: Tensor, scales_in: Tensor, zeros_in: Tensor, bias_in: Tensor | None,
                           weight_out: Tensor, scales_out: Tensor, zeros_out: Tensor, bias_out: Tensor | None,
                           gate: Tensor) -> None:
    # both halved, for gelu_of_twice_
    half = Packed(weight_in, scales_in / 2, zeros_in, None if bias_in is None else bias_in / 2)
    out = Packed(weight_out, scales_out, zeros_out, bias_out)
    hidden = torch.empty(HIDDEN_TILE, half.out_features, dtype=torch.int8)
    hidden_scales = torch.empty(HIDDEN_TILE)
    spare = torch.empty(min(HIDDEN_TILE, piece_rows(half.out_features)), half.out_features)
    for sample in range(len(x)):
        for tile in pieces(x.shape[1], HIDDEN_TILE):
            for rows, z in products(x[sample, tile], x_scales[sample, tile], half):
                gelu_of_twice_(z, spare[:len(z)])
                quantize_rows_(z, spare[:len(z)], hidden[rows], hidden_scales[rows, None], above=-GELU_DEPTH)
            into = residual[sample, tile]
            for rows, z in products(hidden[:len(into)], hidden_scales, out):
                joined(into[rows], z, gate[sample], out=into[rows])


def products(x: Tensor, scales: Tensor | None, weight: Packed) -> Iterator[tuple[slice, Tensor]]:
    """x W^T + bias in fp32, a few rows at a time: which, and a buffer with them that the caller may spoil.

    x [M, K], int8 with scales [M], or floating: then it is quantised here.
    """
    for tile in pieces(len(x), TILE):
        values, token_scales = int_mm.quantize_rows(x[tile]) if scales is None else (x[tile], scales[tile])
        product = torch.ops.onednn.qlinear_pointwise(
            values, 1.0, 0, weight.values, weight.scales, weight.zeros, None, 1.0, 0, torch.float32, "none", [], "")
        for piece in pieces(len(product), piece_rows(weight.out_features)):
            z, z_scales = product[piece], token_scales[piece, None]
            z = z.mul_(z_scales) if weight.bias is None else torch.addcmul(weight.bias, z, z_scales, out=z)
            yield slice(tile.start + piece.start, tile.start + piece.stop), z


def piece_rows(width: int) -> int:
    return max(1, torch.get_num_threads() * PIECE_BYTES // (4 * width))
