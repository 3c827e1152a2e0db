"""Trains the demo model from nothing, on clips that `jobs.demo.world` draws: tokenizer, text encoder, VAE, DiT, in this order.

`python -m jobs.train_demo --work build/demo` takes about two hours on 2 CPU cores, minutes on a GPU. Every batch is a
function of (seed, phase, step), progress is saved once a minute, and the same command continues after an interruption.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.demo.world import SIZE, Scene, describe
from model.wan_vae import WanVAE, WanVAEConfig

SEED = 20
VAE = WanVAEConfig(width=16, res_blocks=1)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One thing that is trained: its steps, and how fast it learns."""

    name: str
    steps: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.0
    ema: float = 0.998                                  # share of the running average of the weights kept each step

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to 2 %."""
        progress = min(1.0, step / self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))


def rng_of(phase: str, step: int) -> random.Random:
    return random.Random(f"{SEED} {phase} {step}")


def fit(phase: Phase, model: nn.Module, loss_of: Callable[[int], tuple[Tensor, dict[str, float]]], work: Path) -> None:
    """Train `model` in place to the running average of its weights; continues from `work` when an earlier run stopped there."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    path = work / f"{phase.name}.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.lr, betas=(0.9, 0.99), weight_decay=phase.weight_decay)
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

    log, saved_at = (work / f"{phase.name}.log").open("a"), time.monotonic()
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                   TextColumn("{task.fields[said]}"))
    with bar, log:
        task = bar.add_task(phase.name, total=phase.steps, completed=step, said="")
        while step < phase.steps:
            for group in optimizer.param_groups:
                group["lr"] = phase.lr_at(step)
            loss, seen = loss_of(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if torch.isfinite(norm):                    # one bad batch must not end the night
                optimizer.step()
            with torch.no_grad():
                keep = min(phase.ema, (step + 1) / (step + 10))
                for name, p in model.named_parameters():
                    average[name].lerp_(p, 1 - keep)
            step += 1
            if step % 25 == 0:
                said = " ".join(f"{name} {value:.4g}" for name, value in {"loss": loss.item(), **seen}.items())
                bar.update(task, completed=step, said=said)
                print(time.strftime("%H:%M:%S"), step, said, file=log, flush=True)
            if time.monotonic() - saved_at > 60 or step == phase.steps:
                save()
                saved_at = time.monotonic()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(average[name])


# The VAE: images first, then images and clips.

VAE_PHASE = Phase(name="vae", steps=6000, lr=1.5e-3)
IMAGES_FIRST = 1000                                     # steps before the first clip
REFERENCE_ELEMENTS = 4 * 3 * 9 * SIZE * SIZE            # what every summed loss is divided by, image or clip
IMAGE_WEIGHT, KL_WEIGHT, SHAPE_WEIGHT = 1.5, 2e-4, 6.0


def train_vae(work: Path, device: str, *, compiled: bool) -> WanVAE:
    torch.manual_seed(SEED)
    vae = channels_last(WanVAE(VAE)).to(device)
    with torch.no_grad():                               # little noise at first, or the decoder learns to ignore the latent
        vae.to_moments.weight[VAE.latent_channels:] = 0
        vae.to_moments.bias[VAE.latent_channels:] = -10.0
    code = torch.compile(autoencode) if compiled else autoencode

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = rng_of("vae", step)
        still = step < IMAGES_FIRST or step % 3 == 0
        long = not still and step > 0.9 * VAE_PHASE.steps          # the last clips are long: history reaches further back
        clips, frames = (16, 1) if still else (2, 25) if long else (5, 9)
        drawn = [Scene.draw(rng).render(frames, start=rng.randrange(49 - frames), total=49) for _ in range(clips)]
        video = torch.stack([v for v, _ in drawn]).to(device, memory_format=torch.channels_last_3d)
        coverage = torch.stack([c for _, c in drawn])[:, None].to(device)
        noise = torch.randn(clips, VAE.latent_channels, (frames - 1) // 4 + 1, SIZE // 8, SIZE // 8,
                            generator=torch.Generator().manual_seed(rng.getrandbits(62))).to(device)
        with torch.autocast(device, torch.bfloat16):
            decoded, mean, log_variance = (autoencode if long else code)(vae, video, noise)
        error = decoded.float() - video
        near = F.max_pool3d(coverage, (1, 5, 5), stride=1, padding=(0, 2, 2))
        weight = 1 + SHAPE_WEIGHT * near                # the moving shape is few pixels: without weight its colour comes last
        reconstruction = (weight * (error.abs() + error.square())).sum() / REFERENCE_ELEMENTS
        kl = 0.5 * (mean.float().square() + log_variance.float().exp() - 1 - log_variance.float()).mean()
        with torch.no_grad():
            inside = (coverage > 0.5).expand_as(error)
            psnr = 10 * torch.log10(4 / error.square().mean()).item()
            shape_psnr = 10 * torch.log10(4 / error[inside].square().mean()).item()
        kl_weight = KL_WEIGHT * min(1.0, max(0.0, step / IMAGES_FIRST - 0.5))     # from the start it would erase the latent
        loss = reconstruction * (IMAGE_WEIGHT if still else 1) + kl_weight * kl
        return loss, dict(frames=frames, psnr=psnr, shape_psnr=shape_psnr, kl=kl.item(), std=mean.std().item())

    fit(VAE_PHASE, vae, loss_of, work)
    return vae


def autoencode(vae: WanVAE, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, log_variance = vae.encode(video)
    log_variance = log_variance.clamp(-12, 4)
    return vae.decode(mean + (0.5 * log_variance).exp() * noise.to(mean.dtype)), mean, log_variance


def channels_last(vae: WanVAE) -> WanVAE:
    """Convolutions over few channels are about twice as fast in this layout on a CPU."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return vae


if __name__ == "__main__":
    import sys
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    train_vae(work, "cpu", compiled="--compile" in sys.argv)
