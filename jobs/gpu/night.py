"""A part of the kit: clips from prompt to MP4 on one GPU, one after the other, H.264 beside it in processes of the CPU.

The actors are those of a night, in one process and without Ray. With random weights a clip costs the same, but its
picture is noise, which H.264 finds harder than a picture.
"""

import statistics
import time
from collections import defaultdict, deque
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dailies.actors.messages import Frames
from dailies.jobs.bench.clip import Bench, Way, request_of, with_random_weights
from dailies.jobs.gpu.ground import Ground
from dailies.model.catalog import CATALOG

_CLIPS, WRITERS, AHEAD = 12, 6, 8                        # clips; processes that write; clips not yet written, at most
FIRST = 3                                               # clips that choose kernels and record the graph: not counted
STAGES = ("encode", "sample", "decode")


def night(ground: Ground) -> None:
    card = CATALOG["demo-turbo"] if ground.tiny else with_random_weights(CATALOG["turbo-wan2.1-t2v-1.3b-480p"])
    way = Way(precision="int8", attention=card.attentions[0] if card.tuned_for_sparse else "dense")
    stages = Bench(card, ground.device).load(way)
    asked = replace(request_of(card, None, 5 if ground.tiny else None, None), precision=way.precision,
                    attention=way.attention)
    clips = FIRST + (2 if ground.tiny else _CLIPS)
    seconds: dict[str, list[float]] = defaultdict(list)
    torch.multiprocessing.set_sharing_strategy("file_system")
    with ProcessPoolExecutor(1 if ground.tiny else WRITERS,
                             mp_context=torch.multiprocessing.get_context("spawn")) as writers:
        written: deque[Future] = deque()
        for place in range(clips):
            if place == FIRST:
                while written:                          # so that the clock begins with nothing to do
                    written.popleft().result()
                began = time.perf_counter()
            values = [replace(asked, prompt=f"clip number {place}", seed=place)]
            for stage in STAGES:
                at = time.perf_counter()
                values = stages[stage](values)
                ground.wait()
                seconds[stage] += [time.perf_counter() - at] * (place >= FIRST)
            while len(written) >= AHEAD:
                seconds["mp4"].append(written.popleft().result())
            written.append(writers.submit(write, replace(values[0], rgb=values[0].rgb.share_memory_())))
        gpu_s = time.perf_counter() - began
        seconds["mp4"] += [future.result() for future in written]
        wall_s = time.perf_counter() - began
    of_gpu = sum(sum(seconds[stage]) for stage in STAGES)
    with_mp4 = min(seconds["mp4"]) >= 0
    ground.tell(f"{card.name}, {asked.shape}, {card.num_steps} steps, {way}: prompt to MP4, "
                f"{clips - FIRST} clips in a row",
                **{f"{stage}_s": statistics.median(seconds[stage]) for stage in (*STAGES, *["mp4"] * with_mp4)},
                mp4="timed" if with_mp4 else "not timed: av is not installed", gpu_s_a_clip=of_gpu / (clips - FIRST),
                stages_busy=of_gpu / gpu_s, last_mp4_after_s=wall_s - gpu_s,
                clips_an_hour=3600 * (clips - FIRST) / gpu_s, peak_gb=ground.peak_gb())


def write(frames: Frames) -> float:
    """Seconds of writing a clip and reading it back; -1 where there is nothing to write it with."""
    try:
        from dailies.actors.clip_writer import BadEncoding, check_encoding, write_mp4
    except ImportError:
        return -1.0
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames, 48_000)
        with suppress(BadEncoding):                     # noise is not shown well by any encoder
            check_encoding(path, frames)
    return time.perf_counter() - began
