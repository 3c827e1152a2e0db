"""The few-step student: its loss, a run of two steps on a few clips, and the student rendered by the actors."""

import random
import shutil
from dataclasses import replace

import pytest
import torch
from parts import dit_of, new_dit

from dailies.actors.denoiser import Denoiser
from dailies.actors.messages import Request
from dailies.actors.text_encoder import TextEncoder
from dailies.jobs.demo import distill as distill_demo
from dailies.jobs.demo import phases
from dailies.model import checkpoint
from dailies.model.catalog import DEMO, DEMO_SPARSE, DEMO_TURBO
from dailies.model.files import CheckpointError
from dailies.model.linum import keys as linum_keys
from dailies.model.schedules import rcm_sigmas
from dailies.model.shapes import VideoShape
from dailies.model.turbo import compile_blocks


def test_a_student_of_straight_courses_has_nothing_to_learn():
    """A teacher that always points at the same clean latents is followed exactly, by itself."""
    torch.manual_seed(0)
    clean = torch.randn(6, 2, 3, 4, 4)

    def oracle(x, sigma):
        return (x - clean) / sigma.view(-1, 1, 1, 1, 1)

    assert distill_demo.consistency_loss(torch.randn_like(clean), random.Random(1), oracle, oracle) < 1e-8

    def off(x, sigma):
        return oracle(x, sigma) + 1

    assert distill_demo.consistency_loss(torch.randn_like(clean), random.Random(1), oracle, off) > 0.1


def test_the_student_is_asked_at_the_places_of_its_sampler_and_the_teacher_between_them():
    asked = {"teacher": [], "student": []}

    def ask(who):
        def velocity(x, sigma):
            asked[who] += sigma.tolist()
            return torch.zeros_like(x)
        return velocity

    distill_demo.consistency_loss(torch.randn(64, 1, 1, 2, 2), random.Random(2), ask("teacher"), ask("student"))
    places = rcm_sigmas(4, DEMO_TURBO.sigma_max).tolist()
    assert {round(sigma, 5) for sigma in asked["student"]} == {round(sigma, 5) for sigma in places}
    assert len(asked["teacher"]) == 64 * distill_demo.SUBSTEPS and max(asked["teacher"]) <= places[0] + 1e-6


def few_clips(tmp_path, monkeypatch):
    """A copy of the demo model, a folder to work in, and phases of two steps on two short clips and images, whose
    blocks are traced as for the compiler, and not compiled."""
    monkeypatch.setattr(distill_demo, "learn_compiled", lambda dit, device: compile_blocks(dit, backend="aot_eager"))
    for name in ("STUDENT_PHASE", "SPARSE_PHASE", "SPARSE_DATA_PHASE"):
        monkeypatch.setattr(distill_demo, name, replace(getattr(distill_demo, name), steps=2))
    for name, value in dict(DIT_CLIPS=2, DIT_IMAGES=2, CLIP_FRAMES=5, BATCHES={1: 2, 5: 2, 7: 2, 13: 2}).items():
        monkeypatch.setattr(distill_demo, name, value)
    monkeypatch.setattr(phases, "CLIP_FRAMES", 5)
    shutil.copytree(DEMO.folder, tmp_path / "demo")
    (tmp_path / "work").mkdir()
    return tmp_path / "demo", tmp_path / "work"


def test_two_steps_of_distillation_leave_a_student_that_renders(tmp_path, monkeypatch):
    out, work = few_clips(tmp_path, monkeypatch)
    distill_demo.distill(work, out, "cpu")
    card = replace(DEMO_TURBO, folder=out)
    teacher, student = dit_of(DEMO, out, "cpu"), dit_of(card, out, "cpu")
    pairs = zip(student.parameters(), teacher.parameters(), strict=True)
    moved = [(a - b).norm() / b.norm() for a, b in pairs if a.ndim > 1]
    assert 0 < max(moved) < 0.1
    request = Request(clip_id="c" * 64, model="demo-turbo", weights_fingerprint="f", prompt="a red circle moves left",
                      negative_prompt="ugly", seed=3, shape=VideoShape(frames=5, height=64, width=64), fps=24.0,
                      num_steps=4, guidance=0.0, precision="fp32", attention="dense")
    denoiser = Denoiser(card, out)
    latent, = denoiser(TextEncoder(card, out)([request]))
    assert latent.streams["video"].shape == (16, 2, 8, 8) and latent.fallbacks == (card.negative_unused,)
    with pytest.raises(ValueError, match="1 to 4 for a distilled model"):
        denoiser(TextEncoder(card, out)([replace(request, num_steps=5)]))


def test_what_is_trained_sparse_is_what_runs_sparse(tmp_path, monkeypatch):
    out, work = few_clips(tmp_path, monkeypatch)
    distill_demo.tune_sparse(work, out, "cpu")
    card = replace(DEMO_SPARSE, folder=out)
    runs, trained = dit_of(card, out, "cpu", "fp32", "sparse"), new_dit(DEMO).requires_grad_(False)
    assert max(block.attn.proj.weight.abs().max() for block in runs.blocks) > 0
    for block in trained.blocks:
        block.attn = distill_demo.TrainedSparseAttention(block.attn, card.sparsity)
    checkpoint.load(trained, out / card.dit_file, linum_keys.LINUM, name="trained", device="cpu")
    torch.manual_seed(0)
    latent, time, rows = torch.randn(1, 16, 13, 8, 8), torch.tensor([700.0]), [torch.randn(7, 128)]
    want = trained(latent, time, trained.embed_text(rows))
    with torch.inference_mode():
        got = runs(latent, time, runs.embed_text(rows))
    assert ((got - want).norm() / want.norm()).item() < 1e-3
    with pytest.raises(CheckpointError, match="tensors missing: model.blocks.0.self_attn.proj.weight"):
        dit_of(replace(card, dit_file=DEMO.dit_file), out, "meta", "fp32")
