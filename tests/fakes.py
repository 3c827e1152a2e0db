"""Requests, values and stages that cost nothing, for tests of what is around them. Importable in Ray's processes."""

import time
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from dailies.actors.messages import Clip, Embedding, Latent, Request
from dailies.model.shapes import VideoShape
from dailies.pipeline.stages import Stage, Step

SLEEPS_S = {"encode": 0.02, "sample": 0.5, "publish": 0.1}

# GPUs of one replica of each stage
SHARED = {"encode": 0.25, "sample": 0.75, "publish": 0.25}         # the encoder lives beside a sampler
WHOLE = {"encode": 1.0, "sample": 1.0, "publish": 0.0}             # the encoder has a sampler's GPU, and gives it back


@dataclass(kw_only=True)
class Pretend:
    """An actor that sleeps, then makes the next value, empty."""

    makes: str
    sleep_s: float = 0.0

    def __call__(self, batch: list) -> list:
        time.sleep(self.sleep_s * len(batch))
        return [pretend_value(self.makes, value if isinstance(value, Request) else value.request) for value in batch]


def pretend_value(kind: str, request: Request) -> Embedding | Latent | Clip:
    if kind == "embedding":
        return Embedding(request=request, prompt=(), negative=())
    if kind == "latent":
        return Latent(request=request, streams=())
    return Clip(request=request, uri=f"none://{request.clip_id}", sha256=request.clip_id, num_bytes=0,
                duration_s=request.shape.frames / request.fps)


def pretend_request(number: int, *, prompt: str | None = None, frames: int = 1) -> Request:
    return Request(clip_id=f"{number:064x}", model="pretend", weights_fingerprint="0" * 64,
                   prompt=prompt or f"prompt {number}", negative_prompt="", seed=number,
                   shape=VideoShape(frames=frames, height=8, width=8), fps=24.0, num_steps=1, guidance=1.0,
                   precision="fp32", attention="dense")


def pretend_stages(*, gpus: dict[str, float] | None = None, cpus: float = 0.25, window: int | None = 1000,
                   **options: Any) -> list[Stage]:
    """encode, sample and publish, as text_to_video has them; options: of every Stage."""
    makes = {"encode": "embedding", "sample": "latent", "publish": "clip"}
    first = dict(key=attrgetter("embedding_key"), window=window)
    return [Stage(name=name, steps=(Step(actor=Pretend, args=dict(makes=made)),), gpus=(gpus or {}).get(name, 0.0),
                  cpus=cpus, **(first if name == "encode" else {}), **options)
            for name, made in makes.items()]
