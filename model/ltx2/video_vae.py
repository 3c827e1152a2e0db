"""LTX-2's video VAE: pixels to latents and back, 8 frames of 32 x 32 pixels to a cell of 128 numbers.

Letters  B clips  C channels  T latent steps  F pixel frames = 8 * (T - 1) + 1  H W rows and columns
Source   LTX-2 releases 2.0 to 2.5, VideoEncoder and ConvVideoDecoder. Module names are those of the released tensors.

The encoder sees no later frame, the decoder does. There is no attention and no learned norm: what decides the time is
the convolutions, and how often what lies between them crosses memory. So a norm and its SiLU are written frame by frame
straight into the window that the next convolution reads, edges included (`PaddedConv`), with a pixel's channels
adjacent. A clip too large for the memory is decoded in tiles (vae_tiles.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.kernels import processor
from dailies.model import checkpoint
from dailies.model.convolution import channels_last, convolve
from dailies.model.layers import linear
from dailies.model.ltx2 import codec_keys
from dailies.model.ltx2.codec_config import VideoStage, VideoVAEConfig
from dailies.model.ltx2.winograd import FEWEST_CHANNELS, convolve_in_groups

NORM_EPS = 1e-8                                         # inside the root
FEW_CELLS = 512                                         # of a convolution's result, for a CPU


class VideoVAE(nn.Module):
    """Without stages of one half in its config, it has the other alone."""

    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = VideoEncoder(config) if config.encoder else None
        self.decoder = ConvVideoDecoder(config) if config.decoder else None
        self.per_channel_statistics = ChannelStatistics(config.latent_channels)

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised mean latents [B, C, T, H / 32, W / 32], fp32.

        pixels [B, 3, F, H, W] in [-1, 1]; F is 8n + 1, H and W multiples of 32.  Raises ValueError for other sizes.
        """
        time, rows, columns = self.config.strides
        frames, height, width = pixels.shape[2:]
        if (frames - 1) % time or height % rows or width % columns or not height * width:
            raise ValueError(f"video must have {time}n + 1 frames and sides that are multiples of {rows}; "
                             f"got {frames} frames of {height}x{width}. Crop or resample it first")
        if self.encoder is None:
            raise ValueError("this VAE was loaded without its encoder")
        return self.normalise(self.encoder(pixels))

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels [B, 3, F, 32H, 32W], about [-1, 1], not clamped, in the dtype of the weights.

        latent [B, C, T, H, W], normalised.  Raises ValueError for a side that has too little to mirror.
        """
        if self.decoder is None:
            raise ValueError("this VAE was loaded without its decoder")
        if self.config.decoder_padding == "reflect" and min(latent.shape[3:]) < 2:
            raise ValueError(f"this VAE mirrors pictures at their edges: sides must be at least 2 cells, "
                             f"{2 * self.config.strides[1]} pixels; got {latent.shape[3]}x{latent.shape[4]} cells")
        return self.decoder(self.denormalise(latent))

    def normalise(self, latent: Tensor) -> Tensor:
        mean, std = self.per_channel_statistics.as_clips()
        return (latent.float() - mean) / std

    def denormalise(self, latent: Tensor) -> Tensor:
        """What the VAE's own halves and the upsampler work on: latent * std + mean, fp32."""
        mean, std = self.per_channel_statistics.as_clips()
        return latent.float() * std + mean

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype


class ChannelStatistics(nn.Module):
    """Mean and standard deviation of the latents of the data, per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean-of-means", torch.zeros(channels))
        self.register_buffer("std-of-means", torch.ones(channels))

    @property
    def mean(self) -> Tensor:
        return self.get_buffer("mean-of-means")

    @property
    def std(self) -> Tensor:
        return self.get_buffer("std-of-means")

    def as_clips(self) -> tuple[Tensor, Tensor]:
        return self.mean.view(-1, 1, 1, 1), self.std.view(-1, 1, 1, 1)


class VideoEncoder(nn.Module):
    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        self.patch, self.latent_channels = config.patch, config.latent_channels
        edges, width = config.encoder_padding, config.encoder_width
        self.conv_in = PaddedConv(3 * config.patch ** 2, width, edges, causal=True)
        self.down_blocks = nn.ModuleList()
        for stage in config.encoder:
            if stage.layers:
                self.down_blocks.append(ResStage(stage.layers, width, edges, causal=True))
            else:
                self.down_blocks.append(SpaceToDepth(width, stage, edges))
                width *= stage.multiplier
        self.conv_out = PaddedConv(width, config.latent_channels + 1, edges, causal=True)   # one log-variance for all

    def forward(self, pixels: Tensor) -> Tensor:
        """Mean latents [B, C, T, H, W], not normalised.  pixels as VideoVAE.encode."""
        x = self.conv_in(patchified(pixels, self.patch))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(x, norm=True)[:, :self.latent_channels]


class ConvVideoDecoder(nn.Module):
    def __init__(self, config: VideoVAEConfig):
        super().__init__()
        self.patch = config.patch
        edges, width = config.decoder_padding, config.decoder_width
        self.conv_in = PaddedConv(config.latent_channels, width, edges)
        self.up_blocks = nn.ModuleList()
        for stage in config.decoder:
            if stage.layers:
                self.up_blocks.append(ResStage(stage.layers, width, edges))
            else:
                self.up_blocks.append(DepthToSpace(width, stage, edges))
                width //= stage.multiplier
        self.conv_out = PaddedConv(width, 3 * config.patch ** 2, edges)

    def forward(self, latent: Tensor) -> Tensor:
        """Pixels as VideoVAE.decode.  latent [B, C, T, H, W], not normalised."""
        x = self.conv_in(latent)
        for block in self.up_blocks:
            x = block(x)
        return unpatchified(self.conv_out(x, norm=True), self.patch)


class PaddedConv(nn.Module):
    """A 3 x 3 x 3 convolution over a clip that goes on beyond its edges.

    In time by copies: of the first frame twice in front (causal), or of the first in front and of the last behind.
    In space by zeros, or mirrored ("reflect").
    """

    def __init__(self, channels_in: int, channels_out: int, edges: str, *, causal: bool = False):
        super().__init__()
        self.mirrors, self.front = edges == "reflect", 2 if causal else 1
        self.conv = nn.Conv3d(channels_in, channels_out, 3, padding=(0, 0, 0) if self.mirrors else (0, 1, 1))

    def forward(self, x: Tensor, norm: bool = False) -> Tensor:
        """[B, C', T, H, W] of x [B, C, T, H, W].  norm: x passes the norm and SiLU on its way in."""
        if torch.is_grad_enabled() and (x.requires_grad or self.conv.weight.requires_grad):
            return self.conv(self.padded(F.silu(pixel_norm(x)) if norm else x).to(self.conv.weight.dtype))
        if x.is_cpu and len(x) * x.shape[2:].numel() <= FEW_CELLS:
            return self.multiplied(self.window(x, norm, rim=1))
        window = self.window(x, norm, rim=1 if self.mirrors else 0)
        if x.is_cpu and window.dtype == torch.float32 and processor.has_onednn() and (
                min(self.conv.weight.shape[:2]) >= FEWEST_CHANNELS):
            return convolve_in_groups(self.conv, window, self.front)
        return convolve(self.conv, window)

    def padded(self, x: Tensor) -> Tensor:
        """For gradients: nothing is written in place. In space only what is mirrored is there."""
        if self.mirrors:
            x = F.pad(x, (1, 1, 1, 1, 0, 0), mode="reflect")
        return torch.cat((*[x[:, :, :1]] * self.front, x, *[x[:, :, -1:]] * (2 - self.front)), dim=2)

    def window(self, x: Tensor, norm: bool, rim: int) -> Tensor:
        """x with what lies beyond its edges, channels adjacent, in the dtype of the weights.

        rim: pixels around; 0 leaves zeros to the convolution.
        """
        front, (batch, channels, frames, height, width) = self.front, x.shape
        window = torch.empty((batch, channels, frames + 2, height + 2 * rim, width + 2 * rim), device=x.device,
                             dtype=self.conv.weight.dtype, memory_format=torch.channels_last_3d)
        within = window[:, :, front:front + frames]
        inside = within[:, :, :, rim:rim + height, rim:rim + width]
        if norm:
            norm_silu_into(x, inside)
        else:
            inside.copy_(x)
        for axis in (3, 4) if rim else ():
            last = within.shape[axis] - 1
            for edge, mirrored in ((0, 2), (last, last - 2)):
                beyond = within.select(axis, edge)
                if self.mirrors:
                    beyond.copy_(within.select(axis, mirrored))
                else:
                    beyond.zero_()
        for frame in range(front):
            window[:, :, frame] = window[:, :, front]
        if front == 1:
            window[:, :, -1] = window[:, :, -2]
        return window

    def multiplied(self, window: Tensor) -> Tensor:
        """The convolution as a matrix product: of a few cells with many channels oneDNN spends most of its time on
        laying out the weights, which lie as the product wants them (`channels_last`).
        """
        cells = window.permute(0, 2, 3, 4, 1).unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1)  # [B, T, H, W, C, 27]
        batch, frames, height, width = cells.shape[:4]
        weight = self.conv.weight.permute(0, 2, 3, 4, 1).flatten(1)
        seen = cells.permute(0, 1, 2, 3, 5, 6, 7, 4).reshape(-1, weight.shape[1])
        return linear(seen, weight, self.conv.bias).view(batch, frames, height, width, -1).permute(0, 4, 1, 2, 3)


class ResStage(nn.Module):
    def __init__(self, layers: int, channels: int, edges: str, *, causal: bool = False):
        super().__init__()
        self.res_blocks = nn.ModuleList(VideoResBlock(channels, edges, causal=causal) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.res_blocks:
            x = block(x)
        return x


class VideoResBlock(nn.Module):
    def __init__(self, channels: int, edges: str, *, causal: bool = False):
        super().__init__()
        self.conv1 = PaddedConv(channels, channels, edges, causal=causal)
        self.conv2 = PaddedConv(channels, channels, edges, causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x, norm=True), norm=True)
        return x + y if y.requires_grad else y.add_(x)


class SpaceToDepth(nn.Module):
    """Halves axes and multiplies channels: a convolution whose result is folded, plus the input folded and averaged.

    Where it halves time, the first frame comes once more in front, so that it stays apart.
    """

    def __init__(self, channels: int, stage: VideoStage, edges: str):
        super().__init__()
        self.stride, self.channels_out = stage.stride, channels * stage.multiplier
        cells = stage.stride[0] * stage.stride[1] * stage.stride[2]
        self.conv = PaddedConv(channels, self.channels_out // cells, edges, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2:
            x = torch.cat((x[:, :, :1], x), dim=2)
        skip = space_to_depth(x, self.stride)
        skip = skip.unflatten(1, (self.channels_out, -1)).mean(dim=2)
        return space_to_depth(self.conv(x), self.stride) + skip


class DepthToSpace(nn.Module):
    """Doubles axes and divides channels: a convolution whose result is unfolded; with `residual` the input too.

    Where it doubles time, the first frame of the result is dropped.
    """

    def __init__(self, channels: int, stage: VideoStage, edges: str):
        super().__init__()
        self.stride, self.residual = stage.stride, stage.residual
        cells = stage.stride[0] * stage.stride[1] * stage.stride[2]
        self.conv = PaddedConv(channels, cells * channels // stage.multiplier, edges)
        self.repeats = cells // stage.multiplier        # of the unfolded input's channels, block by block

    def forward(self, x: Tensor) -> Tensor:
        y = depth_to_space(self.conv(x), self.stride)
        if not self.residual:
            return y
        skip = depth_to_space(x, self.stride).repeat(1, self.repeats, 1, 1, 1)
        return y + skip if y.requires_grad else y.add_(skip)


def pixel_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean of x^2 over the channels + 1e-8), computed in fp32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + NORM_EPS)).to(x.dtype)


def norm_silu_into(x: Tensor, out: Tensor) -> None:
    """silu(pixel_norm(x)), written to out of the same shape [B, C, T, H, W]; a frame at a time stays in the cache."""
    for frame, place in zip(x.unbind(2), out.unbind(2), strict=True):
        scale = torch.linalg.vector_norm(frame, dim=1, keepdim=True, dtype=torch.float32)
        scale = scale.square_().div_(x.shape[1]).add_(NORM_EPS).rsqrt_()
        if place.dtype == torch.float32:
            torch.mul(frame, scale, out=place)
            F.silu(place, inplace=True)
        else:
            place.copy_(F.silu((frame * scale), inplace=True))


def space_to_depth(x: Tensor, stride: Sequence[int]) -> Tensor:
    """[B, C * t * h * w, T / t, H / h, W / w]: the places of a cell become channels, order (c, t, h, w)."""
    t, h, w = stride
    cells = x.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))         # [B, C, T, t, H, h, W, w]
    return cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def depth_to_space(x: Tensor, stride: Sequence[int]) -> Tensor:
    """The inverse of `space_to_depth`, channels adjacent; where time is doubled, without the first frame."""
    t, h, w = stride
    cells = x.unflatten(1, (-1, t, h, w)).permute(0, 1, 5, 2, 6, 3, 7, 4)               # [B, C, T, t, H, h, W, w]
    batch, channels, frames, _, height, _, width, _ = cells.shape
    if x.requires_grad:
        whole = cells.reshape(batch, channels, t * frames, h * height, w * width)
    else:
        whole = torch.empty((batch, channels, t * frames, h * height, w * width), dtype=x.dtype, device=x.device,
                            memory_format=torch.channels_last_3d)
        whole.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t)).copy_(cells)
    return whole[:, :, t - 1:]


def patchified(pixels: Tensor, patch: int) -> Tensor:
    """[B, 3 * patch^2, F, H / patch, W / patch]; channels in the order (colour, column of the patch, row of it)."""
    cells = pixels.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))                  # [B, 3, F, H, h, W, w]
    return cells.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchified(x: Tensor, patch: int) -> Tensor:
    cells = x.unflatten(1, (3, patch, patch))                                           # [B, 3, w, h, F, H, W]
    return cells.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def video_vae_config(path: Path, name: str) -> VideoVAEConfig:
    """Of the VAE in a file: a release's single one, or one of its own.  Raises CheckpointError."""
    return codec_keys.config_in(VideoVAEConfig, path, "vae.", name)


def load_video_vae(path: Path, *, name: str, device: str, precision: str, halves: Sequence[str] = ("decoder",),
                   config: VideoVAEConfig | None = None) -> VideoVAE:
    """In eval mode, from a release's single file or a VAE's own.

    halves: "encoder", "decoder" or both.  precision: fp32 or bf16.  config: of the file, where it is known.
    Raises CheckpointError.
    """
    config = only(config or video_vae_config(path, name), halves)
    vae = checkpoint.build(lambda: VideoVAE(config), path, *codec_keys.video_vae_tables(halves), name=name,
                           device=device, precision=precision)
    return channels_last(vae)


def only(config: VideoVAEConfig, halves: Sequence[str]) -> VideoVAEConfig:
    """The config without the stages of the other half.  Raises CheckpointError where a half is not there."""
    for half in halves:
        if not getattr(config, half):
            raise checkpoint.CheckpointError(f"the video VAE's {half} is wanted and the file has none; has it been cut "
                                             "to its other half?")
    return replace(config, encoder=config.encoder if "encoder" in halves else (),
                   decoder=config.decoder if "decoder" in halves else ())
