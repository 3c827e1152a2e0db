"""LTX-2's schedule, guidance and samplers, each against what its release computes or against the mathematics."""

import math

import pytest
import torch
from golden import Golden, error

from dailies.model import samplers
from dailies.model.catalog import CATALOG
from dailies.model.ltx2.guidance import COND, ISOLATED, NEUTRAL, PERTURBED, UNCONDITIONAL, StreamGuide
from dailies.model.ltx2.samplers import ancestral, res_2s
from dailies.model.ltx2.schedule import DISTILLED, REFINING, ltx2_sigmas
from dailies.model.samplers import Steps, each, euler
from dailies.model.schedules import rcm_sigmas

SCHEDULE, GUIDERS = Golden("ltx2_schedule_a"), Golden("ltx2_guiders_a")


@pytest.mark.parametrize("name", sorted(name for name in SCHEDULE.outputs if name.startswith("sigmas.")))
def test_the_schedule_is_the_releases(name):
    _, steps, tokens = name.split(".")
    tokens = tokens.removeprefix("tokens")
    got = ltx2_sigmas(int(steps.removeprefix("steps")), *(() if tokens == "default" else (int(tokens),)))
    assert (got - SCHEDULE.outputs[name]).abs().max() < SCHEDULE.tolerance["sigmas"]


def test_one_step_goes_straight_from_noise_to_the_clip():
    assert ltx2_sigmas(1).tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="at least 1; got 0"):
        ltx2_sigmas(0)


def test_the_second_stage_ends_as_the_first_does():
    assert DISTILLED[-4:] == REFINING and len(DISTILLED) == 9
    assert len(REFINING) == 1 + CATALOG["ltx-2-19b-two-stage"].further_steps


def test_euler_steps_are_the_releases():
    sigmas = ltx2_sigmas(4).tolist()
    made, after = iter(SCHEDULE.inputs[f"denoised.{i}"] for i in range(4)), []

    class Told(Steps):
        def done(self, step, state):
            after.append(state[0][0]["video"])

    def velocity(clips, sigma):
        return each(lambda x: (x - next(made)) / sigma, clips)
    euler(velocity, [{"video": SCHEDULE.inputs["x_init"]}], sigmas, Told())
    for i, x in enumerate(after):
        assert (x - SCHEDULE.outputs[f"x.{i}"]).abs().max() < SCHEDULE.tolerance["x"]


@pytest.mark.parametrize("number", range(3))
def test_guidance_is_the_releases(number):
    said = GUIDERS.config["multimodal"][number]
    guide = StreamGuide(text=said["cfg_scale"], perturbed=said["stg_scale"], blocks=(1,),
                        isolated=said["modality_scale"], rescale=said["rescale_scale"])
    predicted = {COND: GUIDERS.inputs["cond"], UNCONDITIONAL: GUIDERS.inputs["uncond_text"],
                 PERTURBED: GUIDERS.inputs["uncond_perturbed"], ISOLATED: GUIDERS.inputs["uncond_modality"]}
    wanted = {name: predicted[name] for name in (COND, *guide.wants)}
    assert error(guide(wanted), GUIDERS.outputs[f"multimodal.{number}"]) < GUIDERS.tolerance["value"]
    assert len(guide.wants) == (3, 1, 1)[number], "what is neutral is not evaluated"


def test_guidance_that_is_neutral_wants_nothing_and_changes_nothing():
    cond = torch.randn(3, 4)
    assert NEUTRAL.wants == StreamGuide(rescale=0.7, blocks=(1,)).wants == frozenset()
    assert StreamGuide(rescale=0.7)({COND: cond}) is cond
    assert PERTURBED not in StreamGuide(perturbed=1.0).wants, "no block has an attention to leave out"


CLEAN = [{"video": torch.tensor([0.5, -1.0, 2.0]), "audio": torch.tensor([1.0, 3.0])}]
START = [{"video": torch.tensor([1.5, 0.3, -0.4]), "audio": torch.tensor([-1.0, 0.2])}]


def towards_clean(clips, sigma):
    return each(lambda x, x0: x0.to(x.dtype), clips, CLEAN)


def same(clips):
    return clips


def noises(shape_of=START):
    return lambda number: each(
        lambda x: torch.randn(x.shape, generator=torch.Generator().manual_seed(100 * number + len(x))), shape_of)


@pytest.mark.parametrize("sampler", [ancestral, res_2s])
def test_a_sampler_that_is_told_the_clip_ends_at_it_whatever_noise_it_puts_back(sampler):
    made = sampler(towards_clean, START, DISTILLED, noises(), same)
    for stream, want in CLEAN[0].items():
        assert torch.allclose(made[0][stream], want, atol=1e-6) and made[0][stream].dtype is torch.float32


def test_an_ancestral_step_leaves_as_much_noise_as_its_sigma_says():
    sigma, after, n = 0.9, 0.6, 200_000
    draws = torch.randn(3, n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    start = [{"video": sigma * draws[0]}]               # of the clip 0: what is left after a step is noise alone
    stopped = []

    class Stop(Steps):
        def done(self, step, state):
            stopped.append(state[0][0]["video"])
    ancestral(lambda clips, sigma: each(torch.zeros_like, clips), start, (sigma, after, 0.0),
              lambda number: [{"video": draws[number]}], same, Stop())
    assert abs(stopped[0].std() - after) < 3e-3
    down = after ** 2 / sigma                           # deterministic as far as that, by the specification
    by_hand = (1 - after) / (1 - down) * down * draws[0] + math.sqrt(
        after ** 2 - down ** 2 * (1 - after) ** 2 / (1 - down) ** 2) * draws[1]
    assert torch.allclose(stopped[0], by_hand)


def test_what_is_kept_is_put_back_after_fresh_noise():
    def keep(clips):
        return each(lambda x: torch.cat((torch.full_like(x[:1], 7), x[1:])), clips)
    seen = []

    def denoise(clips, sigma):
        seen.extend(clip["video"][0].item() for clip in clips)
        return keep(clips)
    ancestral(denoise, keep(START), DISTILLED, noises(), keep)
    res_2s(denoise, keep(START), DISTILLED, noises(), keep)
    assert len(seen) == 8 + 2 * 8 + 1 and set(seen) == {7.0}


def test_res_2s_is_of_second_order_where_it_puts_no_noise_back():
    """dx / dsigma = (x - x0(x)) / sigma with x0 = a x + b has a solution in closed form."""
    a, b, x = 0.3, 0.7, 1.9
    start, end = 0.9, 0.0011

    def denoise(clips, sigma):
        return each(lambda x: a * x + b, clips)

    def off(num_steps):
        grid = torch.logspace(math.log10(start), math.log10(end), num_steps + 1, dtype=torch.float64)[:-1].tolist()
        made = res_2s(denoise, [{"video": torch.tensor([x] * 4)}], (*grid, 0.0), lambda n: [{"video": torch.randn(4)}],
                      same, eta=0.0)
        fixed = b / (1 - a)
        want = a * (fixed + (x - fixed) * (end / start) ** (1 - a)) + b
        return (made[0]["video"][0] - want).abs().item()
    coarse, fine = off(2), off(4)
    assert coarse > 3 * fine > 0


def test_res_2s_takes_two_evaluations_a_step_and_one_at_the_end_and_two_draws_a_step():
    at, drawn = [], []

    def denoise(clips, sigma):
        at.append(sigma)
        return towards_clean(clips, sigma)

    def renoise(number):
        drawn.append(number)
        return noises()(number)
    res_2s(denoise, START, ltx2_sigmas(3).tolist(), renoise, same)
    assert len(at) == 7 and at[-1] == 0.0011 and drawn == [1, 2, 3, 4, 5, 6] and at == sorted(at, reverse=True)


@pytest.mark.parametrize("sampler", [ancestral, res_2s])
def test_a_sampler_goes_on_after_any_step_to_the_same_bits(sampler):
    sigmas, states = ltx2_sigmas(4).tolist(), {}

    def denoise(clips, sigma):
        return each(lambda x: x.tanh() * (1 - sigma / 2) + 0.1, clips)

    class Save(Steps):
        def done(self, step, state):
            states[step] = state
    straight = sampler(denoise, START, sigmas, noises(), same, Save())

    class GoOn(Steps):
        def __init__(self, step):
            self.step = step

        def begin(self, start):
            return self.step, states[self.step]
    for step in (1, 2, 3):
        went_on = sampler(denoise, START, sigmas, noises(), same, GoOn(step))
        assert all(torch.equal(went_on[0][name], straight[0][name]) for name in straight[0])


def test_turbot2av_samples_as_the_distilled_wan_models_do_from_pure_noise():
    """Its TrigFlow x_t = cos t x0 + sin t e, divided by cos t + sin t, is the rectified flow that rcm walks."""
    times = (math.pi / 2, 1.5, 1.4, 1.0, 0.0)
    sigmas = rcm_sigmas(4, math.inf).tolist()
    assert sigmas == pytest.approx([math.sin(t) / (math.cos(t) + math.sin(t)) for t in times]) and sigmas[0] == 1.0
    draw = torch.Generator().manual_seed(2)
    noise = [torch.randn(5, generator=draw, dtype=torch.float64) for _ in range(4)]

    def x0_of(x, sigma):
        return (x * (1 - sigma) + 0.2).tanh()
    x = noise[0]
    for t, after, fresh in zip(times[:-1], times[1:], (*noise[1:], torch.zeros(5)), strict=True):
        scale = math.cos(t) + math.sin(t)
        x = math.cos(after) * x0_of(x / scale, math.sin(t) / scale) + math.sin(after) * fresh
    made = samplers.rcm(lambda clips, sigma: each(lambda x: (x - x0_of(x, sigma)) / sigma, clips),
                        [{"video": noise[0]}], sigmas, lambda number: [{"video": noise[number]}])
    assert torch.allclose(made[0]["video"].double(), x, atol=1e-6)
