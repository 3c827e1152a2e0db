"""Shapes for tests and benchmarks: those that are rendered, and awkward ones, with what may fill them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LARGE = 1 << 20
FILLS = ("normal", "constant rows", "large mean", "outlier channel", "zero tiles")


def fill(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32,
         device: str = "cpu") -> Tensor:
    """Activations [..., N, D].  Up to LARGE numbers, those of one seed are the same on every device.

    More are drawn where they are used: a billion takes a CPU's generator ten seconds.
    """
    where = "cpu" if math.prod(shape) <= LARGE else device
    x = torch.randn(shape, generator=torch.Generator(where).manual_seed(seed), device=where)
    if kind == "constant rows":                        # of whole numbers: their mean is exact, so their norm is zero
        x = x[..., :1].mul(8).round().expand(shape).clone()
    elif kind == "large mean":                         # shows lanes beyond the row that count in the variance
        x += 100
    elif kind == "outlier channel":
        x[..., 3] *= 100
    elif kind == "zero tiles":
        x[..., :128, :128] = 0
        x[..., -1, :] = 0
    return x.to(dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Activations [batch, tokens, width] of a model with so many heads."""

    batch: int = 1
    tokens: int
    width: int
    heads: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.width}"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer [batch, tokens, inputs] -> outputs; what follows it is GELU, or a gate onto the residual."""

    batch: int = 1
    tokens: int
    inputs: int
    outputs: int
    gelu: bool = False
    gated: bool = False

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.inputs}->{self.outputs}" + " gelu" * self.gelu + " gated" * self.gated


def layers_of_block(tokens: int, width: int, ffn: int) -> list[Layer]:
    """The projection behind an attention, and into and out of the feed-forward."""
    return [Layer(tokens=tokens, inputs=width, outputs=width, gated=True),
            Layer(tokens=tokens, inputs=width, outputs=ffn, gelu=True),
            Layer(tokens=tokens, inputs=ffn, outputs=width, gated=True)]


# small enough for Triton's interpreter; 128 is the tile: below one, one row over, and widths that are no multiples
AWKWARD_TOKENS = [
    Tokens(tokens=5, width=64, heads=1), Tokens(batch=2, tokens=3, width=200, heads=2),
    Tokens(tokens=129, width=192, heads=2), Tokens(tokens=1, width=1536, heads=12)]
AWKWARD_LAYERS = [
    Layer(tokens=5, inputs=64, outputs=56), Layer(tokens=129, inputs=256, outputs=264, gelu=True),
    Layer(batch=2, tokens=130, inputs=200, outputs=136, gated=True),
    Layer(tokens=1, inputs=384, outputs=128, gelu=True, gated=True)]

# tokens of 81 frames: 480p of Wan 1.3B, 720p of Wan 14B; and 2,340 for two CPU cores (416 x 240, 21 frames)
RENDERED_TOKENS = [Tokens(tokens=32760, width=1536, heads=12), Tokens(tokens=75600, width=5120, heads=40)]
RENDERED_LAYERS = [*layers_of_block(32760, 1536, 8960), *layers_of_block(75600, 5120, 13824)]
CPU_TOKENS = Tokens(tokens=2340, width=1536, heads=12)
CPU_LAYERS = layers_of_block(2340, 1536, 8960)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """queries [batch, queries, heads, head_dim] and keys [batch, keys, heads, head_dim]."""

    batch: int = 1
    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.queries}x{self.keys} {self.heads}x{self.head_dim}"

    def inputs(self, kind: str, seed: int, dtype: torch.dtype = torch.float32,
               device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v with `kind` in the keys; zeros in the queries too."""
        def rows(kind: str, count: int, seed: int) -> Tensor:
            x = fill(kind, (self.batch, count, self.heads * self.head_dim), seed, dtype, device)
            return x.unflatten(-1, (self.heads, self.head_dim))
        return (rows(kind if kind == "zero tiles" else "normal", self.queries, seed), rows(kind, self.keys, seed + 1),
                rows("normal", self.keys, seed + 2))


# blocks are of 64 or 128 rows: fewer rows than one, a last block of one row, other keys than queries
AWKWARD_ATTENTION = [
    Attention(queries=5, keys=5, heads=2, head_dim=64), Attention(queries=129, keys=129, heads=2, head_dim=64),
    Attention(batch=2, queries=70, keys=193, heads=1, head_dim=128),
    Attention(queries=200, keys=200, heads=1, head_dim=128)]
RENDERED_ATTENTION = [Attention(queries=32760, keys=32760, heads=12, head_dim=128),
                      Attention(queries=75600, keys=75600, heads=40, head_dim=128)]
CPU_ATTENTION = Attention(queries=2340, keys=2340, heads=12, head_dim=128)
