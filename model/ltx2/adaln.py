"""Modulation by time in LTX-2: a row for each level of noise that tokens have, and not for each token.

Letters  B clips  N tokens  K levels  R rows  D width
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model.layers import Linear

FEATURES = 256


class Levels(NamedTuple):
    """The time of each token: `times` [B, K] in [0, 1], and which of them each has, [B, N]; None: all have the one."""

    times: Tensor
    index: Tensor | None = None                         # type: ignore[assignment]


class Modulation(NamedTuple):
    """Rows [B, K, R, D] by level, and which level each token has, as Levels."""

    rows: Tensor
    index: Tensor | None = None                         # type: ignore[assignment]

    def added(self, table: Tensor) -> tuple[Tensor, ...]:
        """The rows with a block's own table [R, D] added: each [B, 1, D], or [B, N, D] where tokens differ."""
        return tuple(self.spread(row) for row in (table + self.rows).unbind(2))

    def spread(self, row: Tensor) -> Tensor:
        return row if self.index is None else torch.take_along_dim(row, self.index[..., None], dim=1)


class AdaLayerNormSingle(nn.Module):
    """Time to `rows` rows of modulation, and to the embedding that the head takes."""

    def __init__(self, width: int, rows: int):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": nn.ModuleDict({
            "linear_1": Linear(FEATURES, width), "linear_2": Linear(width, width)})})
        self.linear = Linear(width, rows * width)
        self.rows = rows

    def forward(self, levels: Levels, scale: float = 1.0) -> tuple[Modulation, Modulation]:
        """Rows [B, K, R, D] and the embedding [B, K, 1, D], fp32.  scale: of the time, 1000 apart."""
        layers = self.emb["timestep_embedder"]
        features = time_features(levels.times * (1000 * scale))
        time = layers["linear_2"](F.silu(layers["linear_1"](features)))
        rows = self.linear(F.silu(time)).float().unflatten(-1, (self.rows, -1))
        return Modulation(rows, levels.index), Modulation(time.float()[:, :, None], levels.index)


def time_features(timestep: Tensor) -> Tensor:
    """[..., 256] of a timestep in [0, 1000]: cosines, then sines; in fp32 throughout, as the release."""
    half = FEATURES // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[..., None] * exponent.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def levels_of(timesteps: Tensor) -> Levels:
    """Of the times of tokens [B, N], or [B, 1] for all: as few levels as there are.

    Waits for the device where N > 1; who cannot wait gives Levels.
    """
    if timesteps.shape[1] == 1:
        return Levels(timesteps)
    times, index = torch.unique(timesteps, return_inverse=True)
    return Levels(times.expand(len(timesteps), -1), index) if len(times) > 1 else Levels(timesteps[:, :1])
