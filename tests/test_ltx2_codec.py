"""LTX-2's video VAE, audio VAE, vocoders and upsampler against the outputs of the release (tests/goldens/README.md)."""

import dataclasses
import math

import pytest
import torch
from golden import Golden, error
from transformers import audio_utils

from dailies.model.ltx2.audio_vae import AudioVAE, audio_vae_config, load_audio_vae, log_mel
from dailies.model.ltx2.codec_config import (
    VIDEO_VAE_2_0,
    VIDEO_VAE_2_3,
    VOCODER_2_0,
    VOCODER_2_3,
    AudioVAEConfig,
    CodecFields,
    UpsamplerConfig,
    VideoVAEConfig,
    VocoderConfig,
)
from dailies.model.ltx2.upsampler import LatentUpsampler
from dailies.model.ltx2.video_vae import VideoVAE, load_video_vae, only
from dailies.model.ltx2.vocoder import load_vocoder, make_vocoder


def case(name):
    golden = Golden(name)
    return golden, golden.folder / "weights.safetensors", CodecFields(golden.config, name)


def check(golden, model, called):
    """Every input through one of `called`, by the start of its name; the outputs are named by those of the case."""
    for name, value in golden.inputs.items():
        kind, _, index = name.partition(".")
        call, output = called[kind]
        with torch.inference_mode():
            got = getattr(model, call)(value)
        assert error(got, golden.outputs[f"{output}.{index}"]) < golden.tolerance["value"]
        yield got


@pytest.mark.parametrize("name, halves", [("ltx2_video_vae_a", ["decoder"]),
                                          ("ltx2_video_vae_b_encode", ["encoder", "decoder"])])
def test_the_video_vae_codes_as_the_release_does(name, halves):
    golden, weights, said = case(name)
    vae = load_video_vae(weights, name=name, device="cpu", precision="fp32", halves=halves,
                         config=VideoVAEConfig.of_header(said))
    assert all(got.dtype == torch.float32 for got in
               check(golden, vae, {"latent": ("decode", "decoded"), "video": ("encode", "encoded")}))
    for i in ("0", "1"):
        if f"conv_in.{i}" in golden.outputs:
            with torch.inference_mode():
                x = vae.decoder.conv_in(vae.denormalise(golden.inputs[f"latent.{i}"]))
                assert error(x, golden.outputs[f"conv_in.{i}"]) < golden.tolerance["value"]
                x = vae.decoder.up_blocks[1](vae.decoder.up_blocks[0](x))
                assert error(x, golden.outputs[f"up_block1.{i}"]) < golden.tolerance["value"]


def test_the_audio_vae_decodes_as_the_release_does():
    golden, weights, said = case("ltx2_audio_vae_a")
    config = AudioVAEConfig.of_header(said)
    vae = load_audio_vae(weights, name="audio", device="cpu", config=config)
    for got, (_, latent) in zip(check(golden, vae, {"latent": ("decode", "mel")}), golden.inputs.items(), strict=True):
        assert got.shape == (1, 2, 4 * latent.shape[2] - 3, config.mel_bins)
    assert dataclasses.replace(audio_vae_config(weights, "audio"), sample_rate=16000) == config      # without a header


def test_the_spectrogram_of_a_sound_is_that_of_another_implementation():
    config = AudioVAEConfig()
    sound = torch.rand(2, 2, 4000, generator=torch.Generator().manual_seed(0)) - 0.5
    sound[1, 1] = 0                                     # the floor
    bank = audio_utils.mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    got = log_mel(sound, config)
    assert got.shape == (2, 2, 26, 64) and got.min() == pytest.approx(math.log(1e-5))
    for ear, mel in zip(sound.flatten(0, 1), got.flatten(0, 1), strict=True):
        want = audio_utils.spectrogram(ear.numpy(), audio_utils.window_function(1024, "hann"), 1024, 160, power=1.0,
                                       pad_mode="reflect", mel_filters=bank, mel_floor=1e-5, log_mel="log")
        assert (mel.T - torch.from_numpy(want)).abs().max() < 1e-4


def test_a_tone_is_loudest_in_its_bin_of_slaneys_scale():
    """200 / 3 Hz a mel up to 1000 Hz, from there 27 mels for a factor of 6.4; 66 corners up to 8000 Hz."""
    config = AudioVAEConfig()
    time = torch.arange(8000) / config.sample_rate
    for place in (15, 20, 30, 45, 62):
        mel = (place + 1) / 65 * (15 + 27 * math.log(8) / math.log(6.4))
        hertz = mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)
        tone = (2 * math.pi * hertz * time).sin().expand(1, 2, -1)
        assert (log_mel(tone, config)[0, :, 10:-10].argmax(-1) == place).all()


@pytest.mark.parametrize("name, rate", [("ltx2_vocoder_a", 24000), ("ltx2_vocoder_b_bwe", 48000)])
def test_the_vocoder_sounds_as_the_release_does(name, rate):
    golden, weights, said = case(name)
    vocoder = load_vocoder(weights, name=name, device="cpu", config=VocoderConfig.of_header(said))
    assert vocoder.sample_rate == rate
    for _ in check(golden, vocoder, {"mel": ("forward", "wave")}):
        pass


@pytest.mark.parametrize("config, half, keys, parameters", [
    (VIDEO_VAE_2_0, "encoder", 94, 694_098_881), (VIDEO_VAE_2_0, "decoder", 92, 528_380_720),
    (VIDEO_VAE_2_3, "encoder", 86, 318_936_897), (VIDEO_VAE_2_3, "decoder", 86, 407_169_072)])
def test_a_video_vae_of_full_size_has_the_tensors_of_the_release(config, half, keys, parameters):
    with torch.device("meta"):
        vae = VideoVAE(only(config, [half]))
    assert (len(vae.state_dict()), sum(p.numel() for p in vae.parameters())) == (keys, parameters)


def test_the_sound_models_of_full_size_have_the_tensors_of_the_release():
    with torch.device("meta"):
        vae, old, new = AudioVAE(AudioVAEConfig(), ["decoder"]), make_vocoder(VOCODER_2_0), make_vocoder(VOCODER_2_3)
    assert len(vae.state_dict()) == 58 and sum(p.numel() for p in vae.parameters()) == 31_915_138
    assert len(old.state_dict()) == 194 and sum(p.numel() for p in old.parameters()) == 55_592_802
    # and the basis for the way back, which is dropped by name
    assert len(new.state_dict()) == 1227 - 1 and sum(p.numel() for p in new.parameters()) == 128_537_448


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_without_a_header_the_tensors_say_what_a_model_is():
    with torch.device("meta"):
        for config in (VIDEO_VAE_2_0, VIDEO_VAE_2_3):
            assert VideoVAEConfig.of_shapes(shapes_of(VideoVAE(config))) == config
            assert VideoVAEConfig.of_shapes(shapes_of(VideoVAE(only(config, ["decoder"])))) == dataclasses.replace(
                only(config, ["decoder"]))
        for config in (VOCODER_2_0, VOCODER_2_3):
            assert VocoderConfig.of_shapes(shapes_of(make_vocoder(config))) == config
        assert AudioVAEConfig.of_shapes(shapes_of(AudioVAE(AudioVAEConfig()))) == AudioVAEConfig()
        for change in (dict(), dict(rational=True), dict(rational=True, scale=1.5), dict(rational=True, scale=4.0),
                       dict(spatial=False, temporal=True), dict(temporal=True)):
            config = UpsamplerConfig(channels=8, width=32, blocks=1, **change)
            assert UpsamplerConfig.of_shapes(shapes_of(LatentUpsampler(config))) == config
