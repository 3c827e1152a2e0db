"""What turns the clips of the demo with sound into latents and back: a video VAE, an audio VAE and a vocoder in the
layouts of LTX-2, small, each trained from nothing on what `world_av.py` draws and rings.

The latents are bound by noise and by a penalty on their size, as a VAE with one fixed deviation has them.
"""

import math
import random
from pathlib import Path

import torch
from torch import Tensor

from dailies.jobs.demo.losses import KL_WEIGHT, weighted_errors
from dailies.jobs.demo.phases import CLIP_FRAMES, SEED, Phase, fit, rng_of
from dailies.jobs.demo.world import FPS
from dailies.jobs.demo.world_av import AUDIO_RATE, PITCHES, Bounce, tone
from dailies.model.convolution import channels_last
from dailies.model.ltx2.audio_vae import AudioVAE, log_mel
from dailies.model.ltx2.codec_config import (
    STRIDES,
    AudioVAEConfig,
    GeneratorConfig,
    VideoStage,
    VideoVAEConfig,
    VocoderConfig,
)
from dailies.model.ltx2.video_vae import ChannelStatistics, VideoVAE
from dailies.model.ltx2.vocoder import Vocoder


def one_block() -> VideoStage:
    return VideoStage(layers=1)


def halving(kind: str, multiplier: int) -> VideoStage:
    return VideoStage(stride=STRIDES[kind], multiplier=multiplier)


VIDEO = VideoVAEConfig(
    latent_channels=32, encoder_width=32, decoder_width=64,
    encoder=(halving("time", 1), one_block(), halving("all", 2), one_block(), halving("all", 1), one_block(),
             halving("space", 1), one_block()),
    decoder=(one_block(), halving("space", 1), one_block(), halving("all", 2), one_block(), halving("all", 1),
             one_block(), halving("time", 1)))
AUDIO = AudioVAEConfig(width=16, multipliers=(1, 2, 2), blocks=1, latent_channels=2)
VOCODER = VocoderConfig(generator=GeneratorConfig(width=96, block_kernels=(3,), dilations=(1, 3)))

SOUND_STEPS = round(CLIP_FRAMES / FPS * 25)             # latents of a clip's sound, 25 a second
LATENT_NOISE = 0.3                                      # deviation, of latents that are about 1 across the data
LATENTS_MEASURED = 256                                  # clips whose latents the statistics are of


# The video VAE: pictures first, then longer and longer windows.

VIDEO_PHASE = Phase(name="video", steps=3000, lr=2.5e-3, ema=0.995)
PICTURES_FIRST = 400
WINDOWS = {1: 48, 9: 16, 17: 10, 25: 8, 49: 4}          # frames of a window -> windows in a batch
MOSTLY = (9, 17, 25, 1, 17, 9, 49, 25)


def window_of(step: int) -> int:
    if step < PICTURES_FIRST:
        return 1 if step % 4 else 9
    return MOSTLY[step % len(MOSTLY)]


def drawn(rng: random.Random, count: int, frames: int) -> tuple[Tensor, Tensor]:
    """Windows [B, 3, F, 64, 64] of clips that training may see, and coverage [B, F, 64, 64]."""
    videos, covers = [], []
    for _ in range(count):
        video, cover = Bounce.draw(rng).pictures(frames, begin=rng.randint(0, CLIP_FRAMES - frames))
        videos.append(video)
        covers.append(cover)
    return torch.stack(videos), torch.stack(covers)


def bound(mean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Latents with noise, and what they cost."""
    return mean + LATENT_NOISE * noise, KL_WEIGHT * 0.5 * mean.float().square().mean()


def train_video_vae(work: Path, device: str) -> VideoVAE:
    torch.manual_seed(SEED)
    vae = channels_last(VideoVAE(VIDEO)).to(device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        frames, rng = window_of(step), rng_of("video", step)
        video, cover = (x.to(device) for x in drawn(rng, WINDOWS[frames], frames))
        with torch.autocast(device, torch.bfloat16):
            mean = vae.encoder(video)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62))).to(device)
            latent, penalty = bound(mean, noise)
            shown = vae.decoder(latent)
        error = shown.float() - video
        loss = weighted_errors(error, cover, squares=1).mean()
        with torch.no_grad():
            inside = (cover > 0.5)[:, None].expand_as(error)
            seen = dict(frames=frames, psnr=10 * torch.log10(4 / error.square().mean()).item(),
                        shape_psnr=10 * torch.log10(4 / error[inside].square().mean()).item(), std=mean.std().item())
        return loss + penalty, seen

    fit(VIDEO_PHASE, vae, loss_of, work)
    with torch.no_grad():
        rng = rng_of("video statistics", 0)
        latents = [vae.encoder(Bounce.draw(rng).pictures()[0][None].to(device)) for _ in range(LATENTS_MEASURED)]
        keep_statistics(vae.per_channel_statistics, torch.cat(latents).movedim(1, 0).flatten(1))
    return vae.eval()


def keep_statistics(statistics: ChannelStatistics, values: Tensor) -> None:
    """values: [channels, all of them]"""
    statistics.mean.copy_(values.mean(1))
    statistics.std.copy_(values.std(1))


# The audio VAE: log-mel spectrograms of tones, and of silence.

AUDIO_PHASE = Phase(name="audio", steps=400, lr=2e-3, ema=0.995)
AUDIO_BATCH, SILENT = 12, 0.1
AUDIO_WINDOW_S = 0.645                                  # 65 mel frames
MEL_CENTRE, MEL_SPREAD = -6.0, 4.0                      # of the log-mels: what the loss is measured by


def rung(rng: random.Random, count: int, seconds: float, rate: int) -> Tensor:
    """Sounds [B, 2, samples]: a tone each, or nothing; at two rates the same of one state of rng."""
    samples = round(seconds * rate)
    return torch.stack([tone(rng.choice(list(PITCHES.values())), 0.0 if rng.random() < SILENT else
                             0.12 + 0.5 * rng.random(), seconds * (1.2 * rng.random() - 0.15), samples, rate)
                        for _ in range(count)])


def train_audio_vae(work: Path, device: str) -> AudioVAE:
    torch.manual_seed(SEED)
    vae = channels_last(AudioVAE(AUDIO)).to(device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of("audio", step)
        mel = log_mel(rung(rng, AUDIO_BATCH, AUDIO_WINDOW_S, AUDIO.sample_rate).to(device), AUDIO)
        mel = mel[:, :, :(mel.shape[2] - 1) // 4 * 4 + 1]                       # 4n + 1 frames, as they come back
        with torch.autocast(device, torch.bfloat16):
            mean = vae.encoder(mel / MEL_SPREAD)              # not centred: beyond the edges is 0
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(rng.getrandbits(62))).to(device)
            latent, penalty = bound(mean, noise)
            decoded = vae.decoder(latent)
        error = decoded.float() * MEL_SPREAD + MEL_CENTRE - mel
        loud = 1 + 4 * (mel > -9)
        return ((loud * error.abs()).mean() / MEL_SPREAD + penalty,
                dict(error=error.abs().mean().item(), loud=error.abs()[mel > -9].mean().item(), std=mean.std().item()))

    fit(AUDIO_PHASE, vae, loss_of, work)
    with torch.no_grad():
        fold_scale(vae)
        rng = rng_of("audio statistics", 0)
        mel = log_mel(rung(rng, LATENTS_MEASURED, CLIP_FRAMES / FPS, AUDIO.sample_rate).to(device), AUDIO)
        latents = vae.encoder(mel)                                              # [B, z, A, K]
        keep_statistics(vae.per_channel_statistics, latents.permute(1, 3, 0, 2).flatten(2).flatten(0, 1))
    return vae.eval()


def fold_scale(vae: AudioVAE) -> None:
    """Put the centre and spread that it was trained with into its first and last convolutions: it takes and gives
    log-mels as they are. A centre could not be put into the first: its zeros beyond the edges would be another mel.
    """
    first, last = vae.encoder.conv_in.conv, vae.decoder.conv_out.conv
    first.weight /= MEL_SPREAD
    last.weight *= MEL_SPREAD
    last.bias.mul_(MEL_SPREAD).add_(MEL_CENTRE)


# The vocoder: of spectrograms as they are, and as the audio VAE gives them back.

VOCODER_PHASE = Phase(name="vocoder", steps=4000, lr=1.5e-3, ema=0.995)
VOCODER_BATCH, VOCODER_FRAMES = 5, 41
EDGE = 64                                               # samples at either end: zeros beyond it click in silence
SPECTRA = (256, 1024)                                   # windows, in samples, by which loudness is compared


def train_vocoder(work: Path, device: str, vae: AudioVAE) -> Vocoder:
    torch.manual_seed(SEED)
    vocoder = Vocoder(VOCODER).to(device)
    seconds = VOCODER_FRAMES / 100

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        low, high = (rung(rng_of("vocoder", step), VOCODER_BATCH, seconds, rate).to(device)
                     for rate in (AUDIO.sample_rate, AUDIO_RATE))
        with torch.no_grad():
            mel = log_mel(low, AUDIO)[:, :, :VOCODER_FRAMES]
            if step % 2:
                latent = vae.encode(mel)
                mel = vae.decode(latent + 0.1 * torch.randn_like(latent))
        made = vocoder(mel)[..., :high.shape[-1]]
        wanted = high[..., :made.shape[-1]]
        apart, spectral = (made - wanted).abs(), torch.zeros((), device=device)
        clicks = apart * (wanted == 0)
        loss = 10 * apart.mean() + 400 * (clicks[..., :EDGE].mean() + clicks[..., -EDGE:].mean())
        for size in SPECTRA:
            window = torch.hann_window(size, device=device)
            got, want = (torch.stft(x.flatten(0, 1), size, size // 4, window=window, return_complex=True).abs()
                         for x in (made, wanted))
            spectral = spectral + (got - want).abs().mean() / math.sqrt(size)
        with torch.no_grad():
            snr = 10 * torch.log10(wanted.square().mean() / (made - wanted).square().mean().clamp_min(1e-12))
        return loss + spectral, dict(snr=snr.item(), spectral=spectral.item())

    fit(VOCODER_PHASE, vocoder, loss_of, work)
    return vocoder.eval()
