"""Improves the demo model on a GPU within a budget of seconds, and writes what it learnt.

python -m dailies.jobs.demo.train_gpu --budget-s 150 --out build/demo_gpu

It begins with the weights that are shipped: first the VAE, on whole clips, then the DiT on the new VAE's latents, then
the few-step student and the one for sparse attention, on the new DiT. The text encoder stays. Each training ends by the
clock and is written at once, in the layout of model/: whatever time or trouble leaves out, what is written fits
together (`training.json` says what was done, `training.log` how it went). A VAE that is no better than the shipped one
is not used.

Nothing is read from the host on the way: scenes are drawn, and noise and sentences chosen, on the device.
"""

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.jobs.demo.distill import (
    SPARSE_LENGTHS,
    SPARSE_UNPROMPTED,
    TrainedSparseAttention,
    guided_velocity,
    loss_at,
    save_dit,
    student_velocity,
)
from dailies.jobs.demo.losses import KL_WEIGHT, autoencode, divergence, noised, save_released, weighted_errors
from dailies.jobs.demo.phases import CLIPS_MOSTLY, SEED, UNPROMPTED, rng_of
from dailies.jobs.demo.training import Loss, TimedTraining
from dailies.jobs.demo.vae_quality import vae_quality
from dailies.jobs.demo.world import SCENE_KINDS, SEEN_KINDS, Painter, Scene, sentence_about
from dailies.model.catalog import DEMO, DEMO_SPARSE, DEMO_TURBO
from dailies.model.convolution import as_clip, as_frames, convolve
from dailies.model.linum.load import LINUM
from dailies.model.linum.transformer import LinumDiT
from dailies.model.schedules import rcm_sigmas
from dailies.model.text import T5TextEncoder
from dailies.model.wan import keys as wan_keys
from dailies.model.wan.vae import CausalConv, ChannelNorm, Memory, WanVAE

# Shares of the time that is left once all is loaded: the VAE bounds what any sampler can show, and learns slowest.
SHARES = {"vae": 0.42, "latents": 0.05, "dit": 0.29, "turbo": 0.13, "sparse": 0.06, "sparse-data": 0.05}
RATES = dict(vae=2e-3, dit=2e-3, turbo=5e-4, sparse=5e-4)
ENCODE_SHARE = 0.15                                     # of the DiT's time, for clips that it has not seen yet
GRACE_S = 8                                             # for a training that does not end by the clock


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is done at a time: what fills a GPU, or next to nothing."""

    frames: int = 49                                    # of a clip; others are of the lengths below
    vae_clips: tuple[int, ...] = (16, 8, 4)             # samples of 49 frames in a step: the first that leaves time for
    vae_steps: int = 600                               # so many steps
    clips: dict[int, int]                               # latent steps of a sample -> samples in a step of the DiT
    pool_clips: int                                     # latents kept, at most
    pool_images: int
    encoded: int                                        # clips encoded at a time
    sentences: int                                      # about each kind of scene; of images a quarter of it
    judged: int                                         # unseen clips that VAEs are compared on
    most_steps: int | None = None


FULL_SIZES = Sizes(clips={13: 64, 7: 112, 5: 160, 1: 768}, pool_clips=12288, pool_images=32768, encoded=32,
                   sentences=48,
             judged=64)
TINY_SIZES = Sizes(frames=9, vae_clips=(1,), vae_steps=1, clips={13: 2, 7: 2, 5: 2, 1: 2}, pool_clips=2, pool_images=8,
             encoded=2, sentences=1, judged=2, most_steps=2)


class Clock:
    """Hands each training its share of the time that is left for it and those after it."""

    def __init__(self, ends: float, shares: dict[str, float]):
        self.ends, self.shares = ends, dict(shares)

    def until(self, name: str) -> float:
        now, share, all_shares = time.monotonic(), self.shares[name], sum(self.shares.values())
        del self.shares[name]
        return now + (self.ends - now) * share / all_shares


class TrainingLog:
    """What was done and how it went, in two files that are rewritten as it goes."""

    def __init__(self, folder: Path, about: dict[str, Any], began: float):
        self.folder, self.began, self.parts = folder, began, dict(about)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / "training.log").open("w")

    def say(self, text: str) -> None:
        line = f"{time.monotonic() - self.began:7.1f} {text}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def add(self, name: str, value: Any) -> None:
        self.parts[name] = value
        (self.folder / "training.json").write_text(json.dumps(self.parts, indent=2) + "\n")
        self.say(f"{name}: {json.dumps(value)}")


# The VAE.

class FrameConv(CausalConv):
    """A convolution in space and time as one in space, over the frames it sees, side by side in the channels.

    The same sums; cuDNN has faster kernels for pictures than for volumes of few channels. Only for learning.
    """

    def forward(self, x: Tensor, memory: Memory, norm: ChannelNorm | None = None) -> Tensor:
        if not memory.learns:
            return super().forward(x, memory, norm)
        taps, frames = self.kernel_size[0], x.shape[2]
        x = F.pad(F.silu(norm(x)) if norm else x, (0, 0, 0, 0, taps - 1, 0))
        seen = torch.cat([x[:, :, tap:tap + frames] for tap in range(taps)], dim=1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        return as_clip(F.conv2d(as_frames(seen), weight, self.bias, padding=self.padding[1:]), len(x))


def convolve_frames(vae: WanVAE, by_frames: bool) -> None:
    """Set how the convolutions are computed while it learns."""
    for module in vae.modules():
        if isinstance(module, CausalConv):
            module.__class__ = FrameConv if by_frames else CausalConv


def vae_loss(vae: WanVAE, painter: Painter, clips: int, frames: int, total: int, device: str) -> Loss:
    """Of `clips` samples of so many frames, anywhere in a clip of `total`: error of pixels, most of it on the shape."""
    config = vae.config
    latent = (config.latent_channels, (frames - 1) // config.time_stride + 1)

    def loss() -> Tensor:
        kinds, variation = painter.draw(clips)
        start = torch.randint(total - frames + 1, (clips,), device=device)
        video, coverage = painter.render(kinds, variation, frames, start=start, total=total)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        noise = torch.randn(clips, *latent, *(side // config.space_stride for side in video.shape[3:]), device=device)
        with torch.autocast(device, torch.bfloat16):
            decoded, mean, log_variance = autoencode(vae, video, noise)
        error = decoded.float() - video
        # the square counts most: a wrong colour is to cost more than many small errors
        return weighted_errors(error, coverage, squares=2).mean() + KL_WEIGHT * divergence(mean, log_variance)
    return loss


def vae_training(vae: WanVAE, painter: Painter, clips: int, sizes: Sizes, device: str) -> TimedTraining:
    long, short, still = ((f"{f} frames", vae_loss(vae, painter, n, f, sizes.frames, device))
                          for f, n in ((sizes.frames, clips), ((sizes.frames + 1) // 2 // 4 * 4 + 1, 2 * clips),
                                       (1, 16 * clips)))
    return TimedTraining("vae", vae, (long, long, short, long, long, still, long, long), RATES["vae"])


def train_vae_by_clock(vae: WanVAE, painter: Painter, sizes: Sizes, device: str, until: float, record: TrainingLog,
              trial: "Trial") -> dict[str, Any]:
    """Train it in place; returns what was done."""
    clips, about = sizes.vae_clips[0], {}
    if device == "cuda":
        clips, about = fastest_convolutions(vae, painter, sizes, device, until, record)
    training = vae_training(vae, painter, clips, sizes, device)
    done = training.run(until, most_steps=sizes.most_steps, say=record.say, may_record=lambda: "vae" in trial.passed())
    return done | dict(clips=clips) | about


def fastest_convolutions(vae: WanVAE, painter: Painter, sizes: Sizes, device: str, until: float,
                         record: TrainingLog) -> tuple[int, dict[str, Any]]:
    """Try the ways to compute the convolutions, leave the fastest set; returns samples a step, and which it is."""
    most, began = 2 * sizes.vae_clips[0], time.monotonic()                      # so many that the GPU bounds the time
    loss, found = vae_loss(vae, painter, most, sizes.frames, sizes.frames, device), {}
    torch.backends.cudnn.benchmark_limit = 4

    def seconds(steps: int) -> float:
        torch.cuda.synchronize()
        start = time.monotonic()
        for _ in range(steps):
            loss().backward()
            vae.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return (time.monotonic() - start) / steps

    for by_frames, timed in ((True, False), (True, True), (False, False), (False, True)):
        if time.monotonic() - began > 0.12 * (until - began):
            break
        convolve_frames(vae, by_frames)
        torch.backends.cudnn.benchmark = timed
        try:
            first = seconds(1)                          # chooses kernels
            if first < 4 or not found:
                found[by_frames, timed] = seconds(2)
        except RuntimeError as error:
            record.say(f"vae: convolutions by frames {by_frames}, kernels timed {timed}: {error}")
    if not found:
        raise RuntimeError("no way to compute the VAE's convolutions ran on this device; the lines before say why")
    by_frames, torch.backends.cudnn.benchmark = best = min(found, key=found.get)
    convolve_frames(vae, by_frames)
    left = until - time.monotonic()
    clips = next((n for n in sizes.vae_clips if left / (found[best] * n / most) >= sizes.vae_steps),
                 sizes.vae_clips[-1])
    measured = {("frames" if frames else "volumes") + (", timed" if timed else ""): round(s, 4)
                for (frames, timed), s in found.items()}
    record.add("vae_convolutions", dict(clips=most, seconds=measured))
    return clips, dict(by_frames=by_frames)


# The DiT: text and latents that are there before it begins.

class Sentences:
    """The encoder's rows of many sentences about every kind of scene that training may see, on the device."""

    def __init__(self, encoder: T5TextEncoder, count: int, device: str):
        rng, length = rng_of("sentences", 0), DEMO.dit_config.text_len
        scenes = [Scene(**SCENE_KINDS[i]) for i in SEEN_KINDS]
        self.place = torch.zeros(len(SCENE_KINDS), dtype=torch.long, device=device)        # kind -> its place here
        self.place[list(SEEN_KINDS)] = torch.arange(len(SEEN_KINDS), device=device)
        self.rows = [self.encoded(encoder, [[sentence_about(scene, rng, still=still, complete=False) for _ in range(n)]
                                            for scene in scenes], length, device)
                     for still, n in ((False, count), (True, max(1, count // 4)))]
        self.nothing = self.encoded(encoder, [[""]], length, device)[0]                    # [1, L, E]

    @staticmethod
    @torch.no_grad()
    def encoded(encoder: T5TextEncoder, sentences: list[list[str]], length: int, device: str) -> Tensor:
        """[kinds, sentences, L, E], zero past each sentence's end."""
        rows, flat = [], [sentence for of_kind in sentences for sentence in of_kind]
        for start in range(0, len(flat), 4096):
            ids, mask = encoder.tokenizer.padded(flat[start:start + 4096], device, length)
            said = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
            rows.append(F.pad(said, (0, 0, 0, length - said.shape[1])).to(torch.bfloat16))
        return torch.cat(rows).unflatten(0, (len(sentences), -1))

    def about(self, kinds: Tensor, still: bool, unprompted: float = 0.0) -> Tensor:
        """[B, L, E]: of each scene some sentence, or nothing said, for this share of them."""
        rows = self.rows[still]
        picked = rows[self.place[kinds], torch.randint(rows.shape[1], kinds.shape, device=kinds.device)]
        if unprompted:
            silent = torch.rand(kinds.shape, device=kinds.device) < unprompted
            picked = torch.where(silent[:, None, None], self.nothing, picked)
        return picked


class Latents:
    """Latents of drawn clips and images, with the kinds of their scenes, on the device; old ones give way to new."""

    def __init__(self, vae: WanVAE, painter: Painter, sizes: Sizes, device: str):
        self.vae, self.painter, self.sizes, self.device = vae, painter, sizes, device
        channels, side = vae.config.latent_channels, DEMO.resolutions["64p"][0] // vae.config.space_stride
        self.steps = {False: (sizes.frames - 1) // vae.config.time_stride + 1, True: 1}
        self.kinds = {still: torch.zeros(n, dtype=torch.long, device=device)
                      for still, n in ((False, sizes.pool_clips), (True, sizes.pool_images))}
        self.coded = {still: torch.zeros(len(kinds), channels, self.steps[still], side, side, device=device)
                      for still, kinds in self.kinds.items()}
        self.filled, self.drawn = {False: 0, True: 0}, {False: 0, True: 0}
        self.scale, self.bias = torch.ones(channels, device=device), torch.zeros(channels, device=device)

    @torch.no_grad()
    def draw(self, still: bool) -> None:
        """Encode some new scenes, in the place of the oldest where there is no room."""
        size = len(self.kinds[still])
        count = min(size, self.sizes.encoded * (16 if still else 1))
        kinds, variation = self.painter.draw(count)
        frames = 1 if still else self.sizes.frames
        video, _ = self.painter.render(kinds, variation, frames, total=self.sizes.frames)
        with torch.autocast(self.device, torch.bfloat16):
            coded = encode_whole(self.vae, video.contiguous(memory_format=torch.channels_last_3d)).float()
        at = (self.drawn[still] + torch.arange(count, device=self.device)) % size
        self.kinds[still][at], self.coded[still][at] = kinds, coded
        self.drawn[still] += count
        self.filled[still] = min(size, self.drawn[still])

    def fill(self, until: float) -> None:
        """As many as there is room or time for, and the statistics of the clips' latents."""
        while self.filled[True] < len(self.kinds[True]) or self.filled[False] < len(self.kinds[False]):
            for still in (False, True):
                if self.filled[still] < len(self.kinds[still]):
                    self.draw(still)
            if self.device == "cuda":
                torch.cuda.synchronize()
            if time.monotonic() > until:
                break
        for still, count in self.filled.items():        # what is drawn from now on takes the place of what is there
            self.kinds[still], self.coded[still] = self.kinds[still][:count], self.coded[still][:count]
        seen = self.coded[False]
        self.scale = 0.5 / seen.std(dim=(0, 2, 3, 4))   # mean 0 and standard deviation 0.5, as Linum's latents
        self.bias = -seen.mean(dim=(0, 2, 3, 4)) * self.scale

    def renewal(self, began: float) -> Callable[[], None]:
        """To be called between steps: encodes new scenes for a share of the time since `began`."""
        spent_s = 0.0

        def between() -> None:
            nonlocal spent_s
            start = time.monotonic()
            if spent_s < ENCODE_SHARE * (start - began):
                self.draw(False)
                self.draw(True)
                if self.device == "cuda":
                    torch.cuda.synchronize()
                spent_s += time.monotonic() - start
        return between

    def batch(self, count: int, steps: int) -> tuple[Tensor, Tensor]:
        """Normalised latents [B, C, T, H, W], T at most `steps`, and the kinds of their scenes [B]."""
        still = steps == 1
        at = torch.randint(self.filled[still], (count,), device=self.device)
        data = self.coded[still][at, :, :steps] * self.scale.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1, 1)
        return data, self.kinds[still][at]


def encode_whole(vae: WanVAE, video: Tensor) -> Tensor:
    """Means of the latents: vae.encode, but every layer takes all of the clip at once, which keeps a GPU busy."""
    whole = Memory(learns=True)
    moments = convolve(vae.to_moments, vae.encoder.finish(vae.encoder.begin(video, whole), whole))
    return moments.chunk(2, dim=1)[0]


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What the DiT and those made of it learn from."""

    latents: Latents
    sentences: Sentences
    sizes: Sizes
    device: str

    def losses(self, lengths: tuple[int, ...], of: Callable[[Tensor, Tensor], Tensor], unprompted: float,
               name: str = "") -> list[tuple[str, Loss]]:
        """of: the loss, of latents [B, C, T, H, W] and rows of text [B, L, E]."""
        def loss_for(length: int) -> Loss:
            def loss() -> Tensor:
                data, kinds = self.latents.batch(self.sizes.clips[length], length)
                rows = self.sentences.about(kinds, length == 1, unprompted)
                with torch.autocast(self.device, torch.bfloat16):
                    return of(data, rows.float())
            return loss
        return [(f"{name}{length}", loss_for(length)) for length in lengths]


def flow_loss(dit: LinumDiT) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(data: Tensor, rows: Tensor) -> Tensor:
        noisy, sigma, noise = noised(data)
        return F.mse_loss(dit(noisy, 1000 * sigma, dit.embed_rows(rows)).float(), noise - data)
    return loss


def student_loss(student: LinumDiT, teacher: LinumDiT, nothing: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    places = rcm_sigmas(DEMO_TURBO.max_steps, DEMO_TURBO.sigma_max).float().to(nothing.device)

    def loss(data: Tensor, rows: Tensor) -> Tensor:
        told = student.embed_rows(rows)
        with torch.no_grad():
            guided = teacher.embed_rows(torch.cat((rows, nothing.to(rows.dtype).expand_as(rows))))
        place = torch.randint(len(places) - 1, (len(data),), device=data.device)
        return loss_at(places[place], places[place + 1], data, torch.randn_like(data),
                       lambda x, sigma: guided_velocity(teacher, x, sigma, guided),
                       lambda x, sigma: student_velocity(student, x, sigma, told))
    return loss


def imitation_loss(student: LinumDiT, teacher: LinumDiT) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(data: Tensor, rows: Tensor) -> Tensor:
        noisy, sigma, _ = noised(data)
        with torch.no_grad():
            want = teacher(noisy, 1000 * sigma, teacher.embed_rows(rows))
        return F.mse_loss(student(noisy, 1000 * sigma, student.embed_rows(rows)).float(), want.float())
    return loss


def made_sparse(dit: LinumDiT, device: str) -> LinumDiT:
    student = copy.deepcopy(dit).requires_grad_(True)
    for block in student.blocks:
        block.attn = TrainedSparseAttention(block.attn, DEMO_SPARSE.sparsity).to(device)
    return student


def trainings_after(dit: LinumDiT, training_data: TrainingData,
                    device: str) -> Iterator[tuple[str, LinumDiT, TimedTraining]]:
    """The student, the sparse one's two parts: what is trained when the DiT is."""
    teacher = copy.deepcopy(dit).requires_grad_(False)
    turbo = copy.deepcopy(dit).requires_grad_(True)
    yield "turbo", turbo, TimedTraining("turbo", turbo, training_data.losses(
        CLIPS_MOSTLY, student_loss(turbo, teacher, training_data.sentences.nothing), 0.0), RATES["turbo"])
    sparse = made_sparse(dit, device)
    yield "sparse", sparse, TimedTraining("sparse", sparse, training_data.losses(
        SPARSE_LENGTHS, imitation_loss(sparse, teacher), SPARSE_UNPROMPTED), RATES["sparse"])
    yield "sparse-data", sparse, TimedTraining("sparse-data", sparse, training_data.losses(
        CLIPS_MOSTLY, flow_loss(sparse), UNPROMPTED), RATES["sparse"])


# Whether steps can be recorded is tried by a process of its own while the VAE learns: one that cannot be may leave the
# device's state beyond use.

def try_recording(sizes: Sizes, device: str) -> None:
    """Prints the name of each training whose steps could be recorded and replayed."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, 4
    dit = LINUM.load_dit(DEMO, DEMO.folder, DEMO.runtime(device, "fp32")).requires_grad_(True)
    small = replace(sizes, sentences=1, pool_clips=64, pool_images=64)
    latents = Latents(LINUM.load_vae(DEMO, DEMO.folder, DEMO.runtime(device, "fp32")), Painter(device), small, device)
    for still, coded in latents.coded.items():
        coded.normal_()
        latents.kinds[still].fill_(SEEN_KINDS[0])
        latents.filled[still] = len(coded)
    sentences = Sentences(LINUM.load_encoder(DEMO, DEMO.folder, DEMO.runtime(device, "fp32")), 1, device)
    training_data = TrainingData(latents=latents, sentences=sentences, sizes=small, device=device)
    vae = latents.vae.requires_grad_(True)
    convolve_frames(vae, True)
    trainings = [("vae", vae, vae_training(vae, latents.painter, 2, sizes, device)),
                 ("dit", dit, dit_training(dit, training_data))]
    for name, model, training in itertools.chain(trainings, trainings_after(dit, training_data, device)):
        training.record()
        before = [p.detach().clone() for p in model.parameters()]
        done = training.run(time.monotonic() + 60, most_steps=16, say=lambda _: None)
        moved = sum((p - was).abs().sum().item() for p, was in zip(model.parameters(), before, strict=True))
        if done["trouble"] is None and 0 < moved < float("inf"):
            print(json.dumps(dict(training=name, ms=1e3 * done["seconds"] / done["steps"], losses=done["losses"])),
                  flush=True)


def dit_training(dit: LinumDiT, training_data: TrainingData) -> TimedTraining:
    return TimedTraining("dit", dit, training_data.losses(CLIPS_MOSTLY, flow_loss(dit), UNPROMPTED), RATES["dit"])


class Trial:
    """try_recording() in another process: which trainings can be recorded, as far as it is known when it is asked."""

    def __init__(self, folder: Path, wanted: bool):
        self.path, self.process = folder / "recording.log", None
        if wanted:
            with self.path.open("w") as out:
                self.process = subprocess.Popen([sys.executable, "-m", "dailies.jobs.demo.train_gpu",
                                                 "--try-recording"],
                                                stdout=out, stderr=subprocess.STDOUT)

    def passed(self) -> dict[str, Any]:
        written = self.path.read_text() if self.process else ""
        whole = written[:written.rfind("\n") + 1].splitlines()
        said = [json.loads(line) for line in whole if line.startswith('{"training"')]
        return {line["training"]: line for line in said}

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# All of it.

def train(out: Path, device: str, clock: Clock, sizes: Sizes, record: TrainingLog, *, frozen: bool,
          trial: Trial) -> None:
    torch.manual_seed(SEED)
    painter = Painter(device)
    vae = LINUM.load_vae(DEMO, DEMO.folder, DEMO.runtime(device, "fp32"))
    shipped = copy.deepcopy(vae)
    before = vae_quality(shipped, sizes.judged, frames=sizes.frames, device=device)
    record.add("vae_shipped", before)
    vae.requires_grad_(True)
    if frozen:
        for part in (vae.encoder, vae.to_moments):
            part.requires_grad_(False)
    done = guarded(record, "vae",
                   lambda: train_vae_by_clock(vae, painter, sizes, device, clock.until("vae"), record, trial))
    vae.requires_grad_(False)
    after = vae_quality(vae, sizes.judged, frames=sizes.frames, device=device)
    better = done is not None and worst(after) > worst(before)
    record.add("vae", dict(quality=after, better=better, **(done or {})))
    if not better:
        convolve_frames(shipped, isinstance(vae.encoder.conv_in, FrameConv))
        vae = shipped
    torch.backends.cudnn.benchmark = device == "cuda"    # few shapes are left; as when recording was tried

    sentences = Sentences(LINUM.load_encoder(DEMO, DEMO.folder, DEMO.runtime(device, "fp32")), sizes.sentences, device)
    latents = Latents(vae, painter, sizes, device)
    latents.fill(clock.until("latents"))
    record.add("latents", dict(clips=latents.filled[False], images=latents.filled[True]))
    training_data = TrainingData(latents=latents, sentences=sentences, sizes=sizes, device=device)
    dit = LINUM.load_dit(DEMO, DEMO.folder, DEMO.runtime(device, "fp32")).requires_grad_(True)
    dit.latent_scale.copy_(latents.scale)
    dit.latent_bias.copy_(latents.bias)
    training = dit_training(dit, training_data)
    done = guarded(record, "dit", lambda: learn(training, clock.until("dit"), training_data, record, trial))
    if done is None:
        return
    if better:                                          # with the DiT that knows its latents, and not before
        save_released(vae, wan_keys.WAN_VAE, out / "demo" / DEMO.vae_file)
    save_dit(dit, DEMO, out / "demo")
    dit.requires_grad_(False)
    for name, model, training in trainings_after(dit, training_data, device):
        done = guarded(record, name, partial(learn, training, clock.until(name), training_data, record, trial))
        if done is not None:
            save_dit(model, DEMO_TURBO if name == "turbo" else DEMO_SPARSE, out / "demo")


def learn(training: TimedTraining, until: float, training_data: TrainingData, record: TrainingLog,
          trial: Trial) -> dict[str, Any]:
    done = training.run(until, most_steps=training_data.sizes.most_steps,
                        between=training_data.latents.renewal(time.monotonic()),
                      may_record=lambda: training.name in trial.passed(), say=record.say)
    return done | dict(clips_drawn=training_data.latents.drawn[False])


def guarded(record: TrainingLog, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What the work returns, or None when it fails: then what was made before it stands."""
    try:
        done = work()
    except Exception as error:                          # whatever it is, the trainings before it are not to be lost
        record.add(f"{name}_failed", f"{type(error).__name__}: {error}"[:2000])
        return None
    record.add(name, done)
    return done


def worst(quality: dict[str, Any]) -> float:
    return min(min(of_speed["db"]) for of_speed in quality.values())


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=150.0, help="seconds, without importing torch")
    parser.add_argument("--out", type=Path, default=Path("build/demo_gpu"), help="where weights, report and log go")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--freeze-encoder", action="store_true", help="the VAE's decoder alone learns: latents stay")
    parser.add_argument("--tiny", action="store_true", help="a few steps on next to nothing, to see that it runs")
    parser.add_argument("--try-recording", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = TINY_SIZES if args.tiny else FULL_SIZES
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.try_recording:
        return try_recording(sizes, args.device)
    about = dict(device=torch.cuda.get_device_name() if args.device == "cuda" else "CPU", torch=torch.__version__,
                 python=sys.version.split()[0], budget_s=args.budget_s, frozen_encoder=args.freeze_encoder)
    record = TrainingLog(args.out, about, began)
    trial = Trial(args.out, wanted=args.device == "cuda")
    last = threading.Timer(args.budget_s + GRACE_S, give_up, [record, trial])
    last.daemon = True
    last.start()
    try:
        clock = Clock(began + args.budget_s, SHARES)
        train(args.out, args.device, clock, sizes, record, frozen=args.freeze_encoder, trial=trial)
    finally:
        trial.end()
    record.add("seconds", round(time.monotonic() - began, 1))


def give_up(record: TrainingLog, trial: Trial) -> None:
    """A training that hangs cannot be ended from within; what the others wrote is there."""
    trial.end()
    record.say("over the budget: a training did not end by the clock. What was written before it stands")
    os._exit(3)


if __name__ == "__main__":
    main()
