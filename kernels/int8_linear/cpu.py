"""INT8 linear layers with scales in rows on a CPU: the library's product, torch for what surrounds it.

Either of a weight as it is, by torch._int_mm, or of one that was packed once, as oneDNN multiplies it: no call lays it
out again. Where a CPU has no such products, the integers are multiplied in fp32 (kernels/processor.py).

The work goes in pieces that stay in the cache, in buffers that are used again: whole tensors cost more in memory
traffic and fresh pages than the product itself. Same numbers as the reference, but for the order of two products.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dailies.kernels import processor
from dailies.kernels.int8_linear import Packed, reference

TILE_ROWS, TILE_COLUMNS = 256, 2048                    # of one product, for each thread: 2 MB of int32, a core's L2
PIECE = 32768                                          # elements of one piece around it, for a single thread
PACKED_TILE = 512                                      # rows of one product with a packed weight
HIDDEN_TILE = 256                                      # of one that is wider than the model: its result is still near
PACKED_PIECE = 512 * 1024 // 4                         # elements of its fp32 rows that a thread works on at a time
GELU_DEPTH = 0.1701                                    # gelu(x) > -GELU_DEPTH
INNER, CUBIC = math.sqrt(2 / math.pi), 0.044715        # gelu(x) = x / 2 (1 + tanh(INNER (x + CUBIC x^3)))


def int8_linear(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
                gelu: bool, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    if x_scales is None:
        x, x_scales = quantize_rows(x)
    weight_scales, bias = weight_scales.float(), None if bias is None else bias.float()
    if gelu:                                           # the epilogue makes x / 2, which it needs more often than x
        weight_scales, bias = weight_scales / 2, None if bias is None else bias / 2
    y = torch.empty((*x.shape[:-1], len(weight)), dtype=dtype)
    samples = [slice(None)] if gate is None else range(len(x))
    tile_rows = TILE_ROWS * torch.get_num_threads()
    for columns in row_slices(len(weight), TILE_COLUMNS):
        operand, column_scales = processor.int8_operand(weight[columns].mT), weight_scales[columns]
        addend = None if bias is None else bias[columns]
        piece_rows = rows_at_once(len(column_scales))
        sums = torch.empty(tile_rows, len(column_scales), dtype=processor.sum_dtype(operand))
        buffer, spare = torch.empty(2, piece_rows, len(column_scales))
        for sample in samples:
            values, scales = x[sample].reshape(-1, x.shape[-1]), x_scales[sample].reshape(-1, 1)
            into = y[sample].view(-1, len(weight))[:, columns]
            onto = None if residual is None else residual[sample].reshape(-1, len(weight))[:, columns]
            for tile in row_slices(len(values), tile_rows):
                processor.int8_product(values[tile], operand, out=sums[:tile.stop - tile.start])
                for piece in row_slices(tile.stop - tile.start, piece_rows):
                    rows = slice(tile.start + piece.start, tile.start + piece.stop)
                    z = buffer[:piece.stop - piece.start].copy_(sums[piece]).mul_(column_scales)
                    if addend is None:
                        z.mul_(scales[rows])
                    else:
                        torch.addcmul(addend, z, scales[rows], out=z)
                    if gelu:
                        gelu_of_twice_(z, spare[:len(z)])
                    if gate is not None:
                        z.mul_(gate[sample, :, columns])
                    if onto is not None:
                        z.add_(onto[rows])
                    into[rows] = z
    return y


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's values and scales, in pieces."""
    rows = x.reshape(-1, x.shape[-1])
    values, scales = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows), 1)
    step = rows_at_once(rows.shape[-1])
    buffer, spare = torch.empty(2, step, rows.shape[-1])
    for piece in row_slices(len(rows), step):
        z = buffer[:piece.stop - piece.start].copy_(rows[piece])
        quantize_rows_(z, spare[:len(z)], values[piece], scales[piece])
    return values.view(x.shape), scales.view(x.shape[:-1])


def quantize_rows_(z: Tensor, spare: Tensor, values: Tensor, scales: Tensor, above: float = -math.inf) -> None:
    """Quantise the fp32 rows of z, which is used up, into `values` and `scales` [rows, 1]; spare is like z.

    above: what all of z is known to be above. Where a row's largest value outweighs that, it is the row's amax.
    """
    amax = z.amax(-1, keepdim=True) if above > -math.inf else None
    if amax is None or not (amax >= -above).all():
        amax = torch.abs(z, out=spare).amax(-1, keepdim=True).clamp_min_(reference.SMALLEST)
    values.copy_(z.mul_(torch.full_like(amax, 127).div_(amax)).round_())
    torch.div(amax, 127, out=scales)


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's values and scales, a row of tiles at a time."""
    values, scales = zip(*(reference.quantize_blocks(part) for part in x.split(reference.BLOCK, -2)), strict=True)
    return torch.cat(values, -2), torch.cat(scales, -2)


def join_into(x: Tensor, update: Tensor, gate: Tensor | None, out: Tensor) -> None:
    """x + gate * update in fp32, rounded once, into `out`."""
    x, update = x.float(), update.float()
    into = out if out.dtype == torch.float32 else None
    total = torch.add(x, update, out=into) if gate is None else torch.addcmul(x, update, gate.float(), out=into)
    if into is None:
        out.copy_(total)


def gelu_of_twice_(half: Tensor, spare: Tensor) -> Tensor:
    """gelu(2 half) in place, the tanh form: torch's own takes five times as long, for its tanh."""
    inner = half.new_full((1,), 2 * INNER)
    torch.addcmul(inner, half, half, value=8 * INNER * CUBIC, out=spare)
    return half.addcmul_(half, spare.mul_(half).tanh_())


def rows_at_once(width: int) -> int:
    """Rows of a piece. With more than one thread each gets four times as much to do, since all wait for each other
    after every step."""
    threads = torch.get_num_threads()
    return max(1, PIECE * (1 if threads == 1 else 4 * threads) // width)


def row_slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def packed_linear(x: Tensor, x_scales: Tensor | None, weight: Packed, dtype: torch.dtype) -> Tensor:
    y = torch.empty((*x.shape[:-1], len(weight.scales)), dtype=dtype)
    into = y.view(-1, len(weight.scales))
    x_scales = None if x_scales is None else x_scales.reshape(-1)
    for rows, z in packed_products(x.reshape(-1, x.shape[-1]), x_scales, weight):
        into[rows] = z
    return y


def packed_feed_forward_(residual: Tensor, x: Tensor, x_scales: Tensor, into: Packed, out: Packed,
                         gate: Tensor) -> None:
    # both halved, for gelu_of_twice_
    half = into._replace(scales=into.scales / 2, bias=None if into.bias is None else into.bias / 2)
    width = len(half.scales)
    hidden = torch.empty(HIDDEN_TILE, width, dtype=torch.int8)
    hidden_scales = torch.empty(HIDDEN_TILE)
    spare = torch.empty(min(HIDDEN_TILE, packed_piece_rows(width)), width)
    for sample in range(len(x)):
        for tile in row_slices(x.shape[1], HIDDEN_TILE):
            for rows, z in packed_products(x[sample, tile], x_scales[sample, tile], half):
                gelu_of_twice_(z, spare[:len(z)])
                quantize_rows_(z, spare[:len(z)], hidden[rows], hidden_scales[rows, None], above=-GELU_DEPTH)
            stream = residual[sample, tile]
            for rows, z in packed_products(hidden[:len(stream)], hidden_scales, out):
                join_into(stream[rows], z, gate[sample], out=stream[rows])


def packed_products(x: Tensor, scales: Tensor | None, weight: Packed) -> Iterator[tuple[slice, Tensor]]:
    """x W^T + bias in fp32, a few rows at a time: which, and a buffer with them that the caller may spoil.

    x [M, K], int8 with scales [M], or floating: then it is quantised here.
    """
    for tile in row_slices(len(x), PACKED_TILE):
        values, token_scales = quantize_rows(x[tile]) if scales is None else (x[tile], scales[tile])
        zero = 0 if processor.has_signed_int8_products() else 128
        values = values.view(torch.uint8).bitwise_xor(zero) if zero else values         # values + 128: zero is there
        product = torch.ops.onednn.qlinear_pointwise(
            values, 1.0, zero, weight.values, weight.scales, weight.zeros, None, 1.0, 0, torch.float32, "none", [], "")
        for piece in row_slices(len(product), packed_piece_rows(len(weight.scales))):
            z, z_scales = product[piece], token_scales[piece, None]
            z = z.mul_(z_scales) if weight.bias is None else torch.addcmul(weight.bias, z, z_scales, out=z)
            yield slice(tile.start + piece.start, tile.start + piece.stop), z


def packed_piece_rows(width: int) -> int:
    return max(1, torch.get_num_threads() * PACKED_PIECE // width)
