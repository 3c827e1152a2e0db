"""The actor that turns embeddings into latents: the diffusion model and its course from noise to video."""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dailies.actors.determinism import class_on
from dailies.actors.device_lock import NO_LOCK
from dailies.actors.messages import Embedding, Latent, Request
from dailies.model.catalog import ModelCard
from dailies.model.graphs import CudaGraphs, Graphed
from dailies.model.guidance import AdaptiveProjectedGuidance, AverageToo, classifier_free
from dailies.model.samplers import STRAIGHT, Clips, Steps, Streams, Velocity, euler
from dailies.model.schedules import flow_match_sigmas
from dailies.model.shapes import LatentGrid
from dailies.model.turbo import compile_blocks

Guide = Callable[[Tensor, Tensor], Tensor]              # velocities with and without the prompt in, one out
DRAWN_AT_ONCE = 2**16                                   # numbers; numpy lets no other thread run meanwhile


class NonFiniteLatent(ArithmeticError):
    """Sampling ended in NaN or infinity."""


def noise(request: Request, grid: LatentGrid, draw: int = 0) -> Tensor:
    """Standard normal [C, T, H, W] in fp32 on the CPU, decided by shape and seed alone: any worker, batch and device.

    draw: 0 is where the clip starts, n the noise that a few-step sampler puts back after its n-th step. The seed is
    Philox's key; draw n counts from n * 2^192, so no draw reaches another's numbers and none needs the one before.

    Philox counts and never looks back, and its bits are fixed by its definition. Torch's CPU generator would not do:
    it takes 32 bits of the seed, and its normals depend on the processor's vector width. Values are rounded to bf16,
    as the Linum release draws them; so the last bits of a machine's logarithm and cosine do not matter.
    """
    shape = grid.of(request.shape)
    pairs = -(-math.prod(shape) // 2)
    philox = np.random.Philox(key=request.seed, counter=draw << 192)
    raw = np.concatenate([philox.random_raw(min(DRAWN_AT_ONCE, 2 * pairs - start))
                          for start in range(0, 2 * pairs, DRAWN_AT_ONCE)])
    uniform = (raw >> np.uint64(11)) * 2.0 ** -53                                                           # [0, 1)
    radius, angle = np.sqrt(-2 * np.log1p(-uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    normal = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:math.prod(shape)]
    return torch.from_numpy(normal).reshape(shape).bfloat16().float()


class NoiseAhead:
    """`noise`, drawn by a thread before it is wanted: a draw takes the CPU as long as a fast model's step the GPU."""

    def __init__(self, noise: Callable[..., Tensor]):
        self.noise = noise
        self.thread = ThreadPoolExecutor(1, "noise")
        self.coming: dict[tuple[str, int], Future[Tensor]] = {}

    def begin(self, requests: Sequence[Request], grid: LatentGrid, draws: int) -> None:
        """Draws 0 to draws - 1 of these clips are going to be asked for."""
        for draw in range(draws):
            for request in requests:
                self.coming[request.clip_id, draw] = self.thread.submit(self.draw, request, grid, draw)

    def __call__(self, request: Request, grid: LatentGrid, draw: int = 0) -> Tensor:
        coming = self.coming.pop((request.clip_id, draw), None)
        return self.draw(request, grid, draw) if coming is None else coming.result()

    def draw(self, request: Request, grid: LatentGrid, draw: int) -> Tensor:
        return self.noise(request, grid, draw) if draw else self.noise(request, grid)

    def forget(self, requests: Sequence[Request]) -> None:
        """What a clip that was begun elsewhere did not need."""
        clips = {request.clip_id for request in requests}
        for key in [key for key in list(self.coming) if key[0] in clips]:
            self.coming.pop(key).cancel()


class Denoiser:
    """Embeddings in, Latents out; one diffusion model on one device. Making it loads; calling it only computes.

    This is Linum's course from noise to video; another family has its own `load` and `sample`.
    Threads may call it side by side: one computes, and the noise of the next clip is drawn meanwhile.

    The clips of a batch are computed one by one, so a batch changes no bit of them: as one tensor they would meet other
    products, whose last bits guidance makes visible within a few steps.
    """

    lock = NO_LOCK                                      # the worker's
    draws_per_step = False                              # fresh noise for each step, or for the first alone
    weights_move = False                                # away from the device and back, while clips are made

    def __init__(self, card: ModelCard, weights: Path, device: str = "cpu", *, precision: str | None = None,
                 attention: str | None = None, threads: int = 1, noise: Callable[..., Tensor] = noise,
                 compiled: bool = False, graphs: bool | None = None):
        """threads: torch's, for the whole process; fixed, since the last bits of a result may depend on it.
        noise: where a clip starts, and what is put back on its way.  compiled: by torch.compile, at the first clip of
        each shape.  graphs: whether a forward is recorded as one CUDA graph when a shape of clip comes again; by
        default on a GPU, and never where weights move.  In the safe profile neither is used.

        Raises CheckpointError.
        """
        torch.set_num_threads(threads)
        self.threads = threads
        self.card, self.device, self.noise = card, device, NoiseAhead(noise)
        self.precision, self.attention = precision or card.precision_on(device), attention or card.attentions[0]
        self.fallbacks = card.fallbacks(weights, device, self.precision)
        self.load(weights)
        self.compiled, self.safe, self.made, self.graphs = compiled, False, set(), []
        recorded = (device.startswith("cuda") if graphs is None else graphs) and not self.weights_move
        record = CudaGraphs()
        for dit in self.transformers if compiled or recorded else ():
            if compiled:
                compile_blocks(dit)
            if recorded:
                self.graphs.append(Graphed(dit.forward, record))
                dit.forward = self.graphs[-1]

    def load(self, weights: Path) -> None:
        self.dit = self.card.dit(weights, self.device, self.precision, self.attention)

    @property
    def transformers(self) -> list[torch.nn.Module]:
        return [self.dit]

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
            if self.safe and self.compiled:
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
        self.noise.begin(requests, self.card.grid, requests[0].num_steps if self.draws_per_step else 1)
        try:
            start = [self.noise(request, self.card.grid) for request in requests]
            with self.lock, self.profile(requests[0].bucket):
                clips = self.sample(batch, [self.on_device(noise) for noise in start], steps)
                clips = [{name: stream.cpu() for name, stream in clip.items()} for clip in clips]
        finally:
            self.noise.forget(requests)
        made = list(zip(batch, clips, strict=True))
        broken = [embedding.request.clip_id for embedding, streams in made
                  if not all(stream.isfinite().all() for stream in streams.values())]
        if broken:
            raise NonFiniteLatent(f"sampling ended in NaN or infinity for {', '.join(broken)}; try another seed, "
                                  f"a lower guidance than {requests[0].guidance:g}, or precision fp32")
        return [Latent(request=embedding.request, streams=streams,
                       fallbacks=embedding.fallbacks + self.notes(embedding.request),
                       determinism=(*embedding.determinism, self.determinism)) for embedding, streams in made]

    def on_device(self, noise: Tensor) -> Streams:
        return {"video": noise.to(self.device)}

    @property
    def determinism(self) -> str:
        """The class of what is sampled now."""
        return class_on(self.device, threads=self.threads, compiled=self.compiled and not self.safe)

    def notes(self, request: Request) -> tuple[str, ...]:
        """What is done here instead of what the request asks for."""
        return self.fallbacks

    def course(self, request: Request) -> str:
        """What two states between steps must agree in, to belong to the same course of one clip."""
        shape = "x".join(map(str, self.card.grid.of(request.shape)))
        return f"{self.solver}, {request.num_steps} steps, {shape}"

    @property
    def solver(self) -> str:
        return f"euler and {self.card.guider}"

    def sample(self, batch: list[Embedding], start: Clips, steps: Steps) -> Clips:
        """From noise to latents, fp32."""
        request = batch[0].request
        sigmas = flow_match_sigmas(request.num_steps, self.card.shift).tolist()
        guides = [self.guide(request.guidance) for _ in batch]
        if isinstance(guides[0], AdaptiveProjectedGuidance):
            steps = AverageToo(guides, steps)
        return euler(self.velocity(batch, guides), start, sigmas, steps)

    def velocity(self, batch: list[Embedding], guides: Sequence[Guide]) -> Velocity:
        """The guided velocity of clips, each with its own guide, for a sampler. Their texts' keys and values are made
        here, once."""
        predictions = [self.prediction(embedding) for embedding in batch]

        def velocity(clips: Clips, sigma: float) -> Clips:
            timestep = torch.full((1,), 1000 * sigma, device=self.device)
            return [{"video": guide(*predict(clip["video"][None], timestep))}
                    for clip, predict, guide in zip(clips, predictions, guides, strict=True)]
        return velocity

    def prediction(self, embedding: Embedding) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of one clip: video [1, C, T, H, W] and timestep [1] in, [C, T, H, W] with its prompt and without it out."""
        prompt, negative = (text["video"].to(self.device) for text in (embedding.prompt, embedding.negative))
        if self.card.pair_guidance:
            both = self.dit.embed_text([prompt, negative])
            return lambda video, timestep: self.dit(video.repeat(2, 1, 1, 1, 1), timestep.repeat(2), both)
        contexts = [self.dit.embed_text([text]) for text in (prompt, negative)]
        return lambda video, timestep: [self.dit(video, timestep, context)[0] for context in contexts]

    def guide(self, scale: float) -> Guide:
        """How the two velocities become one; APG remembers, so it is made anew for each clip and run of the sampler."""
        if self.card.guider == "cfg":
            return lambda cond, uncond: classifier_free(cond, uncond, scale)
        return AdaptiveProjectedGuidance(scale, momentum=self.card.apg_momentum, max_norm=self.card.apg_max_norm,
                                         parallel=self.card.apg_parallel)

    def check(self, requests: list[Request]) -> None:
        first = requests[0]
        for request in requests:
            if request.bucket != first.bucket:
                raise ValueError(f"a batch must be of one bucket; got {first.bucket} and {request.bucket}")
            runs = self.card.name, self.precision, self.attention
            if (request.model, request.precision, request.attention) != runs:
                raise ValueError("this actor runs {} in {} with {} attention; ".format(*runs) +
                                 f"clip {request.clip_id} asks for "
                                 f"{request.model} in {request.precision} with {request.attention}. "
                                 "Plan and actors must be made from the same settings")
