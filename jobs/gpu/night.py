"""A part of the kit: clips from prompt to MP4 on one GPU, one after the other, with all that is not the GPU's beside it.

One process holds encoder, transformer and decoder; threads draw the noise of the clips to come; processes of the CPU
write and check the MP4s of those before, a few at a time. With random weights: a clip costs the same, but its picture
is noise, which H.264 finds harder than a picture.
"""

import statistics
import time
from collections import defaultdict, deque
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from actors.decoder import to_uint8
from actors.denoiser import noise
from actors.messages import Frames, Request
from jobs.gpu.models import inputs, new_dit, new_encoder, new_vae
from jobs.gpu.part import Ground
from model.card import ModelCard
from model.catalog import CATALOG
from model.graphs import Graphed
from model.samplers import rcm
from model.schedules import rcm_sigmas, rcm_timestep
from model.shapes import VideoShape

CLIPS, WRITERS, AHEAD = 12, 6, 8                        # clips; processes that write them; clips not yet written, at most
FIRST = 3                                               # clips that choose kernels and record the graph: not counted


def night(ground: Ground) -> None:
    card = CATALOG["demo-turbo" if ground.tiny else "turbo-wan2.1-t2v-1.3b-480p"]
    clips = FIRST + (2 if ground.tiny else CLIPS)
    shape = VideoShape(frames=5, height=64, width=64) if ground.tiny else card.shape_for()[0]
    line = Line(ground, card, shape)
    requests = [request_of(card, shape, seed) for seed in range(clips)]
    seconds: dict[str, list[float]] = defaultdict(list)
    torch.multiprocessing.set_sharing_strategy("file_system")
    context = torch.multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(4) as threads, ProcessPoolExecutor(WRITERS, mp_context=context) as writers:
        draws = deque(threads.submit(line.draw, request) for request in requests[:2])
        written: deque[Future] = deque()
        for place, request in enumerate(requests):
            if place == FIRST:
                while written:                          # so that the clock begins with nothing to do
                    written.popleft().result()
                began = time.perf_counter()
            if place + 2 < clips:
                draws.append(threads.submit(line.draw, requests[place + 2]))
            taken, rgb = line.clip(draws.popleft())
            while len(written) >= AHEAD:
                seconds["mp4"].append(written.popleft().result())
            written.append(writers.submit(write, Frames(request=request, rgb=rgb)))
            for stage, spent in taken.items() if place >= FIRST else ():
                seconds[stage].append(spent)
        gpu_s = time.perf_counter() - began
        seconds["mp4"] += [future.result() for future in written]
        wall_s = time.perf_counter() - began
    of_gpu = sum(sum(seconds[stage]) for stage in ("encode", "sample", "decode"))
    ground.tell(f"{card.name}, {shape}, {card.num_steps} steps, int8, sparse: prompt to MP4, {clips - FIRST} clips in a row",
                **{f"{stage}_s": statistics.median(spent) for stage, spent in seconds.items() if min(spent) >= 0},
                mp4="timed" if min(seconds["mp4"]) >= 0 else "not timed: av is not installed",
                gpu_s_a_clip=of_gpu / (clips - FIRST), gpu_busy=of_gpu / gpu_s, last_mp4_after_s=wall_s - gpu_s,
                clips_an_hour=3600 * (clips - FIRST) / wall_s, clips_an_hour_in_a_long_night=3600 * (clips - FIRST) / gpu_s,
                peak_gb=ground.peak_gb())


class Line:
    """What a GPU does of one clip, by stage; each waited for, so that its seconds are its own."""

    def __init__(self, ground: Ground, card: ModelCard, shape: VideoShape):
        self.ground, self.card, self.shape = ground, card, shape
        self.dit = new_dit(card, ground.device, "int8", "sparse")
        self.forward = Graphed(self.dit.forward) if ground.on_gpu else self.dit.forward
        self.vae = new_vae(card, ground.device, "bf16")
        self.encoder = None if ground.tiny else new_encoder(card, ground.device)
        self.context = inputs(card, self.dit, shape, ground.device)[2]
        self.sigmas = rcm_sigmas(card.num_steps, card.sigma_max).tolist()

    def draw(self, request: Request) -> list[Tensor]:
        draws = [noise(request, self.card.grid, draw) for draw in range(self.card.num_steps)]
        return [draw.pin_memory() for draw in draws] if self.ground.on_gpu else draws

    def clip(self, draws: "Future[list[Tensor]]") -> tuple[dict[str, float], Tensor]:
        taken, rgb = {}, torch.empty((self.shape.frames, self.shape.height, self.shape.width, 3), dtype=torch.uint8)
        rgb.share_memory_()
        began = time.perf_counter()
        if self.encoder is not None:
            ids = torch.randint(0, 900, (1, 120), device=self.ground.device)
            self.encoder(input_ids=ids).last_hidden_state
        began = self.done("encode", began, taken)
        fresh = [draw.to(self.ground.device, non_blocking=True)[None] for draw in draws.result()]

        def velocity(streams: tuple[Tensor, ...], sigma: float) -> tuple[Tensor, ...]:
            time_of = torch.full((1,), rcm_timestep(sigma), device=self.ground.device)
            return tuple(self.forward(video, time_of, self.context) for video in streams)
        video, = rcm(velocity, (fresh[0],), self.sigmas, lambda step: (fresh[step],))
        began = self.done("sample", began, taken)
        for at, _, piece in self.vae.decode_pieces(video.to(self.vae.from_latent.weight.dtype)):
            pixels = to_uint8(piece[0]).permute(1, 2, 3, 0).contiguous()
            rgb[at:at + len(pixels)].copy_(pixels)
        self.done("decode", began, taken)
        return taken, rgb

    def done(self, stage: str, began: float, taken: dict[str, float]) -> float:
        self.ground.wait()
        taken[stage] = time.perf_counter() - began
        return time.perf_counter()


def write(frames: Frames) -> float:
    """Seconds of writing a clip and reading it back; -1 where there is nothing to write it with."""
    try:
        from actors.clip_writer import BadEncoding, check_encoding, write_mp4
    except ImportError:
        return -1.0
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, frames, 48_000)
        try:
            check_encoding(path, frames)
        except BadEncoding:                             # noise is not shown well by any encoder
            pass
    return time.perf_counter() - began


def request_of(card: ModelCard, shape: VideoShape, seed: int) -> Request:
    return Request(clip_id=f"{seed:064x}", model=card.name, weights_fingerprint="", prompt="a clip", negative_prompt="",
                   seed=seed, shape=shape, fps=card.fps, num_steps=card.num_steps, guidance=card.guidance,
                   precision="int8", attention="sparse")
