"""INT8 quantisation and linear layers in plain torch; written to be believed.

Source of the block scheme: TurboDiffusion, turbodiffusion/ops/quant/quant.hpp and ops/gemm/kernel.hpp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
SMALLEST = 1e-8                                        # of an amax: nothing is divided by zero, and zeros stay zero


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    amax = x.abs().amax(-1).clamp_min(SMALLEST)
    inverse = torch.full_like(amax, 127) / amax        # 127 / amax would be 127 * reciprocal(amax), rounded twice
    return (x * inverse[..., None]).round_().to(torch.int8), amax / 127


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float()
    rows, columns = x.shape[-2:]
    tiles = F.pad(x, (0, -columns % BLOCK, 0, -rows % BLOCK)).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    amax = tiles.abs().amax((-3, -1)).clamp_min(SMALLEST)
    values = (x * spread_scales(128 / amax, x.shape)).round_().clamp_(-128, 127)
    return values.to(torch.int8), amax / 128


def spread_scales(scales: Tensor, shape: torch.Size) -> Tensor:
    """Scales of tiles [..., ceil(M / 128), ceil(K / 128)] as scales of elements [..., M, K]."""
    return scales.repeat_interleave(BLOCK, -2)[..., :shape[-2], :].repeat_interleave(BLOCK, -1)[..., :shape[-1]]


def int8_linear(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None,
                gelu: bool, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An fp32 product of integers up to 128 is exact while the sum stays below 2^24, as within a block of K; so both
    schemes are fp32 products per block of 128 of K: exact integers, which rows add up and blocks scale first."""
    blocks = weight_scales.ndim == 2
    if x_scales is None:
        x, x_scales = quantize_blocks(x) if blocks else quantize_rows(x)
    y = 0
    for place, (part, weight_part) in enumerate(zip(x.split(BLOCK, -1), weight.split(BLOCK, -1), strict=True)):
        product = part.float() @ weight_part.float().mT
        if blocks:
            row = x_scales[..., place].repeat_interleave(BLOCK, -1)[..., :x.shape[-2], None]
            column = weight_scales[:, place].repeat_interleave(BLOCK)[:len(weight)]
            y = y + product * (row * column)
        else:
            y = y + product.to(torch.int32)
    if not blocks:
        y = y.float() * (x_scales[..., None] * weight_scales)
    return epilogue(y, bias, gelu, gate, residual, dtype)


def epilogue(y: Tensor, bias: Tensor | None, gelu: bool, gate: Tensor | None, residual: Tensor | None,
             dtype: torch.dtype) -> Tensor:
    """What follows the product y, in fp32, up to the one rounding."""
    if bias is not None:
        y = y + bias.float()
    if gelu:
        y = F.gelu(y, approximate="tanh")
    if gate is not None:
        y = y * gate.float()
    if residual is not None:
        y = residual.float() + y
    return y.to(dtype)
