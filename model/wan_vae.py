"""Wan 2.1 image-video VAE: pixels to latents and back, causal in time, so a clip can be coded in chunks of any length.

Letters  B clips  C channels  T latent steps  F pixel frames = 4 * (T - 1) + 1  H W rows and columns
Source   Wan 2.1 release, WanVAE_; also Linum v2's decoder. Tensor names: model/keys.py.

A chunked run equals a whole-clip run: every convolution in time remembers the last frames it saw in a `Memory`, and
the first frame of a clip is special in two places (`Upsample`, `Downsample`): it stands for one pixel frame, not four.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig:
    width: int = 96                                    # channels at full resolution
    multipliers: tuple[int, ...] = (1, 2, 4, 4)        # channels per stage, in widths; a stage halves the picture
    res_blocks: int = 2                                # per encoder stage; the decoder has one more
    latent_channels: int = 16
    halve_time: tuple[bool, ...] = (False, True, True)  # which of the encoder's three downsamplings also halve time

    @property
    def time_stride(self) -> int:
        return 2 ** sum(self.halve_time)

    @property
    def space_stride(self) -> int:
        return 2 ** len(self.halve_time)


class Memory:
    """What one clip's earlier chunks left behind: the last input frames of every convolution in time."""

    def __init__(self) -> None:
        self.first_chunk = True
        self.frames: dict[nn.Module, Tensor] = {}

    def extend(self, module: nn.Module, x: Tensor, keep: int, pad_start: bool = True) -> Tensor:
        """x with the `keep` frames before it in front: remembered ones, or zeros at the clip's start if pad_start."""
        past = self.frames.get(module)
        if past is None and pad_start:
            past = x.new_zeros(*x.shape[:2], keep, *x.shape[3:])
        joined = x if past is None else torch.cat((past, x), dim=2)
        self.frames[module] = joined[:, :, -keep:]
        return joined


class WanVAE(nn.Module):
    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.to_moments = nn.Conv3d(2 * channels, 2 * channels, 1)
        self.from_latent = nn.Conv3d(channels, channels, 1)
        self.decoder = Decoder(config)

    def encode(self, video: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent, each [B, C, T, H / 8, W / 8], not normalised.

        video [B, 3, F, H, W] in [-1, 1]; F is 4n + 1, H and W multiples of 8.  chunk: latent steps coded at a time;
        None takes the whole clip at once. The result is the same.
        Raises ValueError for other frame counts or sizes.
        """
        frames, height, width = video.shape[2:]
        time, space = self.config.time_stride, self.config.space_stride
        if (frames - 1) % time or height % space or width % space:
            raise ValueError(f"video must have {time}n + 1 frames and sides that are multiples of {space}; "
                             f"got {frames} frames of {height}x{width}. Crop or resample it first")
        bounds = chunk_bounds((frames - 1) // time + 1, chunk)
        memory, moments = Memory(), []
        for start, stop in bounds:
            piece = video[:, :, max(0, time * (start - 1) + 1): time * (stop - 1) + 1]
            moments.append(self.to_moments(self.encoder(piece, memory)))
            memory.first_chunk = False
        mean, log_variance = torch.cat(moments, dim=2).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latent: Tensor, *, chunk: int | None = None) -> Tensor:
        """Pixels [B, 3, F, 8H, 8W], about [-1, 1], not clamped.

        latent [B, C, T, H, W], not normalised; chunk as in encode.
        """
        return torch.cat(list(self.decode_chunks(latent, chunk=chunk)), dim=2)

    def decode_chunks(self, latent: Tensor, *, chunk: int | None = 1) -> Iterator[Tensor]:
        """decode(), a few frames at a time: [B, 3, f, 8H, 8W] pieces in order: a long clip is never whole in memory."""
        memory = Memory()
        for start, stop in chunk_bounds(latent.shape[2], chunk):
            yield self.decoder(self.from_latent(latent[:, :, start:stop]), memory)
            memory.first_chunk = False

    def decode_tiles(self, latent: Tensor, *, tile: int, overlap: int, chunk: int | None = 1) -> Iterator[Tensor]:
        """decode_chunks() in less memory: each chunk is decoded in square tiles, which are blended.

        tile, overlap: of a side, in latent cells. Where tiles overlap, one fades out in a straight line as the other
        fades in, so no seam shows. The pixels are near those of decode() but not the same: attention, and convolutions
        at a tile's edge, see only the tile.  Raises ValueError unless 0 < overlap <= tile / 2.
        """
        if not 0 < overlap <= tile / 2:
            raise ValueError(f"overlap must be at least 1 and at most half of tile {tile}; got {overlap}")
        height, width = latent.shape[3:]
        space = self.config.space_stride
        tiles = [(y, x, Memory()) for y in tile_starts(height, tile, overlap) for x in tile_starts(width, tile, overlap)]
        fade_y, fade_x = (fades(min(tile, side), overlap, space, latent) for side in (height, width))
        weight = fade_y[:, None] * fade_x
        for start, stop in chunk_bounds(latent.shape[2], chunk):
            blended = total = None
            for y, x, memory in tiles:
                piece = self.decoder(self.from_latent(latent[:, :, start:stop, y:y + tile, x:x + tile]), memory)
                memory.first_chunk = False
                if blended is None:
                    blended = piece.new_zeros(*piece.shape[:3], space * height, space * width, dtype=torch.float32)
                    total = blended.new_zeros(blended.shape[3:])
                place = (..., slice(space * y, space * (y + tile)), slice(space * x, space * (x + tile)))
                blended[place] += piece * weight
                total[place] += weight
            yield (blended / total).to(latent.dtype)


class Encoder(nn.Module):
    def __init__(self, config: WanVAEConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = CausalConv(3, widths[0])
        layers: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for _ in range(config.res_blocks):
                layers.append(ResBlock(channels, width))
                channels = width
            if stage < len(config.halve_time):
                layers.append(Downsample(width, halve_time=config.halve_time[stage]))
        self.down = nn.ModuleList(layers)
        self.mid = nn.ModuleList([ResBlock(channels, channels), FrameAttention(channels), ResBlock(channels, channels)])
        self.norm_out = ChannelNorm(channels, 3)
        self.conv_out = CausalConv(channels, 2 * config.latent_channels)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = self.conv_in(x, memory)
        for layer in (*self.down, *self.mid):
            x = layer(x, memory)
        return self.conv_out(F.silu(self.norm_out(x)), memory)


class Decoder(nn.Module):
    def __init__(self, config: WanVAEConfig):
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        double_time = config.halve_time[::-1]
        channels = widths[0]
        self.conv_in = CausalConv(config.latent_channels, channels)
        self.mid = nn.ModuleList([ResBlock(channels, channels), FrameAttention(channels), ResBlock(channels, channels)])
        layers: list[nn.Module] = []
        for stage, width in enumerate(widths):
            for _ in range(config.res_blocks + 1):
                layers.append(ResBlock(channels, width))
                channels = width
            if stage < len(double_time):
                layers.append(Upsample(width, double_time=double_time[stage]))
                channels = width // 2
        self.up = nn.ModuleList(layers)
        self.norm_out = ChannelNorm(channels, 3)
        self.conv_out = CausalConv(channels, 3)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = self.conv_in(x, memory)
        for layer in (*self.mid, *self.up):
            x = layer(x, memory)
        return self.conv_out(F.silu(self.norm_out(x)), memory)


class ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels_in, 3)
        self.conv1 = CausalConv(channels_in, channels_out)
        self.norm2 = ChannelNorm(channels_out, 3)
        self.conv2 = CausalConv(channels_out, channels_out)
        self.shortcut = nn.Conv3d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), memory)
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)), memory)


class FrameAttention(nn.Module):
    """One head over the positions of each frame; frames do not see each other."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        frames = as_frames(x)                                                   # [B*T, C, H, W]
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return x + as_clip(self.proj(y), len(x))


class Downsample(nn.Module):
    """Halves the picture; with halve_time also the frames, of which a clip's first passes through alone."""

    def __init__(self, channels: int, *, halve_time: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if halve_time else None

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        x = as_clip(self.conv(F.pad(as_frames(x), (0, 1, 0, 1))), len(x))
        if self.time_conv is None:
            return x
        first = x[:, :, : 1 if memory.first_chunk else 0]
        x = memory.extend(self.time_conv, x, keep=1, pad_start=False)           # frame 0 is context of the first window
        return torch.cat((first, self.time_conv(x)), dim=2) if x.shape[2] >= 3 else first


class Upsample(nn.Module):
    """Doubles the picture and halves the channels; with double_time also the frames, but for a clip's first."""

    def __init__(self, channels: int, *, double_time: bool):
        super().__init__()
        self.time_conv = CausalConv(channels, 2 * channels, (3, 1, 1)) if double_time else None
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        if self.time_conv is not None:
            first, rest = x.split_with_sizes([1, x.shape[2] - 1], dim=2) if memory.first_chunk else (x[:, :, :0], x)
            if rest.shape[2]:                           # the first frame never enters this convolution
                even, odd = self.time_conv(rest, memory).chunk(2, dim=1)
                rest = torch.stack((even, odd), dim=3).flatten(2, 3)
            x = torch.cat((first, rest), dim=2)
        frames = F.interpolate(as_frames(x), scale_factor=2.0, mode="nearest-exact")
        return as_clip(self.conv(frames), len(x))


class CausalConv(nn.Conv3d):
    """3D convolution that sees no later frame: zeros, or the remembered frames, stand before the first."""

    def __init__(self, channels_in: int, channels_out: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__(channels_in, channels_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return super().forward(memory.extend(self, x, keep=self.kernel_size[0] - 1))


class ChannelNorm(nn.Module):
    """Unit length over the channels, times sqrt(C), times a learned gain: no mean, no bias, statistics in fp32."""

    def __init__(self, channels: int, spatial_dims: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * spatial_dims))

    def forward(self, x: Tensor) -> Tensor:
        # 1e-12 is a floor under the norm, not a term inside the root
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        return x * (len(self.gamma) ** 0.5 / norm).to(x.dtype) * self.gamma.to(x.dtype)


def channels_last(vae: WanVAE) -> WanVAE:
    """Lay the convolutions' weights out so that a CPU runs them about twice as fast, in place; the last bits change."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae


def chunk_bounds(steps: int, chunk: int | None) -> list[tuple[int, int]]:
    size = steps if chunk is None else chunk
    return [(start, min(start + size, steps)) for start in range(0, steps, size)]


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `side` cells, the last one flush with its end."""
    return [*range(0, max(1, side - tile), tile - overlap), *([side - tile] if side > tile else [])]


def fades(tile: int, overlap: int, space: int, like: Tensor) -> Tensor:
    """A tile's weight along a side, in pixels, fp32: rises over the overlap, stays, and falls; never 0.

    The edges of the picture have it too, where nothing else covers them; the sum of weights is divided out.
    """
    pixels = torch.arange(tile * space, device=like.device, dtype=torch.float32) + 0.5
    return (torch.minimum(pixels, tile * space - pixels) / (overlap * space)).clamp(max=1.0)


def as_frames(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def as_clip(frames: Tensor, clips: int) -> Tensor:
    return frames.unflatten(0, (clips, -1)).transpose(1, 2)
