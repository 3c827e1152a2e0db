"""The actor that turns embeddings into latents: noise, and a diffusion model that takes it away."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from dailies.actors.actor import Actor
from dailies.actors.determinism import class_on
from dailies.actors.messages import Embedding, Latent, Request
from dailies.model.card import ModelCard
from dailies.model.family import NonFiniteLatent, family_of
from dailies.model.graphs import CudaGraphs, Graphed
from dailies.model.runtime import Runtime
from dailies.model.samplers import STRAIGHT, Clips, Steps, Streams
from dailies.model.turbo import compile_blocks

Shapes = Mapping[str, tuple[int, ...]]                  # of a clip's streams
DRAWN_AT_ONCE = 2**16                                   # numbers; numpy lets no other thread run meanwhile


def noise(request: Request, shapes: Shapes, draw: int = 0) -> Streams:
    """Standard normal in fp32 on the CPU, decided by shape and seed alone: any worker, batch and device.

    draw: 0 is where the clip starts, n the noise that a few-step sampler puts back after its n-th step. The seed is
    Philox's key; draw n counts from n * 2^192 and the stream in place s of the shapes from s * 2^128 behind it, so none
    reaches another's numbers and none needs the one before.

    Philox counts and never looks back, and its bits are fixed by its definition. Torch's CPU generator would not do:
    it takes 32 bits of the seed, and its normals depend on the processor's vector width. Values are rounded to bf16,
    as the Linum release draws them; so the last bits of a machine's logarithm and cosine do not matter.
    """
    drawn = {}
    for place, (name, shape) in enumerate(shapes.items()):
        pairs = -(-math.prod(shape) // 2)
        philox = np.random.Philox(key=request.seed, counter=(draw << 192) + (place << 128))
        raw = np.concatenate([philox.random_raw(min(DRAWN_AT_ONCE, 2 * pairs - start))
                              for start in range(0, 2 * pairs, DRAWN_AT_ONCE)])
        uniform = (raw >> np.uint64(11)) * 2.0 ** -53                                                       # [0, 1)
        radius, angle = np.sqrt(-2 * np.log1p(-uniform[:pairs])), 2 * np.pi * uniform[pairs:]
        normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:math.prod(shape)]
        drawn[name] = torch.from_numpy(normal).reshape(shape).bfloat16().float()
    return drawn


class NoiseAhead:
    """`noise`, drawn by a thread before it is wanted: a draw takes the CPU as long as a fast model's step the GPU."""

    def __init__(self, noise: Callable[..., Streams]):
        self.noise = noise
        self.thread = ThreadPoolExecutor(1, "noise")
        self.coming: dict[tuple[str, int], Future[Streams]] = {}

    def begin(self, requests: Sequence[Request], shapes: Shapes, draws: int) -> None:
        """Draws 0 to draws - 1 of these clips are going to be asked for."""
        for draw in range(draws):
            for request in requests:
                self.coming[request.clip_id, draw] = self.thread.submit(self.draw, request, shapes, draw)

    def __call__(self, request: Request, shapes: Shapes, draw: int = 0) -> Streams:
        coming = self.coming.pop((request.clip_id, draw), None)
        return self.draw(request, shapes, draw) if coming is None else coming.result()

    def draw(self, request: Request, shapes: Shapes, draw: int) -> Streams:
        return self.noise(request, shapes, draw) if draw else self.noise(request, shapes)

    def forget(self, requests: Sequence[Request]) -> None:
        """What a clip that was begun elsewhere did not need."""
        clips = {request.clip_id for request in requests}
        for key in [key for key in list(self.coming) if key[0] in clips]:
            self.coming.pop(key).cancel()


class Denoiser(Actor):
    """Embeddings in, Latents out; one diffusion model on one device, whose family says how it samples.

    Threads may call it side by side: one computes, and the noise of the next clip is drawn meanwhile.
    """

    def __init__(self, card: ModelCard, weights: Path, on: Runtime | None = None, *,
                 noise: Callable[..., Streams] = noise):
        """on: by default the model's own on a CPU. Where its forwards are compiled or recorded they are not in the safe
        profile, and never recorded where weights move.  noise: where a clip starts, and what is put back on its way.

        Raises CheckpointError.
        """
        self.card, self.on, self.noise = card, on or card.runtime(), NoiseAhead(noise)
        self.device = self.on.device
        torch.set_num_threads(self.on.threads)
        family = family_of(card)
        self.fallbacks = tuple(family.fallbacks(card, weights, self.on).get("sample", ()))
        self.sampler = family.load_sampler(card, weights, self.on)
        self.further_steps = card.further_steps
        self.made: set[str] = set()                     # buckets of which a batch is made
        self.graphs: list[Graphed] = []
        asked = self.device.startswith("cuda") if self.on.graphs is None else self.on.graphs
        recorded, record = asked and not self.sampler.weights_move, CudaGraphs()
        for dit in self.sampler.transformers if self.on.compiled or recorded else ():
            if self.on.compiled:
                compile_blocks(dit)
            if recorded:
                self.graphs.append(Graphed(dit.forward, record))
                dit.forward = self.graphs[-1]           # type: ignore[method-assign]  # what records it

    @contextmanager
    def profile(self, bucket: str) -> Iterator[None]:
        """Neither compiled nor recorded in the safe profile; and nothing is recorded for the first batch of a bucket,
        since there may be no second one."""
        with ExitStack() as stack:
            for graphed in self.graphs:
                if self.safe:
                    stack.enter_context(graphed.set_aside())
                elif bucket not in self.made:
                    stack.enter_context(graphed.pause())
            if self.safe and self.on.compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
        self.made.add(bucket)

    @torch.inference_mode()
    def __call__(self, batch: list[Embedding], steps: Steps = STRAIGHT) -> list[Latent]:
        """Latents of clips that share one bucket, from where `steps` says that they stand.

        Raises ValueError for requests that this actor was not made for, NonFiniteLatent when sampling fails.
        """
        requests = [embedding.request for embedding in batch]
        self.check(requests)
        shapes = self.card.streams_of(requests[0].shape, requests[0].settings)
        self.noise.begin(requests, shapes, self.sampler.draws(requests[0].num_steps))

        def draw(number: int) -> Clips:
            drawn = [self.noise(request, shapes, number) for request in requests] if number else start
            return [{name: stream.to(self.device) for name, stream in clip.items()} for clip in drawn]

        try:
            start = [self.noise(request, shapes) for request in requests]       # before the device is taken
            with self.lock, self.profile(requests[0].bucket):
                clips = self.sampler.sample(batch, draw, steps)
                clips = [{name: stream.cpu() for name, stream in clip.items()} for clip in clips]
        finally:
            self.noise.forget(requests)
        broken = [request.clip_id for request, clip in zip(requests, clips, strict=True)
                  if not all(stream.isfinite().all() for stream in clip.values())]
        if broken:
            raise NonFiniteLatent(f"sampling ended in NaN or infinity for {', '.join(broken)}; try another seed, "
                                  f"a lower guidance than {requests[0].guidance:g}, or precision fp32")
        return [Latent(request=embedding.request, streams=clip,
                       fallbacks=embedding.fallbacks + self.notes_on(embedding.request),
                       determinism=(*embedding.determinism, self.determinism))
                for embedding, clip in zip(batch, clips, strict=True)]

    @property
    def determinism(self) -> str:
        """The class of what is sampled now."""
        return class_on(self.device, threads=self.on.threads, compiled=self.on.compiled and not self.safe)

    def notes_on(self, request: Request) -> tuple[str, ...]:
        """What is done here instead of what the request asks for."""
        unused = self.card.negative_unused if request.negative_prompt else ""
        return self.fallbacks + ((unused,) if unused else ())

    def schedule(self, request: Request) -> str:
        """What two states between steps must agree in, to belong to one way from noise to one clip."""
        streams = self.card.streams_of(request.shape, request.settings)
        shapes = ["x".join(map(str, shape)) for shape in streams.values()]
        return f"{self.sampler.solver}, {request.num_steps} steps, {' and '.join(shapes)}"

    def check(self, requests: list[Request]) -> None:
        first = requests[0]
        for request in requests:
            if request.bucket != first.bucket:
                raise ValueError(f"a batch must be of one bucket; got {first.bucket} and {request.bucket}")
            runs = self.card.name, self.on.precision, self.on.attention
            if (request.model, request.precision, request.attention) != runs:
                raise ValueError("this actor runs {} in {} with {} attention; ".format(*runs) +
                                 f"clip {request.clip_id} asks for "
                                 f"{request.model} in {request.precision} with {request.attention}. "
                                 "Plan and actors must be made from the same settings")
