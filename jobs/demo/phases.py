"""How a phase of the demo model's training goes on CPU cores, in steps, and the scenes that its DiTs learn from."""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dailies.jobs.demo.together import alone, average_gradients, num_processes, process_number, wait_for_all
from dailies.jobs.demo.world import Scene
from dailies.model.wan.vae import WanVAE

SEED = 20
CLIP_FRAMES = 49                                             # of a training clip: 2 s, the demo's longest
DIT_CLIPS, DIT_IMAGES, UNPROMPTED = 4000, 8000, 0.1
# What a step trains on: latent steps per sample -> samples, about as many tokens each.  A thing's shape is learnt from
# images, a thirteenth of a clip's tokens; its motion from clips.
BATCHES = {1: 192, 5: 40, 7: 28, 13: 16}
CLIPS_MOSTLY = (13, 7, 13, 1, 13, 7, 13, 5)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One thing that is trained: its steps, and how fast it learns."""

    name: str
    steps: int
    lr: float
    warmup: int = 50
    ema: float = 0.998                                  # share of the running average of the weights kept each step
    cycles: int = 1                                     # how often the learning rate goes from the top to the bottom
    shared: bool = False                                # a loss is of this process's share of a batch alone

    def lr_at(self, step: int) -> float:
        """In each cycle a linear warm-up, then a cosine down to 2 %."""
        length = self.steps / self.cycles
        step = step % length
        return self.lr * min(1.0,
                             (step + 1) / self.warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / length)))


class Optimizers:
    """Muon for the weights of inner layers, AdamW for the rest (biases, gains, embeddings, first and last layers).

    On the VAE's first 240 batches of images Muon reached 24.2 dB, AdamW at its best rate of three 17 dB after 475.
    """

    def __init__(self, model: nn.Module, lr: float):
        self.matrices, rest = [], []
        for name, p in model.named_parameters():
            if is_inner(name, p):
                self.matrices.append((p, nn.Parameter(as_matrix(p.data))))
            else:
                rest.append(p)
        self.adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.muon = torch.optim.Muon([m for _, m in self.matrices], lr=lr, weight_decay=0.0,
                                     adjust_lr_fn="match_rms_adamw")

    def step(self, lr: float) -> None:
        for p, matrix in self.matrices:
            matrix.grad = None if p.grad is None else as_matrix(p.grad)
        for optimizer in (self.adam, self.muon):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def state_dict(self) -> dict:
        return dict(adam=self.adam.state_dict(), muon=self.muon.state_dict())

    def load_state_dict(self, state: dict) -> None:
        self.adam.load_state_dict(state["adam"])
        self.muon.load_state_dict(state["muon"])


def is_inner(name: str, p: Tensor) -> bool:
    """Whether Muon trains this parameter."""
    outer = ("conv_in", "conv_out", "embed", "head", "shared", "_in.")
    matrix = p.ndim >= 2 and p[0].numel() > 1 and min(len(p), p[0].numel()) > 8
    return matrix and name.rpartition(".")[2] != "modulation" and not any(part in name for part in outer)


def as_matrix(weight: Tensor) -> Tensor:
    """[out, everything else], a view of the same memory, whichever of the two layouts a convolution's weight has."""
    return weight.movedim(1, -1).view(len(weight),
                                      -1) if weight.ndim > 2 and weight.stride(1) == 1 else weight.view(len(weight), -1)


def rng_of(phase: str, step: int) -> random.Random:
    return random.Random(f"{SEED} {phase} {step}")


def fit(phase: Phase, model: nn.Module, loss_of: Callable[[int], tuple[Tensor, dict[str, float]]], work: Path) -> None:
    """Train `model` in place to the running average of its weights; continues from `work` when an earlier run stopped
    there. Of several processes all train, or the first alone."""
    if phase.shared:
        return take_steps(phase, model, loss_of, work)
    with alone():                                       # where the others come in, all steps are in `work`
        take_steps(phase, model, loss_of, work)


def take_steps(phase: Phase, model: nn.Module, loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
               work: Path) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    path = work / f"{phase.name}.pt"
    optimizer = Optimizers(model, phase.lr)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step = saved["average"], saved["step"]

    def save() -> None:
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), average=average, step=step)
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    first = process_number() == 0
    log, saved_at = (work / f"{phase.name}.log").open("a"), time.monotonic()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[said]}"), disable=not first)
    with bar, log:
        task = bar.add_task(phase.name, total=phase.steps, completed=step, said="")
        while step < phase.steps:
            loss, seen = loss_of(step)
            model.zero_grad(set_to_none=True)
            loss.backward()
            if phase.shared:
                average_gradients(model)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if torch.isfinite(norm):                    # one bad batch must not end the night
                optimizer.step(phase.lr_at(step))
            with torch.no_grad():
                keep = min(phase.ema, (step + 1) / (step + 10))
                for name, p in model.named_parameters():
                    average[name].lerp_(p, 1 - keep)
            step += 1
            if step % 25 == 0 and first:
                said = " ".join(f"{name} {value:.4g}" for name, value in {"loss": loss.item(), **seen}.items())
                bar.update(task, completed=step, said=said)
                print(time.strftime("%H:%M:%S"), step, said, file=log, flush=True)
            if first and (time.monotonic() - saved_at > 60 or step == phase.steps):
                save()
                saved_at = time.monotonic()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(average[name])


def is_trained(phase: Phase, work: Path) -> bool:
    """Whether all its steps are done there."""
    path = work / f"{phase.name}.pt"
    return path.exists() and torch.load(path, weights_only=True, mmap=True)["step"] >= phase.steps


@torch.no_grad()
def encode_scenes(vae: WanVAE, work: Path, device: str, name: str, count: int, frames: int) -> tuple[list[Scene],
                                                                                                     Tensor]:
    """`count` scenes and the latents [N, C, T, H, W] of their first `frames` frames, not normalised; kept in `work` in
    parts, so that an interruption costs no more than one, and several processes share the work."""
    rng = rng_of(name, 0)
    scenes = [Scene.draw(rng) for _ in range(count)]
    batch = 8 * CLIP_FRAMES // frames
    paths = {start: work / f"{name}-{start:05}.pt" for start in range(0, count, batch)}
    for start, path in list(paths.items())[process_number()::num_processes()]:
        if not path.exists():
            video = torch.stack([scene.render(frames, total=CLIP_FRAMES)[0]
                                 for scene in scenes[start:start + batch]]).to(device)
            with torch.autocast(device, torch.bfloat16):
                torch.save(vae.encode(video)[0].float().cpu(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            print(f"\rencoded {min(start + batch, count)} of {count} {name}", end="", flush=True)
    wait_for_all()
    return scenes, torch.cat([torch.load(path, weights_only=True) for path in paths.values()])
