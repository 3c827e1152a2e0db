"""INT8 linear layers with scales in rows through torch._int_mm: the library's product, torch for what surrounds it.

Where a CPU has no such products, the integers are multiplied in fp32 (kernels/cpu.py).

On a CPU the work goes in pieces that stay in the cache, in buffers that are used again: whole tensors cost more in
memory traffic and fresh pages than the product itself. On a GPU, where it is the rival of our kernel, all goes at once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.kernels import cpu
from dailies.kernels.int8_linear import reference

TILE_ROWS, TILE_COLUMNS = 256, 2048                    # of one product, for each thread: 2 MB of int32, a core's L2
PIECE = 32768                                          # elements of one piece around it, for a single thread
INNER, CUBIC = math.sqrt(2 / math.pi), 0.044715        # gelu(x) = x / 2 (1 + tanh(INNER (x + CUBIC x^3)))


def int8_linear(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
                gelu: bool, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    if x.is_cuda:
        return whole(x, x_scales, weight, weight_scales, bias, gelu, gate, residual, dtype)
    if x_scales is None:
        x, x_scales = quantize_rows(x)
    weight_scales, bias = weight_scales.float(), None if bias is None else bias.float()
    if gelu:                                           # the epilogue makes x / 2, which it needs more often than x
        weight_scales, bias = weight_scales / 2, None if bias is None else bias / 2
    y = torch.empty((*x.shape[:-1], len(weight)), dtype=dtype)
    samples = [slice(None)] if gate is None else range(len(x))
    tile_rows = TILE_ROWS * torch.get_num_threads()
    for columns in pieces(len(weight), TILE_COLUMNS):
        operand, column_scales = cpu.int8_operand(weight[columns].mT), weight_scales[columns]
        addend = None if bias is None else bias[columns]
        piece_rows = rows_of(len(column_scales))
        sums = torch.empty(tile_rows, len(column_scales), dtype=cpu.sum_dtype(operand))
        buffer, spare = torch.empty(2, piece_rows, len(column_scales))
        for sample in samples:
            values, scales = x[sample].reshape(-1, x.shape[-1]), x_scales[sample].reshape(-1, 1)
            into = y[sample].view(-1, len(weight))[:, columns]
            onto = None if residual is None else residual[sample].reshape(-1, len(weight))[:, columns]
            for tile in pieces(len(values), tile_rows):
                cpu.int8_product(values[tile], operand, out=sums[:tile.stop - tile.start])
                for piece in pieces(tile.stop - tile.start, piece_rows):
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
    step = rows_of(rows.shape[-1])
    buffer, spare = torch.empty(2, step, rows.shape[-1])
    for piece in pieces(len(rows), step):
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


def joined(x: Tensor, update: Tensor, gate: Tensor | None, out: Tensor) -> None:
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


def rows_of(width: int) -> int:
    """Rows of a piece. With more than one thread each gets four times as much to do, since all wait for each other
    after every step."""
    threads = torch.get_num_threads()
    return max(1, PIECE * (1 if threads == 1 else 4 * threads) // width)


def pieces(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def whole(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, gelu: bool,
          gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    if x_scales is None:
        x, x_scales = reference.quantize_rows(x)
    values = x.reshape(-1, x.shape[-1])
    rows, channels = len(values), x.shape[-1]
    # cuBLASLt takes more than 16 rows, and channels in eights
    values = F.pad(values, (0, -channels % 8, 0, max(0, 17 - rows)))
    operand = F.pad(weight, (0, -channels % 8, 0, -len(weight) % 8))
    sums = torch._int_mm(values, operand.mT)[:rows, :len(weight)].view(*x.shape[:-1], len(weight))
    return reference.epilogue(sums.float() * (x_scales[..., None] * weight_scales), bias, gelu, gate, residual, dtype)
