"""LTX-2's latent upsampler: the latent of one stage to that of the next, with larger sides or more steps.

Letters  B clips  C channels  T latent steps  H W rows and columns of cells
Source   LTX-2 releases 2.0 to 2.5, LatentUpsampler. Module names are those of the released tensors.

It works on latents as the VAE itself does: VideoVAE.denormalise before it, VideoVAE.normalise behind it.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model import checkpoint
from dailies.model.convolution import as_clip, as_frames, channels_last, convolve
from dailies.model.ltx2 import codec_keys
from dailies.model.ltx2.codec_config import RATIOS, UpsamplerConfig
from dailies.model.ltx2.video_vae import depth_to_space

GROUPS = 32                                             # of every norm
BINOMIAL = (1, 4, 6, 4, 1)                              # what blurs before a stride, along rows and columns


class LatentUpsampler(nn.Module):
    def __init__(self, config: UpsamplerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.initial_conv = nn.Conv3d(config.channels, width, 3, padding=1)
        self.initial_norm = nn.GroupNorm(GROUPS, width)
        self.res_blocks = nn.ModuleList(UpsamplerBlock(width) for _ in range(config.blocks))
        self.upsampler = _enlarging(config)
        self.post_upsample_res_blocks = nn.ModuleList(UpsamplerBlock(width) for _ in range(config.blocks))
        self.final_conv = nn.Conv3d(width, config.channels, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        """[B, C, T', H', W'] fp32: T' is 2T - 1 where it upsamples time, H' and W' are `scale` times as many.

        latent [B, C, T, H, W], not normalised.
        """
        x = F.silu(_normed(self.initial_norm, convolve(self.initial_conv, latent.to(self.initial_conv.weight.dtype))))
        for block in self.res_blocks:
            x = block(x)
        x = self.upsampler(x) if self.config.temporal else as_clip(self.upsampler(as_frames(x)), len(x))
        for block in self.post_upsample_res_blocks:
            x = block(x)
        return convolve(self.final_conv, x).float()


class UpsamplerBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = (nn.GroupNorm(GROUPS, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(_normed(self.norm1, convolve(self.conv1, x)))
        return F.silu(x + _normed(self.norm2, convolve(self.conv2, y)))


class RationalResampler(nn.Module):
    """[N, C, scale * H, scale * W] of frames [N, C, H, W]: enlarged, blurred, every n-th pixel kept."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.times, self.step = RATIOS[scale]
        self.conv = nn.Conv2d(channels, self.times ** 2 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(convolve(self.conv, x), self.times)
        if self.step == 1:
            return x
        row = torch.tensor(BINOMIAL, dtype=x.dtype, device=x.device) / sum(BINOMIAL)
        kernel = (row[:, None] * row).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, stride=self.step, padding=len(BINOMIAL) // 2, groups=x.shape[1])


class ClipShuffle(nn.Module):
    """Channels (c, t, h, w) of clips to places; where it doubles time, without the first frame."""

    def __init__(self, factors: tuple[int, int, int]):
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return depth_to_space(x, self.factors)


def _enlarging(config: UpsamplerConfig) -> nn.Module:
    """Over clips where time is upsampled, else over frames."""
    width = config.width
    if config.temporal and config.spatial:
        return nn.Sequential(nn.Conv3d(width, 8 * width, 3, padding=1), ClipShuffle((2, 2, 2)))
    if config.temporal:
        return nn.Sequential(nn.Conv3d(width, 2 * width, 3, padding=1), ClipShuffle((2, 1, 1)))
    if config.rational:
        return RationalResampler(width, config.scale)
    return nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))


def _normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """norm(x) in fp32, as its gains are, in x's dtype."""
    return norm(x.float()).to(x.dtype)


def upsampler_config(path: Path, name: str) -> UpsamplerConfig:
    """Raises CheckpointError."""
    return codec_keys.config_in(UpsamplerConfig, path, "", name)


def load_upsampler(path: Path, *, name: str, device: str, precision: str,
                   config: UpsamplerConfig | None = None) -> LatentUpsampler:
    """In eval mode.  precision: fp32 or bf16.  Raises CheckpointError."""
    config = config or upsampler_config(path, name)
    model = checkpoint.build(lambda: LatentUpsampler(config), path, *codec_keys.upsampler_tables(), name=name,
                             device=device, precision=precision)
    return channels_last(model)
