"""The training of the demo model within a budget of seconds: its parts against what they stand for, and a run of it."""

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts import dit_of, text_encoder_of, vae_of
from torch import nn

from dailies.jobs.demo.learning import convolutions_for_learning
from dailies.jobs.demo.phases import Optimizers, rng_of
from dailies.jobs.demo.train import CROP, around_shape, coded_errors
from dailies.jobs.demo.train_gpu import FULL_SIZES, Clock, FrameConv, Sentences, convolve_frames, encode_whole
from dailies.jobs.demo.training import LOWEST, Learner, TimedTraining, orthogonal, rate_at
from dailies.jobs.demo.vae_quality import vae_quality
from dailies.jobs.demo.world import FPS, SCENE_KINDS, SEEN_KINDS, Painter, Scene
from dailies.model.catalog import DEMO, DEMO_SPARSE, DEMO_TURBO
from dailies.model.wan.vae import CausalConv, ChannelNorm, Memory

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("av", "boto3", "ftfy", "pydantic", "ray")     # where only torch and transformers are installed


def test_scenes_painted_together_are_those_drawn_one_by_one():
    rng = random.Random(1)
    scenes = [Scene.draw(rng, held_out=None) for _ in range(40)]
    painter = Painter("cpu")
    start = torch.tensor([rng.randrange(40) for _ in scenes])
    together, coverage = painter.render(*painter.of(scenes), 9, start=start, total=49)
    for i, scene in enumerate(scenes):
        video, covered = scene.render(9, start=start[i].item(), total=49)
        assert (together[i] - video).abs().max() < 2e-5 and (coverage[i] - covered).abs().max() < 2e-5


def test_what_is_painted_for_training_holds_no_combination_kept_from_it():
    kinds, variation = Painter("cpu").draw(4000)
    assert not any(Scene(**SCENE_KINDS[kind]).held_out for kind in kinds.tolist())
    assert len(set(kinds.tolist())) > 0.9 * len(SEEN_KINDS) and variation.shape == (4000, 10)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 24), nn.Conv3d(24, 16, 3, padding=1))


def test_steps_on_the_device_are_those_of_torch_s_optimizers():
    theirs, ours, first = small_model(), small_model(), small_model()
    optimizer, learner = Optimizers(theirs, 1e-2), Learner(ours)
    learner.average_over(1)
    for step in range(3):
        for model in (theirs, ours):
            torch.manual_seed(step)
            model.zero_grad()
            x = model[:3](torch.randn(2, 2, 2, 2, 12)).movedim(-1, 1)
            model[3](x).square().mean().backward()
        optimizer.step(1e-2)
        learner.set_rate(1e-2)
        learner.step()
    for a, b, start in zip(theirs.parameters(), ours.parameters(), first.parameters(), strict=True):
        assert (a - b).norm() < 0.03 * (a - start).norm()               # Newton-Schulz is in bf16
    for a, b in zip(ours.parameters(), learner.average, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_newton_schulz_makes_matrices_of_both_shapes_nearly_orthogonal():
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
        assert values.min() > 0.3 and values.max() < 1.5


def test_the_rate_warms_up_and_has_come_down_when_the_time_is_gone():
    rates = [rate_at(i / 100) for i in range(101)]
    assert rates[0] < 0.1 and max(rates) > 0.95 and rates[100] == pytest.approx(LOWEST, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_course_ends_by_the_clock_with_the_average_of_its_weights():
    model = nn.Linear(16, 16)
    target = torch.eye(16)

    def loss():
        x = torch.randn(32, 16)
        return (model(x) - x @ target).square().mean()

    before = loss().item()
    began = time.monotonic()
    done = TimedTraining("line", model, [("a", loss), ("b", loss)], 2e-2).run(began + 2, say=lambda _: None)
    assert time.monotonic() - began < 30 and done["steps"] > 10 and set(done["losses"]) == {"a", "b"}
    assert loss().item() < before / 4 and done["trouble"] is None


def test_a_loss_that_is_no_number_ends_a_course_with_the_weights_of_before():
    model, asked = nn.Linear(16, 16), []

    def loss():
        asked.append(0)
        return model(torch.randn(4, 16)).square().mean() * (float("nan") if len(asked) > 5 else 1)

    done = TimedTraining("line", model, [("a", loss)], 1e-2).run(time.monotonic() + 60, say=lambda _: None)
    assert "no number" in done["trouble"]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
def test_a_convolution_by_frames_gives_what_that_of_volumes_gives_and_its_gradients(kernel):
    torch.manual_seed(0)
    conv, norm = CausalConv(6, 10, kernel), ChannelNorm(6, 3)
    x = torch.randn(2, 6, 5, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    results = []
    for kind in (CausalConv, FrameConv):
        conv.__class__ = kind
        conv.zero_grad()
        y = conv(x, Memory(learns=True), norm)
        y.square().sum().backward()
        results.append((y.detach(), conv.weight.grad.clone(), conv.bias.grad.clone()))
    for volumes, frames in zip(*results, strict=True):
        torch.testing.assert_close(frames, volumes, rtol=1e-4, atol=1e-4)


def test_a_clip_encoded_whole_has_the_latents_of_one_encoded_in_pieces():
    vae = vae_of(DEMO, DEMO.folder, "cpu", "fp32")
    painter = Painter("cpu")
    video, _ = painter.render(*painter.draw(2), 9)
    with torch.inference_mode():
        torch.testing.assert_close(encode_whole(vae, video), vae.encode(video)[0], rtol=1e-3, atol=1e-3)


def test_sentences_have_the_rows_that_the_encoder_gives_each_alone():
    encoder = text_encoder_of(DEMO, DEMO.folder, "cpu", "fp32")
    said = ["a red circle moves left on a gray background", "a tiny violet box"]
    rows = Sentences.encoded(encoder, [[sentence] for sentence in said], DEMO.dit_config.text_len, "cpu")
    for sentence, padded in zip(said, rows[:, 0], strict=True):
        alone = encoder(sentence)
        torch.testing.assert_close(padded[:len(alone)].float(), alone, rtol=0.02, atol=0.02)      # kept in bf16
        assert not padded[len(alone):].any()


def test_each_course_gets_its_share_of_what_is_left():
    clock = Clock(time.monotonic() + 100, {"a": 0.5, "b": 0.25, "c": 0.25})
    assert clock.until("a") - time.monotonic() == pytest.approx(50, abs=1)
    assert clock.until("b") - time.monotonic() == pytest.approx(50, abs=1)      # a ended at once, so there is more
    assert clock.until("c") - time.monotonic() == pytest.approx(100, abs=1)


def test_the_shipped_vae_is_judged_on_slow_and_fast_clips():
    quality = vae_quality(vae_of(DEMO, DEMO.folder, "cpu", "fp32"), 4, frames=9)
    assert sum(of_speed["clips"] for of_speed in quality.values()) == 4
    assert all(15 < db < 60 for of_speed in quality.values() for db in of_speed["db"])
    assert FULL_SIZES.frames == round(2 * FPS) + 1


def test_a_tiny_run_leaves_a_model_and_its_students_where_only_torch_and_transformers_are(tmp_path):
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); " \
              "import dailies.jobs.demo.train_gpu as t; sys.argv = ['x', *sys.argv[1:]]; t.main()"
    done = subprocess.run([sys.executable, "-c", blocked, "--tiny", "--device", "cpu", "--budget-s", "900", "--out",
                           str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "training.json").read_text())
    assert not [name for name in report if name.endswith("_failed")], report
    assert {"vae", "dit", "turbo", "sparse", "sparse-data"} <= set(report)
    for card in (DEMO, DEMO_TURBO, DEMO_SPARSE):
        dit_of(replace(card, folder=tmp_path / "demo"), tmp_path / "demo", "cpu", "fp32")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) <= 8


def test_the_vae_is_computed_as_it_was_when_it_has_learnt():
    vae = vae_of(DEMO, DEMO.folder, "cpu", "fp32")
    latent = torch.randn(1, 16, 2, 8, 8)
    with torch.inference_mode():
        before = vae.decode(latent)
        convolve_frames(vae, True)
        assert torch.equal(vae.decode(latent), before)
        convolve_frames(vae, False)
        assert torch.equal(vae.decode(latent), before)


def test_a_convolution_that_learns_with_what_is_before_it_compiled_learns_the_same():
    torch.manual_seed(0)
    vae = vae_of(DEMO, DEMO.folder, "cpu", "fp32").requires_grad_(True)
    rng, results = rng_of("a test", 0), []
    drawn = [around_shape(*Scene.draw(rng).render(9), rng) for _ in range(2)]
    assert {video.shape for video, _ in drawn} == {(3, 9, CROP, CROP)} and all(cover.sum() > 9 for _, cover in drawn)
    for backend in (None, "eager"):
        with convolutions_for_learning(vae, backend):
            errors, _, _ = coded_errors(vae, drawn, rng_of("a test", 1), "cpu", squares=1)
            errors.mean().backward()
        results.append((errors.detach(), torch.cat([p.grad.flatten() for p in vae.parameters()])))
        vae.zero_grad()
    (errors, gradient), (again, other) = results
    assert (errors - again).abs().mean() < 0.05 * errors.mean()         # rounded to bf16 once, where it was four times
    assert torch.cosine_similarity(gradient, other, dim=0) > 0.99
    assert {type(module) for module in vae.modules() if isinstance(module, CausalConv)} == {CausalConv}


def test_a_crop_holds_the_shape_in_the_frame_it_was_chosen_by():
    rng = rng_of("crops", 0)
    for _ in range(20):
        scene = Scene.draw(rng)
        _, whole = scene.render(1)
        _, part = around_shape(*scene.render(1), rng)
        assert part.sum() > 0.6 * whole.sum()
