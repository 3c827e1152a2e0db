"""LTX-2's vocoder: log-mel spectrograms to stereo sound. HiFi-GAN in 2.0; BigVGAN and a bandwidth extension from 2.3.

Letters  B clips  C channels  T mel frames  M mel bins  S samples
Source   LTX-2 releases 2.0 to 2.5, Vocoder and VocoderWithBWE; HiFi-GAN (Kong et al. 2020), BigVGAN (Lee et al. 2022).
Module names are those of the released tensors.

Everything is fp32, whatever the rest of the model computes in: bf16 is heard. No layer here is one of those that
`checkpoint.build` lowers.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.model import checkpoint
from dailies.model.ltx2 import codec_keys
from dailies.model.ltx2.codec_config import MEL_FLOOR, GeneratorConfig, VocoderConfig

TAPS = 12                                               # of the filters around an activation
ROLLOFF, ZEROS = 0.99, 6                                # of the resampling: band kept, zero crossings a side


class Generator(nn.Module):
    """Mel frames to samples: upsamplings, behind each the mean of residual blocks that see differently far."""

    def __init__(self, config: GeneratorConfig, *, bounded: bool = True):
        """bounded: its samples are brought into [-1, 1]."""
        super().__init__()
        self.config, self.bounded = config, bounded
        width = config.width
        self.conv_pre = nn.Conv1d(config.channels * config.mel_bins, width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.rates, config.kernels, strict=True):
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, padding=(kernel - rate) // 2))
            width //= 2
            block = AmpBlock if config.anti_aliased else HifiBlock
            self.resblocks.extend(block(width, size, config.dilations) for size in config.block_kernels)
        if config.anti_aliased:
            self.act_post = AntiAliased(width)
        self.conv_post = nn.Conv1d(width, config.channels, 7, padding=3, bias=config.final_bias)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, C, S], S = T times all rates.  mel [B, C, T, M]"""
        x = self.conv_pre(mel.float().transpose(2, 3).flatten(1, 2))            # the ear is slower than the bin
        several = len(self.config.block_kernels)
        for index, up in enumerate(self.ups):
            x = up(x if self.config.anti_aliased else F.leaky_relu(x, 0.1))
            blocks = self.resblocks[several * index:several * (index + 1)]
            x = sum(block(x) for block in blocks) / several
        x = self.conv_post(self.act_post(x) if self.config.anti_aliased else F.leaky_relu(x, 0.01))
        if not self.bounded:
            return x
        return x.tanh() if self.config.final_tanh else x.clamp(-1, 1)


class HifiBlock(nn.Module):
    """x + conv(act(dilated conv(act(x)))), once for each dilation."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1, self.convs2 = _convolutions(channels, kernel, dilations)

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, 0.1)), 0.1))
        return x


class AmpBlock(nn.Module):
    """The same with activations that add no aliases."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]):
        super().__init__()
        self.convs1, self.convs2 = _convolutions(channels, kernel, dilations)
        self.acts1, self.acts2 = (nn.ModuleList(AntiAliased(channels) for _ in dilations) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain, first, second in zip(self.convs1, self.convs2, self.acts1, self.acts2, strict=True):
            x = x + plain(second(dilated(first(x))))
        return x


def _convolutions(channels: int, kernel: int, dilations: tuple[int, ...]) -> tuple[nn.ModuleList, nn.ModuleList]:
    def same(dilation: int) -> nn.Conv1d:
        return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)

    return nn.ModuleList(map(same, dilations)), nn.ModuleList(same(1) for _ in dilations)


class AntiAliased(nn.Module):
    """SnakeBeta at twice the rate: what it makes above the band is filtered off before every second sample is kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.upsample, self.act, self.downsample = Upsample2(), SnakeBeta(channels), Downsample2()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.act(self.upsample(x)))


class SnakeBeta(nn.Module):
    """x + sin^2(x * e^alpha) / (e^beta + 1e-9), alpha and beta per channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        turns, height = self.alpha.exp()[:, None], 1 / (self.beta.exp()[:, None] + 1e-9)
        return x + height * (x * turns).sin().square()


class Upsample2(nn.Module):
    """Twice the samples: zeros between them, then a low-pass filter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filter", kaiser_sinc())

    def forward(self, x: Tensor) -> Tensor:
        channels, beyond = x.shape[1], TAPS // 2 - 1
        x = F.pad(x, (beyond, beyond), mode="replicate")
        y = 2 * F.conv_transpose1d(x, self.filter.expand(channels, -1, -1), stride=2, groups=channels)
        return y[..., 2 * beyond + (TAPS - 2) // 2:-(2 * beyond + (TAPS - 2) // 2)]


class LowPass(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("filter", kaiser_sinc())


class Downsample2(nn.Module):
    """A low-pass filter, then every second sample."""

    def __init__(self):
        super().__init__()
        self.lowpass = LowPass()

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        x = F.pad(x, (TAPS // 2 - 1, TAPS // 2), mode="replicate")
        return F.conv1d(x, self.lowpass.filter.expand(channels, -1, -1), stride=2, groups=channels)


def kaiser_sinc() -> Tensor:
    """A low-pass filter [1, 1, 12] with its edge at half the band, in a Kaiser window; files hold the same."""
    attenuation = 2.285 * (TAPS // 2 - 1) * math.pi * 4 * 0.3 + 7.95            # for a transition of 0.3 a side
    window = torch.kaiser_window(TAPS, periodic=False, beta=0.1102 * (attenuation - 8.7))
    taps = window * torch.sinc(0.5 * (torch.arange(TAPS) - (TAPS - 1) / 2))
    return (taps / taps.sum()).view(1, 1, -1)


class Vocoder(Generator):
    """HiFi-GAN of 2.0."""

    def __init__(self, config: VocoderConfig):
        super().__init__(config.generator)
        self.sample_rate = config.sample_rate


class ExtendedVocoder(nn.Module):
    """BigVGAN of 2.3, and a second generator that adds what is above its band."""

    def __init__(self, config: VocoderConfig):
        super().__init__()
        assert config.extension is not None, "a vocoder without extension is a Vocoder"
        self.sample_rate, self.hop = config.sample_rate, config.hop
        self.ratio = config.sample_rate // config.generator_rate
        self.vocoder = Generator(config.generator)
        self.bwe_generator = Generator(config.extension, bounded=False)
        self.mel_stft = CausalMel(config, config.extension.mel_bins)

    def forward(self, mel: Tensor) -> Tensor:
        """[B, C, S] in [-1, 1] at `sample_rate`.  mel [B, C, T, M]"""
        low = self.vocoder(mel)
        samples = low.shape[-1]
        low = F.pad(low, (0, -samples % self.hop))
        high = self.bwe_generator(self.mel_stft(low)) + resampled(low, self.ratio)
        return high[..., :self.ratio * samples].clamp(-1, 1)


class CausalMel(nn.Module):
    """Log-mel frames of a waveform, each of the samples up to its own; Fourier and mel bases are stored."""

    def __init__(self, config: VocoderConfig, mel_bins: int):
        super().__init__()
        frequencies = config.window // 2 + 1
        self.ahead, self.hop = config.window - config.hop, config.hop
        self.register_buffer("mel_basis", torch.zeros(mel_bins, frequencies))
        self.stft_fn = FourierBasis(frequencies, config.window)

    def forward(self, sound: Tensor) -> Tensor:
        """[B, C, S / hop, M].  sound [B, C, S]"""
        alone = F.pad(sound.flatten(0, 1)[:, None], (self.ahead, 0))
        real, imaginary = F.conv1d(alone, self.stft_fn.forward_basis, stride=self.hop).chunk(2, dim=1)
        mel = self.mel_basis @ (real.square() + imaginary.square()).sqrt()
        return mel.clamp_min(MEL_FLOOR).log().transpose(1, 2).unflatten(0, (-1, sound.shape[1]))


class FourierBasis(nn.Module):
    def __init__(self, frequencies: int, window: int):
        super().__init__()
        self.register_buffer("forward_basis", torch.zeros(2 * frequencies, 1, window))     # real rows, then imaginary


def resampled(sound: Tensor, ratio: int) -> Tensor:
    """[B, C, ratio * S] of sound [B, C, S], by a sinc in a Hann window over six zero crossings a side."""
    channels, beyond = sound.shape[1], math.ceil(ZEROS / ROLLOFF)
    size = 2 * beyond * ratio + 1
    time = (torch.arange(size, device=sound.device, dtype=sound.dtype) / ratio - beyond) * ROLLOFF
    window = (time.clamp(-ZEROS, ZEROS) * math.pi / ZEROS / 2).cos().square()
    taps = (torch.sinc(time) * window * ROLLOFF / ratio).expand(channels, 1, -1)
    y = ratio * F.conv_transpose1d(F.pad(sound, (beyond, beyond), mode="replicate"), taps, stride=ratio,
                                   groups=channels)
    return y[..., 2 * beyond * ratio:ratio - size]


def make_vocoder(config: VocoderConfig) -> Vocoder | ExtendedVocoder:
    return Vocoder(config) if config.extension is None else ExtendedVocoder(config)


def vocoder_config(path: Path, name: str) -> VocoderConfig:
    """Of the vocoder in a file: a release's single one, or that of the audio VAE.  Raises CheckpointError."""
    return codec_keys.config_in(VocoderConfig, path, "vocoder.", name)


def load_vocoder(path: Path, *, name: str, device: str,
                 config: VocoderConfig | None = None) -> Vocoder | ExtendedVocoder:
    """In eval mode and fp32, from a release's single file or an audio VAE's.  Raises CheckpointError."""
    config = config or vocoder_config(path, name)
    return checkpoint.build(lambda: make_vocoder(config), path, *codec_keys.vocoder_tables(), name=name, device=device,
                            precision="fp32")
