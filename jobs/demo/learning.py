"""What makes a step of training fast on a CPU: parts that are compiled, and attention in plain operators.

In torch's own operators a norm and a SiLU are a dozen passes over memory, forwards and back, and took two thirds of a
step of the VAE, where the convolutions took a quarter. Compiled, a step of two whole clips takes 1.9 s of a core
instead of 3.0, one of the DiT 0.7 instead of 2.0 (Xeon with AMX). A C++ compiler is needed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dailies.model.linum.transformer import LinumDiT
from dailies.model.turbo import compile_blocks, keep_code_private
from dailies.model.wan.vae import CausalConv, ChannelNorm, Memory, WanVAE

MOST_COMPILED = 64                                      # widths times sizes that are compiled, at most


def entering(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of ChannelNorm's formula, in fp32 and rounded to bf16 once.  x [B, C, T, H, W], gamma [C, 1, 1, 1]."""
    wide = x.float()
    scale = wide.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt() * x.shape[1] ** 0.5
    return F.silu(wide * scale * gamma).to(torch.bfloat16)


class LearningConv(CausalConv):
    """The same sums as CausalConv's; x and what is before it in bf16."""

    before: Callable[[Tensor, Tensor], Tensor]          # entering, compiled

    def forward(self, x: Tensor, memory: Memory, norm: ChannelNorm | None = None) -> Tensor:
        if not memory.learns or norm is None:
            return super().forward(x, memory, norm)
        return super().forward(self.before(x, norm.gamma), memory)


@contextmanager
def convolutions_for_learning(vae: WanVAE, backend: str | None) -> Iterator[None]:
    """Inside, the VAE's convolutions are these.  backend: of torch.compile; inductor wants a C++ compiler; None leaves
    the convolutions as they are.
    """
    convolutions = [module for module in vae.modules() if type(module) is CausalConv and backend]
    if convolutions:
        keep_code_private()
        limits = torch._dynamo.config.patch(recompile_limit=MOST_COMPILED, accumulated_recompile_limit=MOST_COMPILED)
        LearningConv.before = staticmethod(limits(torch.compile(entering, backend=backend, dynamic=False)))
    for conv in convolutions:
        conv.__class__ = LearningConv
    try:
        yield
    finally:
        for conv in convolutions:
            conv.__class__ = CausalConv


def learn_compiled(dit: LinumDiT, device: str) -> None:
    """On a CPU its blocks are compiled: minutes at first for each shape, once; the code is kept in the user's cache."""
    if device == "cpu":
        compile_blocks(dit)


def plain_attention(device: str) -> AbstractContextManager[None]:
    """On a CPU torch's fused attention learns slowly: 44 % of a step was its backward pass, over 79 tokens."""
    return sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext()
