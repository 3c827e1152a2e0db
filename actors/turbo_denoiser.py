"""The actors that sample distilled models: a few steps, no guidance, fresh noise between the steps."""

import torch
from torch import Tensor

from dailies.actors.denoiser import Denoiser
from dailies.actors.messages import Embedding, Request
from dailies.actors.wan_denoiser import WanDenoiser
from dailies.model.samplers import Steps, Streams, Velocity, rcm
from dailies.model.schedules import rcm_sigmas, rcm_timestep
from dailies.model.wan.transformer import Context


class FewSteps(Denoiser):
    """rCM's course, of whichever family the velocity is. The clips of a batch are computed one by one."""

    solver = "rcm"
    draws_per_step = True

    def sample(self, batch: list[Embedding], start: Tensor, steps: Steps) -> Tensor:
        requests = [embedding.request for embedding in batch]

        def renoise(step: int) -> Streams:
            return tuple(self.noise(request, self.card.grid, step)[None].to(self.device) for request in requests)

        sigmas = rcm_sigmas(requests[0].num_steps, self.card.sigma_max).tolist()
        return torch.cat(rcm(self.velocity_without_guidance(batch), start.split(1), sigmas, renoise, steps))

    def velocity_without_guidance(self, batch: list[Embedding]) -> Velocity:
        raise NotImplementedError

    def notes(self, request: Request) -> tuple[str, ...]:
        return super().notes(request) + ((self.card.negative_unused,) if request.negative_prompt else ())


class StudentDenoiser(FewSteps):
    """Embeddings in, Latents out, with a distilled model of the Linum family."""

    def velocity_without_guidance(self, batch: list[Embedding]) -> Velocity:
        contexts = [self.dit.embed_text([embedding.prompt[0].to(self.device)]) for embedding in batch]

        def velocity(streams: Streams, sigma: float) -> Streams:
            time = torch.full((1,), rcm_timestep(sigma), device=self.device)    # no copy, which waits for the GPU
            return tuple(self.dit(video, time, context) for video, context in zip(streams, contexts, strict=True))
        return velocity


class TurboWanDenoiser(FewSteps, WanDenoiser):
    """Embeddings in, Latents out, with TurboDiffusion's Wan models: one transformer, or two experts that take turns."""

    def velocity_without_guidance(self, batch: list[Embedding]) -> Velocity:
        conditions = [self.condition(embedding) for embedding in batch]
        contexts: dict[int, list[Context]] = {}

        def velocity(streams: Streams, sigma: float) -> Streams:
            expert = self.card.expert_at(1000 * sigma)
            dit = self.turn(expert)
            if expert not in contexts:
                contexts.clear()                        # the other's turn is over
                contexts[expert] = [self.context(dit, embedding, embedding.prompt) for embedding in batch]
            time = torch.full((1,), rcm_timestep(sigma), device=self.device)    # no copy, which waits for the GPU
            return tuple(dit(video, time, context, condition)
                         for video, context, condition in zip(streams, contexts[expert], conditions, strict=True))
        return velocity
