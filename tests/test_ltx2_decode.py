"""LTX-2's decoder: tiles that show no seam, pictures and sound of a clip, and what it says when memory is short."""

import pytest
import torch
from golden import error

from dailies.actors.recompress import recompressed
from dailies.kernels import processor
from dailies.model.convolution import channels_last
from dailies.model.family import NonFiniteFrames, NonFiniteSound
from dailies.model.ltx2 import decoder as ltx2_decoder
from dailies.model.ltx2.audio_vae import AudioVAE
from dailies.model.ltx2.codec_config import AudioVAEConfig, GeneratorConfig, VideoStage, VideoVAEConfig, VocoderConfig
from dailies.model.ltx2.decoder import LtxDecoder
from dailies.model.ltx2.vae_tiles import (
    Span,
    TileSize,
    bytes_needed,
    decode_groups,
    release_tile,
    side_weights,
    smaller_tiles,
    spans,
    tile_within,
    time_weights,
)
from dailies.model.ltx2.video_vae import DepthToSpace, PaddedConv, VideoVAE
from dailies.model.ltx2.vocoder import make_vocoder
from dailies.model.ltx2.winograd import convolve_in_groups
from dailies.model.shapes import VideoShape


def layout(*changes, **said):
    """A small VAE: a residual block before, between and behind the changes of size."""
    stages = [VideoStage(layers=1)]
    for stride, multiplier, residual in changes:
        stages += [VideoStage(stride=stride, multiplier=multiplier, residual=residual), VideoStage(layers=1)]
    return VideoVAEConfig(**dict(latent_channels=8, decoder_width=16, decoder=tuple(stages)) | said)


ALL, TIME, SPACE = (2, 2, 2), (2, 1, 1), (1, 2, 2)
OLD = layout(*[(ALL, 2, True)] * 3, decoder_width=32, decoder_padding="reflect")              # as 2.0
NEW = layout((ALL, 2, False), (ALL, 1, False), (TIME, 2, False), (SPACE, 2, False))         # as 2.3


def decoder_of(config, seed=0):
    """Random, but as a trained decoder treats smooth content: a cell's pixels are alike, residual blocks add little."""
    torch.manual_seed(seed)
    vae = VideoVAE(config).requires_grad_(False).eval()
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.mul_(0.1)
    for name, module in vae.named_modules():
        if isinstance(module, (PaddedConv, DepthToSpace)) and "res_blocks" not in name and not name.endswith("conv"):
            conv = module.conv.conv if isinstance(module, DepthToSpace) else module.conv
            cells = torch.Size(module.stride).numel() if isinstance(module, DepthToSpace) else (
                config.patch ** 2 if name.endswith("conv_out") else 1)
            out, seen = conv.weight.shape[:2]
            conv.weight[:, :, 1, 1, 1] += (torch.randn(out // cells, seen) / seen ** 0.5).repeat_interleave(cells, 0)
            conv.bias.zero_()
    return channels_last(vae)


def smooth_latent(steps, height, width, seed=3):
    few = torch.randn(1, 8, 3, 3, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(few, size=(steps, height, width), mode="trilinear", align_corners=True)


def test_the_release_s_worked_example_of_17_steps():
    first, last = spans(17, 10, 3, in_time=True)
    assert (first, last) == (Span(0, 10, 0, 3), Span(6, 17, 4, 0))
    early, late = time_weights(first, 8), time_weights(last, 8)
    assert (len(early), len(late)) == (73, 81)
    assert torch.allclose(torch.stack((early[48:50], late[:2])), torch.tensor([[1, 24 / 25], [0, 1 / 25]]))
    assert torch.allclose(early[48:] + late[:25], torch.ones(25))


@pytest.mark.parametrize("size, overlap", [(24, 2), (14, 2), (8, 2), (3, 1), (2, 1)])
def test_weights_of_a_side_s_tiles_add_up_to_one(size, overlap):
    for length in range(size, 4 * size):
        total, tiles = torch.zeros(32 * length), spans(length, size, overlap)
        for span in tiles:
            total[32 * span.start:32 * span.stop] += side_weights(span, 32)
        assert torch.allclose(total, torch.ones_like(total)) and max(s.stop - s.start for s in tiles) <= size


@pytest.mark.parametrize("size", [5, 6, 7, 10])
def test_weights_of_steps_add_up_to_one(size):
    for length in range(size, 4 * size):
        total = torch.zeros(8 * length - 7)
        for span in spans(length, size, min(3, (size - 1) // 2), in_time=True):
            total[8 * span.start:8 * span.stop - 7] += time_weights(span, 8)
        assert torch.allclose(total, torch.ones_like(total))


@pytest.mark.parametrize("config", [OLD, NEW], ids=["2.0", "2.3"])
def test_tiles_show_no_seam(config):
    vae, latent = decoder_of(config), smooth_latent(7, 9, 10)
    with torch.inference_mode():
        whole = vae.decode(latent)
        span = whole.max() - whole.min()
        for size in (TileSize(steps=5, height=9, width=10), TileSize(steps=7, height=7, width=7)):
            at, parts = zip(*decode_groups(vae, latent, size), strict=True)
            assert list(at) == [sum(part.shape[2] for part in parts[:n]) for n in range(len(parts))]
            tiled = torch.cat(parts, dim=2)
            assert tiled.shape == whole.shape == (1, 3, 49, 288, 320)
            assert 10 * torch.log10(span.square() / (tiled - whole).square().mean()) >= 40
        (_, same), = decode_groups(vae, latent, release_tile(9, 10, 7))       # no larger than a tile: not touched
        assert torch.equal(same, whole)


def test_a_video_of_another_size_is_not_encoded():
    vae = VideoVAE(VideoVAEConfig(latent_channels=8, encoder_width=8, encoder=tuple(
        VideoStage(stride=stride) for stride in (SPACE, TIME, ALL, ALL))))
    with pytest.raises(ValueError, match=r"8n \+ 1 frames and sides that are multiples of 32; got 8 frames of 32x48"):
        vae.encode(torch.zeros(1, 3, 8, 32, 48))


def test_tiles_get_smaller_with_the_memory():
    vae = decoder_of(NEW)
    sizes = smaller_tiles(34, 60, 16)
    assert sizes[0] == release_tile(34, 60, 16) == TileSize(steps=10, height=14, width=24)
    needs = [bytes_needed(vae, size, 34, 60) for size in sizes]
    assert needs == sorted(needs, reverse=True) and len(set(sizes)) == len(sizes)
    for size, need in zip(sizes, needs, strict=True):
        assert tile_within(need, vae, 34, 60, 16) == size
    assert tile_within(0, vae, 34, 60, 16) == sizes[-1]
    assert tile_within(1 << 60, vae, 34, 60, 16, below=sizes[0]) == sizes[1]
    assert release_tile(4, 6, 3) == TileSize(steps=3, height=4, width=6)


@pytest.mark.parametrize("front", [1, 2])
@pytest.mark.parametrize("edges", ["zeros", "reflect"])
def test_frames_in_groups_give_what_the_convolution_gives(edges, front):
    torch.manual_seed(0)
    conv = channels_last(PaddedConv(6, 5, edges, causal=front == 2).requires_grad_(False))
    for frames in (1, 2, 3, 4, 5, 6, 7, 9, 13):
        x = torch.randn(2, 6, frames, 5, 7)
        want = conv.conv(conv.padded(x))
        rim = 1 if edges == "reflect" else 0
        assert error(convolve_in_groups(conv.conv, conv.window(x, False, rim), front), want) < 1e-5
        assert error(conv.multiplied(conv.window(x, False, 1)), want) < 1e-5
        assert error(conv(x), want) < 1e-5


@pytest.mark.skipif(not processor.has_bf16_products(), reason="needs a processor with products of bf16 numbers")
def test_a_convolution_in_bf16_by_channels_gives_what_the_whole_gives(monkeypatch):
    torch.manual_seed(0)
    conv = channels_last(PaddedConv(512, 8, "zeros").requires_grad_(False).to(torch.bfloat16))
    x = torch.randn(1, 512, 2, 16, 17, dtype=torch.bfloat16)
    parts = []
    product = torch.mkldnn_convolution
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda x, *given: parts.append(x) or product(x, *given))
    results = []
    for tiles in (False, True):
        monkeypatch.setattr(processor, "has_bf16_tiles", lambda tiles=tiles: tiles)
        results.append(conv(x).float())
    assert [part.shape[1] for part in parts] == [512, 256, 256]
    want = conv.float()(x.float())
    assert all(error(result, want) < 0.004 for result in results)      # bf16 rounds to 1 in 256


AUDIO = AudioVAEConfig(width=8, multipliers=(1, 2, 2), blocks=1)
VOICE = VocoderConfig(generator=GeneratorConfig(width=16, rates=(6, 5, 4, 2), kernels=(16, 15, 8, 4),
                                                block_kernels=(3, 7)))


def clip(frames, steps=2):
    generator = torch.Generator().manual_seed(5)
    return {"video": torch.randn(8, steps, 2, 3, generator=generator),
            "audio": torch.randn(8, 9, 16, generator=generator)}, VideoShape(frames=frames, height=64, width=96)


def whole_decoder(**changes):
    torch.manual_seed(0)
    parts = dict(video_vae=decoder_of(NEW), audio_vae=AudioVAE(AUDIO, ["decoder"]).requires_grad_(False),
                 vocoder=make_vocoder(VOICE).requires_grad_(False))
    return LtxDecoder(**parts | changes, device="cpu")


def test_a_clip_becomes_pictures_and_sound():
    decoder, (streams, shape) = whole_decoder(), clip(9)
    made = decoder(streams, shape, 1 << 30)
    assert made.rgb.shape == (9, 64, 96, 3) and made.rgb.dtype == torch.uint8 and made.notes == ()
    # 4 * 9 - 3 mel frames of 240 samples
    assert made.audio.shape == (33 * 240, 2) and made.audio.abs().max() <= 1 and decoder.sample_rate == 24000
    silent = whole_decoder(audio_vae=None, vocoder=None)
    picture = silent({"video": streams["video"]}, shape, 1 << 30)
    assert picture.audio is None and silent.sample_rate is None and torch.equal(picture.rgb, made.rgb)
    with pytest.raises(ValueError, match="loaded without sound"):
        silent(streams, shape, 1 << 30)


def test_numbers_that_are_none_are_found():
    decoder, (streams, shape) = whole_decoder(), clip(9)
    for name, error_type in (("video", NonFiniteFrames), ("audio", NonFiniteSound)):
        bad = {key: value.clone() for key, value in streams.items()}
        bad[name][0, 0, 0] = torch.nan
        with pytest.raises(error_type, match="NaN or infinity"):
            decoder(bad, shape, 1 << 30)


def test_smaller_tiles_are_told(monkeypatch):
    decoder = whole_decoder()
    latent, shape = smooth_latent(3, 4, 12), VideoShape(frames=17, height=128, width=384)
    rgb, notes = decoder.pictures(latent, shape, 0)
    assert "decoded in tiles of 256x96, 24 frames at a time: there was no memory" in notes[0]
    usual, said = decoder.pictures(latent, shape, 1 << 40)
    assert said == () and (rgb.float() - usual.float()).square().mean() < 255 ** 2 / 1e4        # 40 dB
    calls = []

    def short_of_memory(vae, latent, size):
        calls.append(size)
        if len(calls) < 2:
            raise torch.OutOfMemoryError
        yield from decode_groups(vae, latent, size)

    monkeypatch.setattr(ltx2_decoder, "decode_groups", short_of_memory)
    again, notes = decoder.pictures(latent, shape, 1 << 40)
    assert len(calls) == 2 and notes and again.shape == usual.shape


def test_an_image_goes_once_through_h264():
    ramp = torch.linspace(-1, 1, 96)
    noise = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(0)) / 4
    image = (ramp.expand(3, 64, 96) + noise).clamp(-1, 1)
    rough, fine = recompressed(image, 33), recompressed(image, 18)
    assert rough.shape == image.shape and rough.dtype == torch.float32 and rough.abs().max() <= 1
    # noise is lost, the ramp is not; a lower rate factor keeps more
    assert 0.05 < (fine - image).abs().mean() < (rough - image).abs().mean() < 0.25
    assert (rough.mean((0, 1)) - ramp).abs().mean() < 0.1
    assert torch.equal(rough, recompressed(image, 33))
    with pytest.raises(ValueError, match="must be even; got 95x64"):
        recompressed(image[:, :, :95], 33)
