"""What the pipeline itself costs: stages that only sleep, on GPUs that only count.

    python -m dailies.jobs.bench.pipeline overhead        driver seconds per clip with empty stages, and its memory
    python -m dailies.jobs.bench.pipeline overlap         how busy 4 samplers are kept: 20, 500 and 100 ms a clip
    python -m dailies.jobs.bench.pipeline gpu-shapes      how busy GPUs are kept, in the shapes of gpu_shapes.py
    python -m dailies.jobs.bench.append                   seconds to the first of 1,000 rows beside 100,000 done
"""

import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

from dailies.jobs.bench.machine import commit
from dailies.jobs.bench.pretend import SHARED, SLEEPS_S, WHOLE, pretend_request, pretend_stages
from dailies.pipeline.stages import Outcome


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
    """The span from the first sample's start to the last one's end, against clips * seconds / gpus.

    Of that span on all GPUs also what samplers had not begun yet, what passed between two of their clips, and what was
    left when they had no more: shares, as samplers_busy is.
    """
    from dailies.pipeline.scheduler import cluster

    with tempfile.NamedTemporaryFile(suffix=".jsonl") as trace, cluster.connect("local", cpus=4, gpus=gpus):
        stages = pretend_stages(sleeps_s=SLEEPS_S, gpus=shares or SHARED, trace=trace.name, window=window)
        began = time.time()
        outcomes: list[Outcome] = list(cluster.run(stages, map(pretend_request, range(clips))))
        calls = [json.loads(line) for line in Path(trace.name).read_text().splitlines()]
    samples: dict[int, list[tuple[float, float]]] = {}                 # by process
    for made, start, end, process in sorted(calls, key=itemgetter(1)):
        if made == "latent":
            samples.setdefault(process, []).append((start, end))
    first, last = min(each[0][0] for each in samples.values()), max(each[-1][1] for each in samples.values())
    whole = gpus * (last - first)
    busy = sum(end - start for each in samples.values() for start, end in each)
    return {"clips": len(outcomes), "ideal_s": clips * SLEEPS_S["sample"] / gpus, "span_s": last - first,
            "samplers_busy": busy / whole,
            "before_their_first": sum(each[0][0] - first for each in samples.values()) / whole,
            "between_two": sum(each[-1][1] - each[0][0] for each in samples.values()) / whole - busy / whole,
            "after_their_last": sum(last - each[-1][1] for each in samples.values()) / whole,
            "first_sample_after_s": first - began,
            "first_encode_after_s": min(start for made, start, *_ in calls if made == "embedding") - began}


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
