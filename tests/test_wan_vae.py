"""The Wan VAE against its release, and a clip in chunks against the same clip whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden import Golden, error
from model import checkpoint, keys
from model.wan_vae import WanVAE, WanVAEConfig, channels_last, fades, tile_starts

CASES = [("wan_vae_a", "weights"), ("wan_vae_b_diffusers", "weights"), ("wan_vae_b_diffusers", "weights_diffusers")]


def build(golden, weights):
    path = golden.folder / f"{weights}.safetensors"
    return checkpoint.build(lambda: WanVAE(WanVAEConfig(width=golden.config["dim"])), path, keys.WAN_VAE,
                            keys.WAN_VAE_DIFFUSERS, name="golden", device="cpu", precision="fp32")


@pytest.mark.parametrize("case, weights", CASES)
@pytest.mark.parametrize("layout, chunk", [("plain", None), ("plain", 1), ("channels_last", 2), ("channels_last", 3)])
def test_coding_equals_the_release_in_either_key_layout_and_any_chunk(case, weights, layout, chunk):
    golden = Golden(case)
    vae, allowed = build(golden, weights), golden.tolerance["value"]
    if layout == "channels_last":
        channels_last(vae)
    mean, std = (torch.tensor(golden.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    checked = 0
    for name, given_ in golden.inputs.items():
        kind, steps = name.split(".")
        if kind == "z":
            assert error(vae.decode(given_ * std + mean, chunk=chunk), golden.outputs[f"decoded.{steps}"]) < allowed
            if f"decoded_unnormalised.{steps}" in golden.outputs:
                assert error(vae.decode(given_, chunk=chunk), golden.outputs[f"decoded_unnormalised.{steps}"]) < allowed
        else:
            latent, _ = vae.encode(given_, chunk=chunk)
            assert error(latent, golden.outputs[f"encoded_unnormalised.{steps}"]) < allowed
            assert error((latent - mean) / std, golden.outputs[f"encoded.{steps}"]) < allowed
        checked += 1
    assert checked == 6


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_a_chunked_clip_equals_the_whole_clip_for_any_config(data):
    halve_time = tuple(data.draw(st.lists(st.booleans(), min_size=1, max_size=3)))
    multipliers = tuple(data.draw(st.sampled_from([1, 2])) for _ in range(len(halve_time) + 1))
    config = WanVAEConfig(width=data.draw(st.sampled_from([2, 4])), res_blocks=data.draw(st.integers(1, 2)),
                          halve_time=halve_time, multipliers=multipliers,
                          latent_channels=data.draw(st.sampled_from([3, 8])))
    steps, chunk = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    vae = WanVAE(config)
    latent = torch.randn(2, config.latent_channels, steps, 2, 3)
    video = torch.randn(2, 3, config.time_stride * (steps - 1) + 1, 2 * config.space_stride, config.space_stride)
    with torch.no_grad():
        assert vae.decode(latent).shape == (2, 3, video.shape[2], 2 * config.space_stride, 3 * config.space_stride)
        assert error(vae.decode(latent, chunk=chunk), vae.decode(latent)) < 1e-4        # the order of sums differs
        assert error(vae.encode(video, chunk=chunk)[0], vae.encode(video)[0]) < 1e-4


def test_no_frame_depends_on_a_later_one():
    torch.manual_seed(0)
    vae = WanVAE(WanVAEConfig(width=4, res_blocks=1))
    latent = torch.randn(1, 16, 5, 2, 2)
    with torch.no_grad():
        assert error(vae.decode(latent[:, :, :3]), vae.decode(latent)[:, :, :9]) < 1e-5


@pytest.mark.parametrize("frames, height", [(4, 16), (5, 12)])
def test_a_clip_that_cannot_be_coded_is_refused(frames, height):
    with pytest.raises(ValueError, match="4n \\+ 1 frames and sides that are multiples of 8"):
        WanVAE(WanVAEConfig(width=2)).encode(torch.zeros(1, 3, frames, height, 16))


def test_bf16_stays_near_fp32():
    golden = Golden("wan_vae_a")
    fp32 = build(golden, "weights")
    bf16 = checkpoint.build(lambda: WanVAE(WanVAEConfig(width=3)), golden.folder / "weights.safetensors", keys.WAN_VAE,
                            name="golden", device="cpu", precision="bf16")
    assert bf16.decoder.conv_in.weight.dtype == torch.bfloat16
    latent = golden.inputs["z.5"]
    got, want = bf16.decode(latent.bfloat16()).float(), fp32.decode(latent)
    assert ((got - want).norm() / want.norm()).item() < 0.05


@pytest.mark.parametrize("side, tile, overlap, starts", [
    (8, 8, 2, [0]), (5, 8, 2, [0]), (9, 8, 2, [0, 1]), (14, 8, 2, [0, 6]), (15, 8, 2, [0, 6, 7]), (40, 16, 8, [0, 8, 16, 24])])
def test_tiles_cover_a_side_and_end_with_it(side, tile, overlap, starts):
    assert tile_starts(side, tile, overlap) == starts
    covered = torch.zeros(side)
    for start in starts:
        covered[start:start + tile] += 1
    assert covered.min() >= 1 and starts[-1] + min(tile, side) == side


def test_a_tile_fades_in_a_straight_line_while_its_neighbour_rises():
    fade = fades(8, 2, 8, torch.zeros(1))
    assert len(fade) == 64 and fade.min() > 0 and torch.equal(fade, fade.flip(0))
    assert torch.allclose(fade[-16:] + fade[:16], torch.ones(16)) and torch.equal(fade[16:-16], torch.ones(32))


@pytest.fixture(scope="module")
def smooth():
    """A VAE with random weights, a latent without edges, and the pixels of it whole."""
    torch.manual_seed(4)
    vae = WanVAE(WanVAEConfig(width=8)).requires_grad_(False)
    latent = torch.nn.functional.interpolate(torch.randn(1, 16, 2, 3, 4), size=(2, 20, 28), mode="trilinear")
    return vae, latent, vae.decode(latent)


@pytest.mark.parametrize("chunk", [None, 1])
def test_one_tile_as_large_as_the_picture_is_the_whole_picture(smooth, chunk):
    vae, latent, whole = smooth
    tiled = torch.cat(list(vae.decode_tiles(latent, tile=28, overlap=4, chunk=chunk)), dim=2)
    assert error(tiled, whole) < 1e-4


def test_where_no_cell_sees_its_neighbours_tiles_are_the_whole_picture(smooth):
    """Then nothing is left of a tile's edge but the blending."""
    _, latent, _ = smooth
    torch.manual_seed(5)
    vae = WanVAE(WanVAEConfig(width=4)).requires_grad_(False)
    for name, weight in vae.decoder.named_parameters():
        if weight.ndim >= 4 and weight.shape[-1] == 3:
            weight[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
        if ".proj." in name:
            weight.zero_()                              # of the attention
    tiled = torch.cat(list(vae.decode_tiles(latent, tile=9, overlap=3)), dim=2)
    assert error(tiled, vae.decode(latent)) < 1e-4


def test_tiles_show_no_seam(smooth):
    """Random weights see far, so a tile is not the whole; but what differs must not jump."""
    vae, latent, whole = smooth
    tiled = torch.cat(list(vae.decode_tiles(latent, tile=14, overlap=6)), dim=2)
    assert tiled.shape == whole.shape
    off = tiled - whole
    for dim, starts, tile in ((3, tile_starts(20, 14, 6), 14), (4, tile_starts(28, 14, 6), 14)):
        step = off.diff(dim=dim).abs().mean(dim=[d for d in range(5) if d != dim])
        edges = [8 * edge - 1 for start in starts for edge in (start, start + tile) if 0 < edge < off.shape[dim] // 8]
        assert edges and max(step[edge] for edge in edges) < 3 * step.mean()


def test_an_overlap_of_more_than_half_a_tile_is_refused(smooth):
    vae, latent, _ = smooth
    for overlap in (0, 8):
        with pytest.raises(ValueError, match=f"at most half of tile 14; got {overlap}"):
            next(vae.decode_tiles(latent, tile=14, overlap=overlap))
