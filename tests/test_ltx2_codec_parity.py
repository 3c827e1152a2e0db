"""Random small LTX-2 codecs against diffusers, another implementation: the same weights under its names."""

import random

import pytest
import torch
from golden import error

from dailies.jobs.bench.model import diffusers_ltx_name
from dailies.model.ltx2.audio_vae import AudioVAE
from dailies.model.ltx2.codec_config import (
    AudioVAEConfig,
    GeneratorConfig,
    UpsamplerConfig,
    VideoStage,
    VideoVAEConfig,
    VocoderConfig,
)
from dailies.model.ltx2.upsampler import LatentUpsampler
from dailies.model.ltx2.video_vae import VideoVAE
from dailies.model.ltx2.vocoder import make_vocoder

diffusers = pytest.importorskip("diffusers")
STRIDES = {"spatial": (1, 2, 2), "temporal": (2, 1, 1), "spatiotemporal": (2, 2, 2)}


def randomised(model, seed):
    torch.manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.normal_(0, 0.15)
    return model.requires_grad_(False).eval()


def theirs_with(theirs, ours, name_of):
    """Every tensor of ours in theirs, and none of theirs without one."""
    state = {name_of(name): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs.requires_grad_(False).eval()


@pytest.mark.parametrize("seed", range(3))
def test_the_video_decoder_gives_the_pixels_of_diffusers(seed):
    pick = random.Random(seed)
    new = seed == 1
    kinds = pick.choice([("spatiotemporal", "spatiotemporal", "temporal", "spatial"), ("spatial", "temporal")]) if new \
        else ("spatiotemporal",) * 3
    factors = [pick.choice([1, 2]) for _ in kinds] if new else [2] * 3       # as they are applied
    layers = [pick.choice([1, 2]) for _ in range(len(kinds) + 1)]
    lowest = 32 if new else 64
    widths = [lowest]
    stages = [VideoStage(layers=layers[0])]
    for kind, factor, count in zip(kinds, factors, layers[1:], strict=True):
        stages += [VideoStage(stride=STRIDES[kind], multiplier=factor, residual=not new), VideoStage(layers=count)]
        widths.append(widths[-1] // factor)
    edges = "zeros" if new else "reflect"
    config = VideoVAEConfig(latent_channels=8, decoder_width=lowest, decoder=tuple(stages), decoder_padding=edges)
    vae = randomised(VideoVAE(config), seed)
    made = [width * factor for width, factor in zip(widths[1:], factors, strict=True)]
    theirs = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, decoder_block_out_channels=tuple(reversed(made)),
        block_out_channels=(8, 8, 8, 8), layers_per_block=(1,) * 5, decoder_layers_per_block=tuple(reversed(layers)),
        decoder_spatio_temporal_scaling=(True,) * len(kinds), decoder_inject_noise=(False,) * len(layers),
        upsample_type=kinds, upsample_residual=(not new,) * len(kinds), upsample_factor=tuple(reversed(factors)),
        decoder_spatial_padding_mode=edges, decoder_causal=False)
    del theirs.encoder
    theirs_with(theirs, vae, diffusers_ltx_name)
    latent = torch.randn(1, 8, pick.choice([1, 2, 3]), 2, 3)
    with torch.inference_mode():
        want = theirs.decode(vae.denormalise(latent), return_dict=False)[0]
        assert error(vae.decode(latent), want) < 1e-4


def audio_name(name):
    return {"per_channel_statistics.mean-of-means": "latents_mean",
            "per_channel_statistics.std-of-means": "latents_std"}.get(name, name)


@pytest.mark.parametrize("multipliers, blocks", [((1, 2, 4), 1), ((1, 1, 2), 2)])
def test_the_audio_vae_gives_the_latents_and_spectrograms_of_diffusers(multipliers, blocks):
    config = AudioVAEConfig(width=16, multipliers=multipliers, blocks=blocks, latent_channels=4, mel_bins=16)
    vae = randomised(AudioVAE(config), blocks)
    theirs = theirs_with(diffusers.AutoencoderKLLTX2Audio(
        base_channels=16, ch_mult=multipliers, num_res_blocks=blocks, latent_channels=4, mel_bins=16, resolution=32,
        norm_type="pixel", causality_axis="height", mid_block_add_attention=False), vae, audio_name)
    mean, std = vae.statistics()
    with torch.inference_mode():
        for frames, steps in ((17, 5), (20, 5), (21, 6)):
            mel = torch.randn(1, 2, frames, 16)
            got = vae.encode(mel)
            assert got.shape == (1, 4, steps, 4)
            assert error(got * std + mean, theirs.encode(mel).latent_dist.mode()) < 1e-4
        latent = torch.randn(1, 4, 5, 4)
        want = theirs.decode(latent * std + mean, return_dict=False)[0]
        assert error(vae.decode(latent), want) < 1e-4 and want.shape == (1, 2, 17, 16)


def vocoder_name(name):
    for old, new in (("resblocks.", "resnets."), ("ups.", "upsamplers."), ("conv_pre.", "conv_in."),
                     ("conv_post.", "conv_out."), ("act_post.", "act_out."), ("downsample.lowpass.", "downsample.")):
        parts = name.split(old)
        # "ups." is also within words
        name = new.join(parts) if old != "ups." or name.startswith("ups.") or ".ups." in name else name
    return name


def test_the_vocoders_give_the_sound_of_diffusers():
    plain = VocoderConfig(generator=GeneratorConfig(width=32, rates=(3, 2), kernels=(7, 4), block_kernels=(3, 7)))
    ours = randomised(make_vocoder(plain), 0)
    theirs = theirs_with(diffusers.pipelines.ltx2.LTX2Vocoder(
        hidden_channels=32, upsample_kernel_sizes=[7, 4], upsample_factors=[3, 2], resnet_kernel_sizes=[3, 7],
        resnet_dilations=[[1, 3, 5]] * 2), ours, vocoder_name)
    mel = torch.randn(1, 2, 9, 64)
    with torch.inference_mode():
        assert error(ours(mel), theirs(mel)) < 1e-4



def test_the_vocoder_that_extends_the_band_gives_the_sound_of_diffusers():
    said = dict(width=32, rates=(5, 2), kernels=(11, 4), block_kernels=(3, 7), anti_aliased=True, final_tanh=False,
                final_bias=False)
    config = VocoderConfig(generator=GeneratorConfig(**said),
                           extension=GeneratorConfig(**said | dict(rates=(6, 5), kernels=(12, 11))),
                           generator_rate=16000, sample_rate=48000, hop=10, window=32)
    ours = randomised(make_vocoder(config), 0)
    sizes = dict(hidden_channels=32, resnet_kernel_sizes=[3, 7], resnet_dilations=[[1, 3, 5]] * 2)
    theirs = diffusers.pipelines.ltx2.vocoder.LTX2VocoderWithBWE(
        **sizes, **{f"bwe_{name}": value for name, value in sizes.items()}, final_act_fn="clamp",
        upsample_kernel_sizes=[11, 4], upsample_factors=[5, 2], bwe_upsample_kernel_sizes=[12, 11],
        bwe_upsample_factors=[6, 5], filter_length=32, window_length=32, hop_length=10)
    del theirs.mel_stft.stft_fn.inverse_basis           # the way back, which is not gone
    theirs_with(theirs, ours, vocoder_name)
    mel = torch.randn(1, 2, 9, 64)
    with torch.inference_mode():
        got, want = ours(mel), theirs(mel)
    assert got.shape == want.shape == (1, 2, 270) and error(got, want) < 1e-4
    assert (got.abs() < 1).float().mean() > 0.05, "or else the clamp is all there is"



@pytest.mark.parametrize("change, said", [
    (dict(), dict(use_rational_resampler=False)), (dict(rational=True, scale=1.5), dict(rational_spatial_scale=1.5)),
    (dict(rational=True), dict()), (dict(temporal=True), dict(temporal_upsample=True)),
    (dict(spatial=False, temporal=True), dict(spatial_upsample=False, temporal_upsample=True))])
def test_the_upsampler_gives_the_latents_of_diffusers(change, said):
    ours = randomised(LatentUpsampler(UpsamplerConfig(channels=8, width=32, blocks=1, **change)), 1)
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
    theirs = LTX2LatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1, **said)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"upsampler.blur_down.kernel"}
    latent = torch.randn(1, 8, 3, 4, 6)
    with torch.inference_mode():
        assert error(ours(latent), theirs.eval()(latent)) < 1e-4
