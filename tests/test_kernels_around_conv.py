"""kernels/around_conv: references against float64 and the VAE's own layers, Triton against the references."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from golden import error

from dailies.kernels.around_conv import add_bias, channels_adjacent, enlarge, norm_silu
from dailies.model.wan.vae import ChannelNorm


@dataclass(frozen=True, kw_only=True)
class Clip:
    """[batch, channels, frames, height, width]; what is read and what is written is part of more, or whole."""

    batch: int = 1
    channels: int
    frames: int = 1
    height: int
    width: int
    part: bool = False

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.frames}x{self.height}x{self.width}" + " part" * self.part

    def tensor(self, seed: int | None, dtype=torch.float32, device="cpu", grown=1, frames=None, channels=None):
        """Normal numbers of one seed, or NaN; a part lies between frames and rows that are NaN."""
        size = (self.batch, channels or self.channels, frames or self.frames, grown * self.height, grown * self.width)
        around = (*size[:2], size[2] + 3, size[3] + 2, size[4]) if self.part else size
        room = torch.full(around, torch.nan, dtype=dtype, device=device).contiguous(
            memory_format=torch.channels_last_3d)
        view = room[:, :, 2:-1, 1:-1] if self.part else room
        if seed is not None:
            view.copy_(torch.randn(size, generator=torch.Generator().manual_seed(seed)))
        return room, view

    def vector(self, seed, dtype=torch.float32, device="cpu", channels=None):
        return torch.randn(channels or self.channels, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# 4,096 values a program: more pixels than one does, and one; widths that are no powers of two; a frame's last program
CLIPS = [Clip(channels=96, frames=2, height=7, width=11, part=True), Clip(batch=2, channels=24, frames=3, height=5,
                                                                         width=3, part=True),
         Clip(channels=384, height=3, width=5), Clip(channels=1, frames=2, height=1, width=9),
         Clip(batch=2, channels=8, height=27, width=20), Clip(channels=200, frames=1, height=1, width=1, part=True)]
# a device gets the dtype that runs there, and at full size fp32 too: each takes a compilation of every case
DTYPES = [torch.bfloat16] if torch.cuda.is_available() else [torch.float32, torch.float16, torch.bfloat16]
UNITS = {torch.float32: 1e-6, torch.float16: 2 ** -11, torch.bfloat16: 2 ** -8}     # of one rounding


def assert_written(room, view, want, dtype, impl):
    """want lies in the view within a rounding, and nothing beside it: what was NaN there still is."""
    cut = impl == "triton" and dtype == torch.bfloat16 and not room.is_cuda     # Triton's interpreter does not round it
    torch.testing.assert_close(view.double().cpu(), want.double().cpu(), rtol=1.01 * (1 + cut) * UNITS[dtype],
                               atol=2e-6)
    outside = torch.ones_like(room, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert room[outside].isnan().all()


def across(vector):
    return vector.double().cpu().view(-1, 1, 1, 1)


def norm_silu_formula(x, gamma, bias=None):
    z = x.double().cpu() + (0 if bias is None else across(bias))
    return F.silu(F.normalize(z, dim=1, eps=1e-12) * x.shape[1] ** 0.5 * across(gamma))


def device_of(impl, triton_device):
    return triton_device if impl == "triton" else "cpu"


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", CLIPS, ids=str)
def test_norm_and_silu_follow_the_float64_formula(case, biased, dtype, impl, triton_device):
    device = device_of(impl, triton_device)
    _, x = case.tensor(1, dtype, device)
    gamma, bias = case.vector(2, device=device), case.vector(3, dtype, device) if biased else None
    room, out = case.tensor(None, dtype, device)
    assert norm_silu(x, gamma, out, bias=bias, impl=impl) is out
    assert_written(room, out, norm_silu_formula(x, gamma, bias), dtype, impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("case", CLIPS, ids=str)
def test_bias_and_residual_are_added_and_rounded_once(case, with_residual, dtype, impl, triton_device):
    device = device_of(impl, triton_device)
    (_, x), (_, residual) = (case.tensor(seed, dtype, device) for seed in (1, 2))
    bias = case.vector(3, device=device)
    room, out = case.tensor(None, dtype, device)
    want = x.double().cpu() + across(bias) + (residual.double().cpu() if with_residual else 0)
    assert add_bias(x, bias, out, residual=residual if with_residual else None, impl=impl) is out
    assert_written(room, out, want, dtype, impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("case", CLIPS, ids=str)
def test_a_picture_is_enlarged_and_its_frames_are_taken_from_the_channels(case, pairs, biased, dtype, impl,
                                                                         triton_device):
    device, channels = device_of(impl, triton_device), pairs * case.channels
    _, x = case.tensor(1, dtype, device, channels=channels)
    bias = case.vector(3, dtype, device, channels=channels) if biased else None
    room, out = case.tensor(None, dtype, device, grown=2, frames=pairs * case.frames)
    assert enlarge(x, out, bias=bias, impl=impl) is out
    wide = x.double().cpu() + (across(bias) if biased else 0)
    want = torch.empty(out.shape, dtype=torch.float64)
    for frame in range(pairs):
        part = wide[:, frame * case.channels:(frame + 1) * case.channels]
        want[:, :, frame::pairs] = F.interpolate(part, scale_factor=(1, 2, 2), mode="nearest")
    assert_written(room, out, want, dtype, impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_is_read_may_be_written_over(impl, triton_device):
    case, device = CLIPS[0], device_of(impl, triton_device)
    for write in (lambda x, r, out: norm_silu(x, case.vector(2, device=device), out, impl=impl),
                  lambda x, r, out: add_bias(x, case.vector(2, device=device), out, residual=r, impl=impl)):
        x, residual, out = (case.tensor(seed, device=device)[1] for seed in (1, 3, None))
        want = write(x, residual, out)
        assert torch.equal(write(x.clone(), residual, x), want)
        x = case.tensor(1, device=device)[1]
        if write(x, residual, residual) is residual:
            assert torch.equal(residual, want)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_pixels_of_zeros_stay_zero_and_nan_stays_nan(impl, triton_device):
    device = device_of(impl, triton_device)
    case = Clip(channels=24, height=2, width=3)
    _, x = case.tensor(1, device=device)
    x[..., 0, 0], x[:, 5, :, 1, 1] = 0, torch.nan
    y = norm_silu(x, torch.ones(24, device=device), case.tensor(None, device=device)[1], impl=impl).cpu()
    assert not y[..., 0, 0].any() and y[..., 1, 1].isnan().all()
    y[..., 1, 1] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_once_is_nearer_to_fp32_than_the_layers_of_the_vae(dtype):
    """Bias, norm, gain and SiLU as torch's operators round them, after each; against one rounding at the end."""
    case = Clip(channels=96, frames=2, height=30, width=52)
    (_, x), bias, norm = case.tensor(1, dtype), case.vector(2, dtype), ChannelNorm(96, 3)
    norm.gamma.data = 1 + case.vector(3).view(-1, 1, 1, 1)
    want = norm_silu_formula(x, norm.gamma.flatten(), bias)
    with torch.no_grad():
        layers = F.silu(norm(x + bias.view(-1, 1, 1, 1)))
    once = norm_silu(x, norm.gamma.detach().flatten(), torch.empty_like(x), bias=bias, impl="reference")
    assert error(once, want) < 0.7 * error(layers, want)


def test_norm_and_silu_are_the_layers_of_the_vae_in_fp32():
    case = Clip(channels=96, frames=2, height=5, width=3)
    (_, x), norm = case.tensor(1), ChannelNorm(96, 3)
    norm.gamma.data = case.vector(3).view(-1, 1, 1, 1)
    with torch.no_grad():
        assert error(norm_silu(x, norm.gamma.flatten(), torch.empty_like(x)), F.silu(norm(x))) < 1e-6


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_operators_are_what_they_say_to_a_compiler(impl, triton_device):
    device, case = device_of(impl, triton_device), Clip(channels=8, frames=2, height=3, width=2)
    (_, x), (_, out), (_, residual) = (case.tensor(seed, device=device) for seed in (1, 4, 5))
    vector, ops = case.vector(2, device=device), torch.ops.dailies
    torch.library.opcheck(ops.norm_silu, (x, vector, vector, out, impl))
    torch.library.opcheck(ops.add_bias, (x, vector, residual, out, impl))
    torch.library.opcheck(ops.enlarge, (x, vector, case.tensor(4, device=device, grown=2)[1], impl))


def test_what_does_not_fit_is_refused_by_name():
    x, vector = Clip(channels=8, frames=2, height=3, width=2).tensor(1)[1], torch.ones(8)
    with pytest.raises(ValueError, match=r"needs bias \[8\].*got \[7\]"):
        add_bias(x, torch.ones(7), x)
    with pytest.raises(ValueError, match=r"needs gamma \[8\].*float64"):
        norm_silu(x, vector.double(), x)
    with pytest.raises(ValueError, match=r"needs gamma \[8\].*got \[7\]"):
        norm_silu(x, torch.ones(7), x)
    with pytest.raises(ValueError, match=r"out .* with adjacent channels; .*Lay it out"):
        norm_silu(x, vector, x.contiguous())
    with pytest.raises(ValueError, match=r"needs out \[1, 8, 2, 6, 4\].*got \[1, 8, 2, 3, 2\]"):
        enlarge(x, x)
    with pytest.raises(ValueError, match=r"needs x \[B, C, T, H, W\].*got \[8, 2\]"):
        add_bias(torch.ones(8, 2), vector, x)
    assert channels_adjacent(x[:, :, 1:, 1:]) and not channels_adjacent(x[..., 1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [Clip(channels=96, frames=5, height=480, width=832, part=True),
                                  Clip(channels=384, frames=21, height=90, width=160)], ids=str)
def test_rendered_shapes_follow_the_reference(case, dtype):
    device = "cuda"
    _, x = case.tensor(1, dtype, device)
    gamma, bias = case.vector(2, device=device), case.vector(3, dtype, device)
    results = {}
    for impl in ("reference", "triton"):
        normed, summed = (case.tensor(None, dtype, device)[1] for _ in range(2))
        norm_silu(x, gamma, normed, bias=bias, impl=impl)
        add_bias(x, bias, summed, residual=normed, impl=impl)
        results[impl] = normed, summed
    for got, want in zip(results["triton"], results["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=2 * UNITS[dtype], atol=2e-5)      # a rounding may go either way
