"""The Wan VAE against its release, and a clip in chunks, bands and slabs against the same clip whole."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, error
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import Launches
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dailies.kernels import processor
from dailies.model import checkpoint
from dailies.model.convolution import channels_last
from dailies.model.layers import compute_in
from dailies.model.wan import keys as wan_keys
from dailies.model.wan import vae as wan_vae
from dailies.model.wan.vae import Band, Memory, WanVAE, WanVAEConfig

CASES = [("wan_vae_a", "weights"), ("wan_vae_b_diffusers", "weights"), ("wan_vae_b_diffusers", "weights_diffusers")]


def build(golden, weights):
    path = golden.folder / f"{weights}.safetensors"
    return checkpoint.build(lambda: WanVAE(WanVAEConfig(width=golden.config["dim"])), path, wan_keys.WAN_VAE,
                            wan_keys.WAN_VAE_DIFFUSERS, name="golden", device="cpu", precision="fp32")


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
def test_a_clip_in_pieces_equals_the_whole_clip_for_any_config(data):
    halve_time = tuple(data.draw(st.lists(st.booleans(), min_size=1, max_size=3)))
    multipliers = tuple(data.draw(st.sampled_from([1, 2])) for _ in range(len(halve_time) + 1))
    config = WanVAEConfig(width=data.draw(st.sampled_from([2, 4])), res_blocks=data.draw(st.integers(1, 2)),
                          halve_time=halve_time, multipliers=multipliers,
                          latent_channels=data.draw(st.sampled_from([3, 8])))
    steps, height = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40 // 2 ** len(halve_time)))
    cut = dict(chunk=data.draw(st.integers(1, 6)), rows=data.draw(st.integers(1, height)))
    slab = 2 ** data.draw(st.integers(6, 12))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    vae = WanVAE(config).requires_grad_(False).double()          # in fp32 the order of sums shows
    latent = torch.randn(2, config.latent_channels, steps, height, 3).double()
    space = config.space_stride
    video = torch.randn(2, 3, config.time_stride * (steps - 1) + 1, height * space, space).double()
    pixels, latents = vae.decode(latent, chunk=steps), vae.encode(video, chunk=steps)
    assert pixels.shape == (2, 3, video.shape[2], height * space, 3 * space)
    with mock.patch.object(wan_vae, "SLAB", slab):
        for way in (cut, {}):
            assert error(vae.decode(latent, **way), pixels) < 1e-9
            assert max(map(error, vae.encode(video, **way), latents)) < 1e-9


@pytest.mark.parametrize("clips, steps, height, impl, ways", [
    *((clips, steps, height, "reference", [{}, dict(chunk=1), dict(chunk=2, slab=2 ** 10),
                                       dict(rows=3, chunk=3, slab=2 ** 13), dict(slab=2 ** 30)])
      for clips, steps, height in ((1, 4, 4), (2, 3, 5))),
    (2, 3, 4, "triton", [dict(rows=3, chunk=2, slab=2 ** 12)])])
def test_kernels_code_as_torchs_operators_do_however_the_clip_is_cut(clips, steps, height, impl, ways, triton_device):
    torch.manual_seed(clips)
    config = WanVAEConfig(width=6, res_blocks=1, multipliers=(1, 2, 2), halve_time=(False, True))
    vae = channels_last(WanVAE(config)).requires_grad_(False)
    for weight in vae.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.05)           # gains that are not one
    latent = torch.randn(clips, 16, steps, height, 3)
    vae.impl = "eager"
    pixels = vae.decode(latent)
    moments = vae.encode(pixels)
    vae.to(triton_device).impl = impl
    for way in ways:
        assert error(vae.decode(latent.to(triton_device), **way).cpu(), pixels) < 1e-4
        for got, want in zip(vae.encode(pixels.to(triton_device), **way), moments, strict=True):
            assert error(got.cpu(), want) < 1e-4


@pytest.mark.parametrize("grid, rows, slab", [((21, 60, 104), 60, 2 ** 30), ((31, 90, 160), 90, 2 ** 30),
                                              ((31, 90, 160), 45, 2 ** 27)])
def test_on_a_gpu_a_clip_takes_the_memory_that_it_is_said_to_need(grid, rows, slab, monkeypatch):
    """With attention that does not keep its weights, as a GPU's."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    with torch.device("meta"):
        vae = compute_in(WanVAE(WanVAEConfig()), torch.bfloat16)
    _, done = decoded_as_on_a_gpu(grid, rows, slab)
    assert 0.4 < done.peak / vae.bytes_needed(vae.decoder, *grid, rows, slab) < 1


def decoded_as_on_a_gpu(grid, rows, slab):
    """How many frames came of a bf16 latent, and what was launched for them."""
    with torch.device("meta"):
        vae = channels_last(compute_in(WanVAE(WanVAEConfig()), torch.bfloat16)).requires_grad_(False)
        latent = torch.empty(1, 16, *grid, dtype=torch.bfloat16)
    vae.impl, frames = "triton", 0
    with Launches() as done:
        for _, _, piece in vae.decode_pieces(latent, rows=rows, slab=slab):
            frames += piece.shape[2]
            del piece
    return frames, done


@pytest.fixture(scope="module")
def tall():
    """A VAE of the published shape, but narrow, and a latent in which neighbours are alike."""
    torch.manual_seed(4)
    vae = channels_last(WanVAE(WanVAEConfig(width=8)).requires_grad_(False))
    return vae, F.interpolate(torch.randn(1, 16, 2, 5, 2), size=(2, 34, 3), mode="trilinear")


def test_bands_meet_without_a_seam(tall):
    vae, latent = tall
    rows = [piece[:2] + (piece[2].shape[3],) for piece in vae.decode_pieces(latent, rows=16, chunk=1)]
    assert rows == [(0, 0, 128), (1, 0, 128), (0, 128, 128), (1, 128, 128), (0, 256, 16), (1, 256, 16)]
    whole = vae.decode(latent)
    assert error(vae.decode(latent, rows=16), whole) < 1e-5
    assert max(map(error, vae.encode(whole, rows=16), vae.encode(whole))) < 1e-5


def test_a_band_sees_as_many_rows_as_its_result_depends_on_and_no_more(tall):
    """An impulse outside what is seen changes nothing, one in its outermost row does."""
    vae, _ = tall
    vae = copy.deepcopy(vae).double()                   # or rounding hides what is far
    for block in (vae.decoder.mid[1], vae.encoder.mid[1]):
        block.proj.weight.data.zero_()                  # the attention sees everything
        block.proj.bias.data.zero_()
    for part, run, shape, cell in ((vae.encoder, lambda x: vae.encoder.begin(x, Memory()), (1, 3, 1, 320, 8), 8),
                                   (vae.decoder, lambda x: vae.decoder.finish(x, Memory(), Band(20, 21, 0, 40)),
                                    (1, 32, 1, 40, 1), 1)):
        above, below = part.reach()
        for row, seen in ((20 - above - 1, False), (20 - above, True), (20 + below, True), (20 + below + 1, False)):
            still, struck = torch.zeros(shape).double(), torch.zeros(shape).double()
            struck[:, :, :, cell * row:cell * (row + 1)] = 1
            changed = (run(struck) != run(still)).any(dim=(0, 1, 2, 4))
            assert (changed[20] if part is vae.encoder else changed.any()).item() == seen


def test_a_vae_that_learns_takes_a_clip_whole_and_gets_the_gradients_of_differences():
    torch.manual_seed(1)
    config = WanVAEConfig(width=2, res_blocks=1, multipliers=(1, 2), halve_time=(True,), latent_channels=4)
    vae = WanVAE(config).double()
    latent, video = torch.randn(1, 4, 2, 2, 2).double(), torch.randn(1, 3, 3, 4, 4).double()
    frozen = copy.deepcopy(vae).requires_grad_(False)
    for run, still, x in ((vae.decode, frozen.decode, latent),
                          (lambda x: vae.encode(x)[0], lambda x: frozen.encode(x)[0], video)):
        assert torch.allclose(run(x), still(x), rtol=0, atol=1e-10)
        x.requires_grad_()
        grad, = torch.autograd.grad(run(x).square().sum(), x)
        way = torch.randn_like(x)
        with torch.no_grad():
            difference = (run(x + 1e-2 * way).square().sum() - run(x - 1e-2 * way).square().sum()) / 2e-2
        assert abs(difference - (grad * way).sum()) < 0.02 * abs(difference)
        run(x).sum().backward()
    assert all(weight.grad is not None for weight in vae.parameters())


def test_bands_are_as_few_as_fit():
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig())                    # fp32
    for part in (vae.encoder, vae.decoder):
        needed = [vae.bytes_needed(part, 31, 90, 160, rows) for rows in (1, 10, 30, 45, 90)]
        assert needed == sorted(needed)
        assert vae.rows_within(needed[-1], part, 31, 90, 160) == 90
        assert vae.rows_within(needed[-1] - 1, part, 31, 90, 160) == 45
        assert vae.rows_within(needed[2], part, 31, 90, 160) == 30
        assert vae.rows_within(0, part, 31, 90, 160) == 1
    assert 8e9 < vae.bytes_needed(vae.decoder, 31, 90, 160, 90) < 16e9


def test_a_slab_is_what_the_memory_of_a_gpu_allows_and_a_cpus_stays():
    """H200, H100, a card of 24 GB, one of 12 GB, for 81 frames of 480p; no clip is cut into bands for larger slabs."""
    with torch.device("meta"):
        vae = WanVAE(WanVAEConfig())
    clip = vae.decoder, 21, 60, 104
    assert vae.slab_within(2 ** 40, *clip, 60) == vae.slab_within(None, *clip, 60) == wan_vae.SLAB
    assert vae.memory(torch.zeros(1), 1).impl == "eager"
    for precision, slabs in ((torch.bfloat16, (30, 29, 27, 26)), (torch.float32, (29, 28, 26, 24))):
        with FakeTensorMode():                          # of a GPU that need not be there
            weight = torch.empty_strided((1,), (1,), dtype=precision, device="cuda")
            vae.from_latent._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        for memory, slab in zip((150e9, 85e9, 25e9, 12.6e9), slabs, strict=True):
            rows = vae.rows_within(memory // 4, *clip)
            assert vae.slab_within(memory // 4, *clip, rows) == 2 ** slab
            assert vae.bytes_needed(*clip, rows, 2 ** slab) <= memory // 4
        assert vae.slab_within(2 ** 20, *clip, 1) == wan_vae.SLAB
        assert vae.requires_grad_(False).memory(weight, 1).impl == "triton"
    assert vae.memory(weight.double(), 1).impl == "eager"           # which kernels/around_conv does not take


@pytest.mark.parametrize("slab, launches, around", [(2 ** 28, 3000, 500), (2 ** 30, 850, 350)])
def test_a_gpu_is_asked_to_do_little_beside_the_convolutions(slab, launches, around):
    """81 frames of 480p in bf16. around: gigabytes moved by what is neither a convolution nor a product.

    torch's own operators, with a CPU's slabs: 23,680 launches, 1,391 GB.
    """
    frames, done = decoded_as_on_a_gpu((21, 60, 104), None, slab)
    assert frames == 81
    assert 0.9 * launches < done.count.total() <= launches, done.count
    assert 0.9 * around < done.around <= around, done.gigabytes


@pytest.mark.parametrize("steps, height, width, chunk", [
    (1, 90, 160, 1), (3, 20, 32, 3), (4, 90, 160, 4), (31, 90, 160, 1), (31, 45, 80, 1), (31, 2, 2, 31)])
def test_a_clip_is_cut_in_time_only_where_that_saves_memory(steps, height, width, chunk):
    with torch.device("meta"):
        decoder = WanVAE(WanVAEConfig()).decoder
    assert decoder.needs().chunk(steps, height * width) == chunk


@pytest.mark.slow
@pytest.mark.parametrize("what, steps, height, width, rows", [
    ("decode", 3, 20, 32, 20), ("decode", 12, 20, 32, 20), ("decode", 12, 60, 12, 15), ("encode", 3, 20, 32, 20),
    ("encode", 8, 40, 16, 40), ("encode", 8, 60, 12, 15)])
def test_a_clip_takes_the_memory_that_it_is_said_to_need(what, steps, height, width, rows):
    """Measured in a process of its own, as its largest resident memory; what is freed is given back at once."""
    script = f"""
import torch
from dailies.jobs.bench.model import _memory as memory, reset_peak
from dailies.model.convolution import channels_last
from dailies.model.wan.vae import WanVAE, WanVAEConfig
torch.set_num_threads(1)
vae = channels_last(WanVAE(WanVAEConfig(width=32)).requires_grad_(False))
x = torch.randn(1, 16, {steps}, {height}, {width})
if {what!r} == "encode":
    x = torch.randn(1, 3, {4 * steps - 3}, {8 * height}, {8 * width})
with torch.inference_mode():
    vae.encode(vae.decode(torch.randn(1, 16, 2, 2, 2)))
    before = reset_peak()
    for piece in vae.decode_pieces(x, rows={rows}) if {what!r} == "decode" else vae.encode(x, rows={rows}):
        del piece
part = vae.decoder if {what!r} == "decode" else vae.encoder
print((memory("VmHWM") - before) / vae.bytes_needed(part, {steps}, {height}, {width}, {rows}))
"""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert 0.4 < float(done.stdout) < 1.2                   # half of it in bands, which grow narrower as they rise


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


@pytest.mark.cpu
def test_bf16_stays_near_fp32():
    golden = Golden("wan_vae_a")
    fp32 = build(golden, "weights")
    bf16 = checkpoint.build(lambda: WanVAE(WanVAEConfig(width=3)), golden.folder / "weights.safetensors",
                            wan_keys.WAN_VAE,
                            name="golden", device="cpu", precision="bf16")
    dtype = bf16.decoder.conv_in.weight.dtype
    assert dtype == processor.dtype_of("bf16", "cpu")
    latent = golden.inputs["z.5"]
    got, want = bf16.decode(latent.to(dtype)).float(), fp32.decode(latent)
    assert ((got - want).norm() / want.norm()).item() < 0.05
