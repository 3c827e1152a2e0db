"""Few-step sampling against the release's recorded runs: the places, what the network is given, every state."""

import pytest
import torch
from golden import Golden, e2e_request, error
from one_stream import clip, solved

from dailies.actors.denoiser import noise as all_noise
from dailies.model.samplers import rcm
from dailies.model.schedules import rcm_sigmas, rcm_timestep
from dailies.model.shapes import LatentGrid, VideoShape

CASES = [("rcm_sampler_t2v_a", "sde"), ("rcm_sampler_i2v_a", "sde"), ("rcm_sampler_i2v_a", "ode")]


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case, mode", CASES)
def test_each_step_of_a_few_equals_the_release(case, mode, dtype, steps):
    golden = Golden(case)
    inputs, outputs, run = golden.inputs, golden.outputs, f"{steps}steps.{mode}.{dtype}"
    sigmas = rcm_sigmas(steps, golden.config["sigma_max"])
    assert error(sigmas, outputs[f"t_steps.{steps}steps"]) < golden.tolerance["t_steps"]
    calls, experts, states = 0, [], []

    def velocity(video, sigma):
        nonlocal calls
        states.append(video)
        x = video.to(getattr(torch, dtype)).float()
        # recorded at the dtype of the run; the released models run in bf16, whatever the rest does
        timestep = rcm_timestep(sigma) if dtype == "bfloat16" else torch.tensor(sigma).float().mul(1000).item()
        assert error(x, outputs[f"net_x.{run}.{calls}"]) < 1e-5
        assert timestep == pytest.approx(outputs[f"net_t.{run}.{calls}"].item(), rel=1e-7)
        name = ""
        if "boundary" in golden.config:
            experts.append(sigma >= golden.config["boundary"])
            name = "_high" if experts[-1] else "_low"
        drift = inputs[f"b{name}"].view(1, -1, 1, 1, 1)
        v = torch.einsum("dc,bcfhw->bdfhw", inputs[f"A{name}"], x) + timestep / 1000 * drift
        calls += 1
        return v.to(getattr(torch, dtype)).double()

    renoise = (lambda step: clip(inputs[f"noise.{step - 1}"])) if mode == "sde" else None
    got = solved(rcm, velocity, inputs["init_noise"], sigmas.tolist(), renoise)
    assert got.dtype == torch.float32 and error(got, outputs[f"samples.{run}"]) < 1e-5
    for step, state in enumerate(states[1:]):
        assert error(state, outputs[f"x.{run}.{step}"]) < 1e-5
    if experts:
        assert experts == outputs[f"used_high.{steps}steps"].bool().tolist()


@pytest.mark.parametrize("renoise", [None, lambda step: clip(torch.randn(2, 3, dtype=torch.float64))],
                         ids=["ode", "sde"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_an_oracle_is_found_whatever_the_number_of_steps(steps, renoise):
    torch.manual_seed(0)
    clean = torch.randn(2, 3, dtype=torch.float64)
    got = solved(rcm, lambda video, sigma: (video - clean) / sigma, torch.randn(2, 3),
                 rcm_sigmas(steps, 80.0).tolist(), renoise)
    assert error(got, clean) < 1e-6


def test_places_and_rounded_timesteps_are_the_published_ones():
    assert rcm_sigmas(4, 80.0).tolist() == pytest.approx([0.987654, 0.933781, 0.852895, 0.608979, 0], abs=1e-6)
    assert [rcm_timestep(sigma) for sigma in rcm_sigmas(4, 80.0).tolist()[:4]] == [988, 932, 852, 608]
    assert [rcm_timestep(rcm_sigmas(1, most)[0].item()) for most in (120.0, 200.0, 1600.0)] == [992, 996, 1000]
    for steps in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 for a distilled model; got " + str(steps)):
            rcm_sigmas(steps, 80.0)


def test_later_draws_are_new_noise_of_the_clips_own_seed():
    request = e2e_request(shape=VideoShape(frames=9, height=256, width=256))
    shapes = {"video": LatentGrid().of(request.shape)}

    def noise(request, *draw):
        return all_noise(request, shapes, *draw)["video"]

    draws = [noise(request, draw) for draw in range(4)]
    assert torch.equal(draws[0], noise(request))
    # needs no draw before it
    assert torch.equal(draws[3], noise(e2e_request(shape=request.shape, prompt="other"), 3))
    assert not torch.equal(draws[1], noise(e2e_request(shape=request.shape, seed=21), 1))
    together = torch.corrcoef(torch.stack([draw.flatten() for draw in draws]))
    assert (together - torch.eye(4)).abs().max() < 0.02
