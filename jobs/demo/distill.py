"""Makes the demo model fast: a student of one to four steps without guidance, and one that bears sparse attention.

python -m dailies.jobs.demo.train --distill --work build/demo             writes demo_turbo/dit.safetensors beside
model/demo python -m dailies.jobs.demo.train --tune-sparse --work build/demo         writes demo_sparse/dit.safetensors

The demo model's weights are teacher and start of both.

The few-step student is a multi-step consistency model. At each of the four places where its sampler stops
(model/schedules.py, rcm_sigmas), it learns to say at once where the guided teacher's course ends: the teacher goes on
to the next place in a few Euler steps, and what the student, held fixed, says there is the target; at the last place
the teacher goes on to the clean latent. So no target is a mean over many clips, and nothing needs derivatives of the
network along the course.
Source   Song et al. 2023 (arXiv 2303.01469), with several places Heek et al. 2024 (arXiv 2403.06807); the places are
rCM's.

The sparse one first learns to give the velocity that the dense teacher gives, with a prompt and without, and then goes
on from the clips as its teacher did. All of its weights learn, and a projection of the linear branch, which begins at
zero.
Source   TurboDiffusion's tuning (arXiv 2512.16093); that from the data SLA's (arXiv 2509.24006).
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dailies.jobs.demo.learning import learn_compiled, plain_attention
from dailies.jobs.demo.losses import noised, per_clip, save_released
from dailies.jobs.demo.phases import (
    BATCHES,
    CLIP_FRAMES,
    CLIPS_MOSTLY,
    DIT_CLIPS,
    DIT_IMAGES,
    SEED,
    UNPROMPTED,
    Phase,
    encode_scenes,
    fit,
    rng_of,
)
from dailies.jobs.demo.together import noise_for, process_number, share_of
from dailies.jobs.demo.world import Scene, sentence_about
from dailies.kernels.sparse_attention import reference
from dailies.model.block import SelfAttention
from dailies.model.card import ModelCard
from dailies.model.catalog import DEMO, DEMO_SPARSE, DEMO_TURBO
from dailies.model.guidance import classifier_free
from dailies.model.layers import Linear, rotate
from dailies.model.linum import keys as linum_keys
from dailies.model.linum.load import LINUM
from dailies.model.linum.transformer import LinumDiT, TextContext
from dailies.model.schedules import rcm_sigmas
from dailies.model.text import T5TextEncoder
from dailies.model.turbo import Sparsity

STUDENT_PHASE = Phase(name="student", steps=1200, lr=5e-4, ema=0.99, cycles=2, shared=True)
SPARSE_PHASE = Phase(name="sparse", steps=1000, lr=3e-4, ema=0.99, cycles=2, shared=True)
SPARSE_DATA_PHASE = Phase(name="sparse-data", steps=6000, lr=6e-4, ema=0.99, cycles=2, shared=True)
SUBSTEPS = 3                                            # of the teacher, from one place to the next
# Of a clip's 13 latent steps each chooses three; in shorter ones it has one, whose loss would drown that of the others.
# Guidance asks at every step what the model says to no prompt, so a third of the teaching have none.
SPARSE_LENGTHS, SPARSE_UNPROMPTED = (13, 13, 13, 7, 13, 13, 13, 5), 1 / 3

Predict = Callable[[Tensor, Tensor], Tensor]            # noisy latent and sigma [B] in, velocity out


def new_student(out: Path, device: str) -> LinumDiT:
    """As the teacher in `out` is. Raises CheckpointError."""
    card = replace(DEMO, folder=out)
    return LINUM.load_dit(card, out, card.runtime(device, "fp32"))


def distill(work: Path, out: Path, device: str) -> None:
    """The few-step student.  Raises CheckpointError where there is no teacher in `out`."""
    teaching, student = TeacherSet.prepare(work, out, device), new_student(out, device)
    nothing = teaching.encoder("").to(device)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of(STUDENT_PHASE.name, step)
        data, rows = teaching.batch(step, rng)
        with torch.autocast(device, torch.bfloat16), plain_attention(device):
            told = student.embed_text(rows)
            with torch.no_grad():
                guided = teaching.teacher.embed_text(rows + [nothing] * len(rows))
            loss = consistency_loss(data, rng, lambda x, sigma: guided_velocity(teaching.teacher, x, sigma, guided),
                                    lambda x, sigma: student_velocity(student, x, sigma, told))
        return loss, dict(length=data.shape[2])

    learn_compiled(teaching.teacher, device)
    learn_compiled(student, device)
    fit(STUDENT_PHASE, student.train().requires_grad_(True), loss_of, work)
    save_dit(student, DEMO_TURBO, out)


def tune_sparse(work: Path, out: Path, device: str) -> None:
    """The model that bears sparse attention.  Raises CheckpointError where there is no teacher in `out`."""
    teaching, student = TeacherSet.prepare(work, out, device), new_student(out, device)
    for block in student.blocks:
        block.attn = TrainedSparseAttention(block.attn, DEMO_SPARSE.sparsity).to(device)

    def velocity_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of(SPARSE_PHASE.name, step)
        data, rows = teaching.batch(step, rng, SPARSE_LENGTHS, SPARSE_UNPROMPTED)
        noisy, sigma, _ = noised(data, noise_for(rng.getrandbits(62)))
        with torch.autocast(device, torch.bfloat16), plain_attention(device):
            with torch.no_grad():
                want = teaching.teacher(noisy, 1000 * sigma, teaching.teacher.embed_text(rows))
            got = student(noisy, 1000 * sigma, student.embed_text(rows))
        return F.mse_loss(got.float(), want.float()), dict(length=data.shape[2])

    def data_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of(SPARSE_DATA_PHASE.name, step)
        data, rows = teaching.batch(step, rng, unprompted=UNPROMPTED)
        noisy, sigma, noise = noised(data, noise_for(rng.getrandbits(62)))
        with torch.autocast(device, torch.bfloat16), plain_attention(device):
            got = student(noisy, 1000 * sigma, student.embed_text(rows))
        return F.mse_loss(got.float(), noise - data), dict(length=data.shape[2])

    learn_compiled(teaching.teacher, device)
    learn_compiled(student, device)
    student.train().requires_grad_(True)
    fit(SPARSE_PHASE, student, velocity_loss, work)
    fit(SPARSE_DATA_PHASE, student, data_loss, work)
    save_dit(student, DEMO_SPARSE, out)


@dataclass(frozen=True, kw_only=True)
class TeacherSet:
    """The teacher, and what it is asked about: normalised latents of drawn clips and images, with their scenes."""

    teacher: LinumDiT
    encoder: T5TextEncoder
    clips: tuple[list[Scene], Tensor]
    images: tuple[list[Scene], Tensor]

    @classmethod
    def prepare(cls, work: Path, out: Path, device: str) -> "TeacherSet":
        card = replace(DEMO, folder=out)
        teacher, vae, encoder = (load(card, out, card.runtime(device, "fp32"))
                                 for load in (LINUM.load_dit, LINUM.load_vae, LINUM.load_encoder))
        torch.manual_seed(SEED)
        scale, bias = (getattr(teacher, name).cpu().view(-1, 1, 1, 1) for name in ("latent_scale", "latent_bias"))
        scenes, clips = encode_scenes(vae, work, device, "clips", DIT_CLIPS, CLIP_FRAMES)
        pictured, images = encode_scenes(vae, work, device, "images", DIT_IMAGES, 1)
        return cls(teacher=teacher, encoder=encoder, clips=(scenes, clips * scale + bias),
                   images=(pictured, images * scale + bias))

    def batch(self, step: int, rng: random.Random, lengths: Sequence[int] = CLIPS_MOSTLY,
              unprompted: float = 0.0) -> tuple[Tensor, list[Tensor]]:
        """This process's share: latents [B, C, T, H, W] on the teacher's device, and the encoder's rows of what is
        said of each.

        lengths: in latent steps, taken in turn. unprompted: the share of which nothing is said.
        """
        length = lengths[step % len(lengths)]
        still, device = length == 1, self.teacher.latent_scale.device
        scenes, latents = self.images if still else self.clips
        picked = share_of([rng.randrange(len(scenes)) for _ in range(BATCHES[length])])
        sentences = [sentence_about(scenes[i], rng, still=still, complete=False) for i in picked]
        if unprompted:
            sentences = ["" if rng.random() < unprompted else sentence for sentence in sentences]
        rows = [self.encoder(sentence).to(device) for sentence in sentences]
        return latents[picked, :, :length].to(device), rows


class TrainedSparseAttention(SelfAttention):
    """Self-attention as model/turbo.py runs it, in plain torch, which has gradients."""

    def __init__(self, base: SelfAttention, sparsity: Sparsity):
        nn.Module.__init__(self)
        self.heads, self.sparsity = base.heads, sparsity
        self.q, self.k, self.v, self.o = base.q, base.k, base.v, base.o
        self.norm_q, self.norm_k = base.norm_q, base.norm_k
        width = base.q.out_features // base.heads
        self.proj = Linear(width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q = rotate(self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1)), rope)
        k = rotate(self.norm_k(self.k(x)).unflatten(-1, (self.heads, -1)), rope)
        v, of = self.v(x).unflatten(-1, (self.heads, -1)).to(q.dtype), self.sparsity
        y = reference.sparse_attention(q, k, v, self.proj.weight, self.proj.bias, of.keep_ratio, False, of.block_q,
                                       of.block_k)
        return y.flatten(2)


def save_dit(student: LinumDiT, card: ModelCard, out: Path) -> None:
    if process_number() > 0:
        return
    save_released(student, linum_keys.LINUM, out / card.dit_file)
    print(json.dumps({"written": str(out / card.dit_file), "bytes": (out / card.dit_file).stat().st_size}))


def consistency_loss(data: Tensor, rng: random.Random, teacher: Predict, student: Predict) -> Tensor:
    """Of clean latents [B, C, T, H, W], each noised to one of the student's places.

    In units of velocity, as the teacher was trained: the difference of clean latents over sigma.
    """
    places = rcm_sigmas(DEMO_TURBO.max_steps, DEMO_TURBO.sigma_max).float()
    generator = noise_for(rng.getrandbits(62))
    noise = torch.randn(data.shape, generator=generator).to(data.device)
    place = torch.randint(len(places) - 1, (len(data),), generator=generator)
    return loss_at(places[place].to(data.device), places[place + 1].to(data.device), data, noise, teacher, student)


def loss_at(here: Tensor, there: Tensor, data: Tensor, noise: Tensor, teacher: Predict, student: Predict) -> Tensor:
    """here, there: sigmas [B] of each clip's place and of the next one."""
    here, there = per_clip(here), per_clip(there)
    noisy = torch.lerp(data, noise, here)
    with torch.no_grad():
        x, sigma = noisy, here
        for part in range(1, SUBSTEPS + 1):
            next_sigma = here + (there - here) * (part / SUBSTEPS)
            x = x + (next_sigma - sigma) * teacher(x, sigma.flatten())
            sigma = next_sigma
        target = torch.where(there > 0, x - there * student(x, there.flatten()), x)
    clean = noisy - here * student(noisy, here.flatten())
    return ((clean - target) / here).square().mean()


def guided_velocity(teacher: LinumDiT, x: Tensor, sigma: Tensor, texts: TextContext) -> Tensor:
    """texts: of the prompts, then of no prompt."""
    cond, uncond = teacher(x.repeat(2, 1, 1, 1, 1), 1000 * sigma.repeat(2), texts).chunk(2)
    return classifier_free(cond, uncond, DEMO.guidance)


def student_velocity(student: LinumDiT, x: Tensor, sigma: Tensor, texts: TextContext) -> Tensor:
    """Given the timesteps that its sampler will give it, those of `rcm_timestep`."""
    return student(x, (1000 * sigma.float()).bfloat16().float(), texts)
