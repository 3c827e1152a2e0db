"""What the pipeline itself costs: stages that only sleep, on GPUs that only count.

    python -m dailies.jobs.bench.pipeline overhead        driver seconds per clip with empty stages, and its memory
    python -m dailies.jobs.bench.pipeline overlap         how busy 4 samplers are kept: 20, 500 and 100 ms a clip
    python -m dailies.jobs.bench.pipeline gpu-shapes      how busy GPUs are kept, in the shapes of gpu_shapes.py
"""

import json
import platform
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from dailies.actors.messages import Clip, Embedding, Latent, Request
from dailies.jobs.bench.command import commit
from dailies.model.shapes import VideoShape
from dailies.pipeline.stages import Outcome, Stage, Step

SLEEPS_S = {"encode": 0.02, "sample": 0.5, "publish": 0.1}

# GPUs per replica of each stage, and what the machine is told to have
SHARED = {"encode": 0.25, "sample": 0.75, "publish": 0.25}         # the encoder lives beside a sampler
WHOLE = {"encode": 1.0, "sample": 1.0, "publish": 0.0}             # the encoder has a sampler's GPU, and gives it back


@dataclass(kw_only=True)
class Pretend:
    """An actor that sleeps, then makes the next value, empty.  trace: a file that gets each call's start and end."""

    makes: str
    sleep_s: float = 0.0
    trace: str | None = None

    def __call__(self, batch: list) -> list:
        began = time.time()
        if self.sleep_s:
            time.sleep(self.sleep_s * len(batch))
        if self.trace:
            with open(self.trace, "a") as file:
                file.write(json.dumps([self.makes, began, time.time()]) + "\n")
        return [pretend_value(self.makes, value if isinstance(value, Request) else value.request) for value in batch]


def pretend_value(kind: str, request: Request) -> Embedding | Latent | Clip:
    if kind == "embedding":
        return Embedding(request=request, prompt={}, negative={})
    if kind == "latent":
        return Latent(request=request, streams={})
    return Clip(request=request, uri=f"none://{request.clip_id}", sha256=request.clip_id, num_bytes=0,
                duration_s=request.shape.frames / request.fps)


def pretend_request(number: int) -> Request:
    return Request(clip_id=f"{number:064x}", model="pretend", weights_fingerprint="0" * 64, prompt=f"prompt {number}",
                   negative_prompt="", seed=number, shape=VideoShape(frames=1, height=8, width=8), fps=24.0,
                   num_steps=1, guidance=1.0, precision="fp32", attention="dense")


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


def overhead(clips: int = 5000) -> dict[str, float]:
    """Wall and driver-CPU milliseconds per clip with stages that do nothing, and how the driver's memory grew."""
    from dailies.pipeline.scheduler import cluster

    with cluster.connect("local", cpus=4, gpus=0):
        marks: list[tuple[int, float, float, int]] = []
        outcomes = cluster.run(pretend_stages(replicas=1, window=None), map(pretend_request, range(clips)))
        for done, _ in enumerate(outcomes, start=1):
            if done % (clips // 10) == 0:
                marks.append((done, time.perf_counter(), time.process_time(), rss_bytes()))
    first, middle, last = marks[0], marks[len(marks) // 2], marks[-1]   # the first is past the processes' start
    counted = last[0] - first[0]
    return {"clips": clips, "wall_ms_per_clip": 1e3 * (last[1] - first[1]) / counted,
            "driver_cpu_ms_per_clip": 1e3 * (last[2] - first[2]) / counted, "driver_rss_mb": last[3] / 2**20,
            "driver_rss_growth_bytes_per_clip": (last[3] - middle[3]) / (last[0] - middle[0])}


def overlap(clips: int = 200, gpus: int = 4, shares: dict[str, float] | None = None, *,
            window: int = 1000) -> dict[str, float]:
    """The span from the first sample's start to the last one's end, against clips * seconds / gpus."""
    import tempfile

    from dailies.pipeline.scheduler import cluster

    with tempfile.NamedTemporaryFile(suffix=".jsonl") as trace, cluster.connect("local", cpus=4, gpus=gpus):
        stages = pretend_stages(sleeps_s=SLEEPS_S, gpus=shares or SHARED, trace=trace.name, window=window)
        began = time.time()
        outcomes: list[Outcome] = list(cluster.run(stages, map(pretend_request, range(clips))))
        calls = [json.loads(line) for line in Path(trace.name).read_text().splitlines()]
    samples = [(start, end) for made, start, end in calls if made == "latent"]
    first, last = min(start for start, _ in samples), max(end for _, end in samples)
    busy = sum(end - start for start, end in samples)
    return {"clips": len(outcomes), "ideal_s": clips * SLEEPS_S["sample"] / gpus, "span_s": last - first,
            "samplers_busy": busy / (gpus * (last - first)), "first_sample_after_s": first - began,
            "first_encode_after_s": min(start for made, start, _ in calls if made == "embedding") - began}


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def rows(what: str) -> Iterator[tuple[str, dict[str, float]]]:
    if what == "gpu-shapes":
        from dailies.jobs.bench import gpu_shapes
        yield from gpu_shapes.rows()
    if what in ("overhead", "all"):
        yield "overhead, empty stages", overhead()
    if what in ("overlap", "all"):
        yield "overlap, encoder beside samplers (0.25/0.75/0.25)", overlap(shares=SHARED)
        yield "overlap, encoder gives its GPU to a sampler (1/1/0)", overlap(shares=WHOLE)


if __name__ == "__main__":
    print(f"{platform.processor() or platform.machine()}, {commit()}, {platform.node()}")
    for name, figures in rows(sys.argv[1] if len(sys.argv) > 1 else "all"):
        print(name, " ".join(f"{key}={value:.4g}" for key, value in figures.items()), flush=True)
