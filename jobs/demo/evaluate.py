"""How much of what a prompt says the demo model shows: prompts it never saw, rendered, and read back by the checker."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from actors.decoder import Decoder
from actors.denoisers import DENOISERS
from actors.messages import Frames, Request
from actors.text_encoder import TextEncoder
from jobs.demo.checker import read_attributes
from jobs.demo.world import ATTRIBUTES, Scene, describe
from model.catalog import DEMO, ModelCard


def unseen(count: int, *, seed: int = 7) -> list[tuple[Scene, str]]:
    """Scenes and complete sentences from a seed not used in training; every second is a combination kept from it."""
    rng = random.Random(f"unseen {seed}")
    scenes = [Scene.draw(rng, held_out=i % 2 == 1) for i in range(count)]
    return [(scene, describe(scene, rng)) for scene in scenes]


def render_prompts(prompts: list[str], card: ModelCard, weights: Path, device: str, *, num_steps: int | None = None,
                   guidance: float | None = None, duration_s: float | None = None, precision: str | None = None,
                   attention: str = "dense") -> Iterator[Frames]:
    """Frames for each prompt, through the actors a night uses."""
    shape, _ = card.shape_for(duration_s=duration_s)
    precision = precision or card.precision_on(device)
    encode, decode = (actor(card, weights, device, precision=precision) for actor in (TextEncoder, Decoder))
    sample = DENOISERS[type(card)](card, weights, device, precision=precision, attention=attention)
    for i, prompt in enumerate(prompts):
        request = Request(clip_id=f"{i:064x}", model=card.name, weights_fingerprint="", prompt=prompt,
                          negative_prompt=card.negative_prompt, seed=1000 + i, shape=shape, fps=card.fps,
                          num_steps=num_steps or card.num_steps, precision=precision, attention=attention,
                          guidance=card.guidance if guidance is None else guidance)
        yield from decode(sample(encode([request])))


def evaluate(count: int = 200, *, weights: Path | None = None, device: str = "cpu", num_steps: int | None = None,
             guidance: float | None = None, precision: str | None = None, attention: str = "dense",
             card: ModelCard = DEMO, keep: list[torch.Tensor] | None = None) -> dict:
    """Shares of right attributes, in all, by attribute, for seen and held-out combinations; CPU seconds per 2 s clip.

    keep: is given the frames of every clip.
    """
    cases = unseen(count)
    right = {name: 0 for name in ATTRIBUTES}
    by_kind = {False: [0, 0], True: [0, 0]}
    wrong, began = [], time.process_time()
    frames = render_prompts([sentence for _, sentence in cases], card, weights or card.folder, device,
                            num_steps=num_steps, guidance=guidance, precision=precision, attention=attention)
    for (scene, sentence), shown in zip(cases, frames, strict=True):
        seen = read_attributes(shown.rgb)
        if keep is not None:
            keep.append(shown.rgb)
        missed = {name: seen[name] for name, value in scene.attributes.items() if seen[name] != value}
        for name in ATTRIBUTES:
            right[name] += name not in missed
        by_kind[scene.held_out][0] += len(ATTRIBUTES) - len(missed)
        by_kind[scene.held_out][1] += len(ATTRIBUTES)
        if missed:
            wrong.append({"prompt": sentence, "shown": missed})
    return {"prompts": count, "attributes_right": sum(right.values()) / (count * len(ATTRIBUTES)),
            "by_attribute": {name: hits / count for name, hits in right.items()},
            "held_out_combinations": by_kind[True][0] / max(1, by_kind[True][1]),
            "seen_combinations": by_kind[False][0] / max(1, by_kind[False][1]),
            "cpu_s_per_clip": (time.process_time() - began) / count, "wrong": wrong}


def psnr(clips: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Of uint8 frames, in dB over all of them together."""
    errors = [(got.float() - want.float()).square().mean() for got, want in zip(clips, wanted, strict=True)]
    return (10 * torch.log10(255 ** 2 / torch.stack(errors).mean())).item()
