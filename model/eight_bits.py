"""Linear layers that keep their weights in eight bits, and compute in more: half the memory, and the sums of bf16.

What such a layer is given stays as it is, unlike with model/fused.py's Int8Linear: for a text encoder, whose rows have
channels that are thousands of times larger than the others. FP8 as published: a number that the whole weight is
multiplied by. A GPU that multiplies FP8 does so, as the release; elsewhere the weight is widened for each product.
"""

import torch
from torch import Tensor, nn

from dailies.kernels.int8_linear import Quantized, dequantize, quantize_rows
from dailies.model.layers import linear

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0                                        # the largest number of FP8
FP8_SCALES = ("weight_scale", "input_scale")            # their names in a file, beside `weight`


def scale_name(weight: str, kind: str = FP8_SCALES[0]) -> str | None:
    """The name of a weight's scale; None for what is named as no weight."""
    owner, dot, leaf = weight.rpartition(".")
    return owner + dot + kind if leaf == "weight" else None


def scaled_weight(scale: str) -> str | None:
    """The name of the weight that a scale is of; None for what is named as no scale."""
    owner, dot, leaf = scale.rpartition(".")
    return f"{owner}{dot}weight" if leaf in FP8_SCALES else None


class NarrowLinear(nn.Module):
    """Weights in INT8, a scale for each output channel."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.takes = linear.weight.dtype
        values, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("int8_weight", values)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = dequantize(Quantized(self.int8_weight, self.scale), self.takes)
        return linear(x.to(self.takes), weight, self.bias)


class Fp8Linear(nn.Module):
    """Weights in FP8 (E4M3) with one scale, and one for what the layer is given, as a file has them.

    wide: what it computes in where it does not multiply FP8.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, wide: torch.dtype = torch.bfloat16,
                 input_scale: bool = True):
        super().__init__()
        self.takes = wide
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=FP8))
        self.register_buffer("weight_scale", torch.empty(()))
        self.register_buffer("input_scale", torch.empty(()) if input_scale else None)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=wide), requires_grad=False) if bias else None

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def widened(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.weight.float() * self.weight_scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.takes)
        if not multiplies_fp8(x.device) or self.in_features % 16 or self.out_features % 16:
            return linear(x.to(self.takes), self.widened(self.takes), bias)
        rows = x.reshape(-1, self.in_features).float()
        scale = self.input_scale if self.input_scale is not None else rows.abs().amax().clamp_min(1e-8) / FP8_MOST
        # beyond the largest number a cast makes NaN, and the clip is black
        narrow = (rows / scale).clamp(-FP8_MOST, FP8_MOST).to(FP8)
        y = torch._scaled_mm(narrow, self.weight.t(), scale_a=scale, scale_b=self.weight_scale,
                             bias=None if bias is None else bias.to(torch.bfloat16), out_dtype=torch.bfloat16,
                             use_fast_accum=True)
        return y.view(*x.shape[:-1], -1)


def multiplies_fp8(device: torch.device) -> bool:
    """Ada, Hopper and what came after."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in FP8, and what it is multiplied by, [] fp32: the largest of it becomes 448."""
    scale = weight.float().abs().amax().clamp_min(1e-12) / FP8_MOST
    return (weight.float() / scale).clamp(-FP8_MOST, FP8_MOST).to(FP8), scale
