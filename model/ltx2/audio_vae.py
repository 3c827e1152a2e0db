"""LTX-2's audio VAE: log-mel spectrograms of stereo sound to latents and back, 4 mel frames to a latent step.

Letters  B clips  A latent steps  T mel frames = 4 * A - 3  M mel bins  K latent bins = M / 4
Source   LTX-2 releases 2.0 to 2.5, AudioEncoder and AudioDecoder. Module names are those of the released tensors.

A spectrogram is a picture of T x M with a channel per ear. Convolutions see no later mel frame: 25 latent steps are a
second, and the first is one mel frame.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model import checkpoint
from dailies.model.convolution import channels_last
from dailies.model.ltx2 import codec_keys
from dailies.model.ltx2.codec_config import MEL_FLOOR, AudioVAEConfig
from dailies.model.ltx2.video_vae import ChannelStatistics

AUDIO_NORM_EPS = 1e-6                                         # inside the root; the video VAE has another


class AudioVAE(nn.Module):
    """halves: "encoder", "decoder" or both."""

    def __init__(self, config: AudioVAEConfig, halves: Sequence[str] = ("encoder", "decoder")):
        super().__init__()
        self.config = config
        self.encoder = AudioEncoder(config) if "encoder" in halves else None
        self.decoder = AudioDecoder(config) if "decoder" in halves else None
        self.per_channel_statistics = ChannelStatistics(config.latent_channels * config.latent_bins)

    def encode(self, mel: Tensor) -> Tensor:
        """Normalised mean latents [B, 8, ceil(ceil(T / 2) / 2), K], fp32.  mel [B, 2, T, M]: as `log_mel` makes it."""
        if self.encoder is None:
            raise ValueError("this audio VAE was loaded without its encoder")
        mean, std = self.statistics()
        return (self.encoder(mel).float() - mean) / std

    def decode(self, latent: Tensor) -> Tensor:
        """Log-mel spectrograms [B, 2, 4 * A - 3, M].  latent [B, 8, A, K], normalised."""
        if self.decoder is None:
            raise ValueError("this audio VAE was loaded without its decoder")
        mean, std = self.statistics()
        mel = self.decoder(latent.float() * std + mean)
        return mel[:, :, :, :self.config.mel_bins]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation [8, 1, K]: they are stored per channel and bin."""
        own, shape = self.per_channel_statistics, (self.config.latent_channels, 1, self.config.latent_bins)
        return own.mean.view(shape), own.std.view(shape)


class AudioEncoder(nn.Module):
    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        self.latent_channels = config.latent_channels
        width = config.width
        self.conv_in = CausalConv2d(config.channels, width)
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(config.multipliers):
            last = level == len(config.multipliers) - 1
            self.down.append(AudioLevel(width, config.width * multiplier, config.blocks,
                                        downsample=None if last else AudioDownsample(config.width * multiplier)))
            width = config.width * multiplier
        self.mid = AudioMid(width)
        self.conv_out = CausalConv2d(width, 2 * config.latent_channels)     # means, then log-variances

    def forward(self, mel: Tensor) -> Tensor:
        """Mean latents [B, 8, A, K], not normalised.  mel [B, 2, T, M]"""
        x = self.conv_in(mel)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if level.downsample is not None:
                x = level.downsample(x)
        return self.conv_out(normed_silu(self.mid(x)))[:, :self.latent_channels]


class AudioDecoder(nn.Module):
    def __init__(self, config: AudioVAEConfig):
        super().__init__()
        width = config.width * config.multipliers[-1]
        self.conv_in = CausalConv2d(config.latent_channels, width)
        self.mid = AudioMid(width)
        levels = []
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            made = config.width * multiplier
            levels.insert(0, AudioLevel(width, made, config.blocks + 1,
                                        upsample=AudioUpsample(made) if level else None))
            width = made
        self.up = nn.ModuleList(levels)                 # from the finest to the coarsest, as the tensors are named
        self.conv_out = CausalConv2d(width, config.channels)

    def forward(self, latent: Tensor) -> Tensor:
        """Log-mel [B, 2, 4 * A - 3, M].  latent [B, 8, A, K], not normalised."""
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if level.upsample is not None:
                x = level.upsample(x)
        return self.conv_out(normed_silu(x))


class AudioLevel(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, blocks: int, *, upsample: nn.Module | None = None,
                 downsample: nn.Module | None = None):
        super().__init__()
        self.block = nn.ModuleList(AudioResBlock(channels_in if not n else channels_out, channels_out)
                                   for n in range(blocks))
        self.upsample, self.downsample = upsample, downsample


class AudioMid(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = AudioResBlock(channels, channels)
        self.block_2 = AudioResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class AudioResBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv1 = CausalConv2d(channels_in, channels_out)
        self.conv2 = CausalConv2d(channels_out, channels_out)
        self.nin_shortcut = CausalConv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(normed_silu(self.conv1(normed_silu(x))))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AudioUpsample(nn.Module):
    """Twice the bins, and twice the frames but for the first, which stays one."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv2d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))[:, :, 1:]


class AudioDownsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 2, 0)).to(self.conv.weight.dtype))


class CausalConv2d(nn.Module):
    """A convolution over [B, C, T, M] with zeros beyond the edges: in time all of them before the first frame."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int = 3):
        super().__init__()
        self.pads = (kernel // 2, kernel // 2, kernel - 1, 0)
        self.conv = nn.Conv2d(channels_in, channels_out, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pads).to(self.conv.weight.dtype))


def normed_silu(x: Tensor) -> Tensor:
    """silu(x / sqrt(mean of x^2 over the channels + 1e-6)); statistics in fp32."""
    wide = x.float()
    return F.silu(wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + AUDIO_NORM_EPS)).to(x.dtype)


def log_mel(sound: Tensor, config: AudioVAEConfig) -> Tensor:
    """Log-mel spectrograms [B, 2, T, M] with T = samples // hop + 1: what the encoder sees.

    sound [B, 2, samples] in [-1, 1] at the config's sample rate, longer than half a window.
    Magnitudes of a centred STFT with a Hann window; Slaney's mel scale and norm from 0 to 8000 Hz; ln(max(., 1e-5)).
    """
    window = torch.hann_window(config.window, device=sound.device)
    spectrum = torch.stft(sound.float().flatten(0, 1), config.window, config.hop, window=window, center=True,
                          pad_mode="reflect", return_complex=True).abs()                    # [2B, window / 2 + 1, T]
    bank = mel_bank(config.mel_bins, config.window, config.sample_rate).to(sound.device)
    mel = (bank @ spectrum).clamp_min(MEL_FLOOR).log()
    return mel.transpose(1, 2).unflatten(0, (-1, sound.shape[1]))


def mel_bank(bins: int, window: int, sample_rate: int) -> Tensor:
    """Triangles [bins, window / 2 + 1] over the STFT's frequencies, fp32; each has an area of 1.

    Slaney's scale: 200 / 3 Hz a mel up to 1000 Hz, from there 27 mels for a factor of 6.4.
    """
    knee, slope, step = 1000.0, 200.0 / 3, torch.log(torch.tensor(6.4, dtype=torch.float64)) / 27

    def hertz(mel: Tensor) -> Tensor:
        return torch.where(mel < knee / slope, mel * slope, knee * torch.exp(step * (mel - knee / slope)))

    top = torch.tensor(sample_rate / 2, dtype=torch.float64)
    top = torch.where(top < knee, top / slope, knee / slope + torch.log(top / knee) / step)
    corners = hertz(torch.linspace(0, 1, bins + 2, dtype=torch.float64) * top)
    lower, centre, upper = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    frequencies = torch.linspace(0, sample_rate / 2, window // 2 + 1, dtype=torch.float64)
    rising, falling = (frequencies - lower) / (centre - lower), (upper - frequencies) / (upper - centre)
    return (torch.minimum(rising, falling).clamp_min(0) * 2 / (upper - lower)).float()


def audio_vae_config(path: Path, name: str) -> AudioVAEConfig:
    """Of the VAE in a file: a release's single one, or one of its own.  Raises CheckpointError."""
    return codec_keys.config_in(AudioVAEConfig, path, "audio_vae.", name)


def load_audio_vae(path: Path, *, name: str, device: str, precision: str = "fp32",
                   halves: Sequence[str] = ("decoder",), config: AudioVAEConfig | None = None) -> AudioVAE:
    """In eval mode, from a release's single file or a VAE's own.  The rest as load_video_vae.

    Raises CheckpointError.
    """
    config = config or audio_vae_config(path, name)
    vae = checkpoint.build(lambda: AudioVAE(config, halves), path, *codec_keys.audio_vae_tables(halves), name=name,
                           device=device, precision=precision)
    return channels_last(vae)
