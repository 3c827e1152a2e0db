"""INT8 linear layers with scales in rows, through torch._int_mm: a library's product, torch for the rest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8_linear import reference

CHUNK = 256                                            # rows at a time: what lies between two steps stays in the cache


def int8_linear(x: Tensor, x_scales: Tensor | None, weight: Tensor, weight_scales: Tensor, bias: Tensor | None, gelu: bool,
                gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = torch.empty((*x.shape[:-1], len(weight)), dtype=dtype, device=x.device)
    samples = [slice(None)] if gate is None else range(len(x))
    for sample in samples:
        rows = x[sample].reshape(-1, x.shape[-1])
        scales = None if x_scales is None else x_scales[sample].reshape(-1)
        onto = None if residual is None else residual[sample].reshape(-1, len(weight))
        into = y[sample].view(-1, len(weight))
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            values, scale = reference.quantize_rows(rows[part]) if scales is None else (rows[part], scales[part])
            z = product(values, weight).float().mul_(scale[:, None]).mul_(weight_scales)
            if bias is not None:
                z += bias
            if gelu:
                z = F.gelu(z, approximate="tanh")
            if gate is not None:
                z *= gate[sample]
            if onto is not None:
                z += onto[part]
            into[part] = z
    return y


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in int32."""
    return torch._int_mm(x, weight.mT)
