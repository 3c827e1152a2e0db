"""Requests, values and stages that cost nothing, to measure or test what is around them; workers can import them."""

import json
import os
import time
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from dailies.actors.messages import Clip, Embedding, Latent, Request
from dailies.model.shapes import VideoShape
from dailies.pipeline.stages import Stage, Step

SLEEPS_S = {"encode": 0.02, "sample": 0.5, "publish": 0.1}

# GPUs per replica of each stage, and what the machine is told to have
SHARED = {"encode": 0.25, "sample": 0.75, "publish": 0.25}         # the encoder lives beside a sampler
WHOLE = {"encode": 1.0, "sample": 1.0, "publish": 0.0}             # the encoder has a sampler's GPU, and gives it back


@dataclass(kw_only=True)
class Pretend:
    """An actor that sleeps, then makes the next value, empty.

    trace: a file that gets of each call what it makes, its start and end, in seconds since 1970, and its process.
    """

    makes: str
    sleep_s: float = 0.0
    trace: str | None = None

    def __call__(self, batch: list) -> list:
        began = time.time()
        if self.sleep_s:
            time.sleep(self.sleep_s * len(batch))
        if self.trace:
            with open(self.trace, "a") as file:
                file.write(json.dumps([self.makes, began, time.time(), os.getpid()]) + "\n")
        return [pretend_value(self.makes, value if isinstance(value, Request) else value.request) for value in batch]


def pretend_value(kind: str, request: Request) -> Embedding | Latent | Clip:
    if kind == "embedding":
        return Embedding(request=request, prompt={}, negative={})
    if kind == "latent":
        return Latent(request=request, streams={})
    return Clip(request=request, uri=f"none://{request.clip_id}", sha256=request.clip_id, num_bytes=0,
                duration_s=request.shape.frames / request.fps)


def pretend_request(number: int, *, prompt: str | None = None, frames: int = 1) -> Request:
    return Request(clip_id=f"{number:064x}", model="pretend", weights_fingerprint="0" * 64,
                   prompt=prompt or f"prompt {number}", negative_prompt="", seed=number,
                   shape=VideoShape(frames=frames, height=8, width=8), fps=24.0, num_steps=1, guidance=1.0,
                   precision="fp32", attention="dense")


def pretend_stages(*, sleeps_s: dict[str, float] | None = None, gpus: dict[str, float] | None = None,
                   cpus: float = 0.25, window: int | None = 1000, trace: str | None = None,
                   **options: Any) -> list[Stage]:
    """encode, sample and publish, as text_to_video has them; options: of every Stage."""
    sleeps_s, gpus = sleeps_s or {}, gpus or {}
    makes = {"encode": "embedding", "sample": "latent", "publish": "clip"}
    steps = {name: Step(actor=Pretend, args=dict(makes=made, sleep_s=sleeps_s.get(name, 0.0), trace=trace))
             for name, made in makes.items()}
    first = dict(key=attrgetter("embedding_key"), window=window)
    return [Stage(name=name, steps=(step,), gpus=gpus.get(name, 0.0), cpus=cpus,
                  **(first if name == "encode" else {}), **options)
            for name, step in steps.items()]
