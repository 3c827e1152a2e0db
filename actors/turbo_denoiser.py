"""The actors that sample distilled models: a few steps, no guidance, fresh noise between the steps."""

import torch

from dailies.actors.denoiser import Denoiser
from dailies.actors.messages import Embedding, Request
from dailies.actors.wan_denoiser import WanDenoiser
from dailies.model.samplers import Clips, Steps, Velocity, rcm
from dailies.model.schedules import rcm_sigmas, rcm_timestep
from dailies.model.wan.transformer import Context


class FewSteps(Denoiser):
    """rCM's course, of whichever family the velocity is. The clips of a batch are computed one by one."""

    solver = "rcm"
    draws_per_step = True

    def sample(self, batch: list[Embedding], start: Clips, steps: Steps) -> Clips:
        requests = [embedding.request for embedding in batch]

        def renoise(step: int) -> Clips:
            return [self.on_device(self.noise(request, self.card.grid, step)) for request in requests]

        sigmas = rcm_sigmas(requests[0].num_steps, self.card.sigma_max).tolist()
        return rcm(self.velocity_without_guidance(batch), start, sigmas, renoise, steps)

    def velocity_without_guidance(self, batch: list[Embedding]) -> Velocity:
        raise NotImplementedError

    def notes(self, request: Request) -> tuple[str, ...]:
        return super().notes(request) + ((self.card.negative_unused,) if request.negative_prompt else ())


class StudentDenoiser(FewSteps):
    """Embeddings in, Latents out, with a distilled model of the Linum family."""

    def velocity_without_guidance(self, batch: list[Embedding]) -> Velocity:
        contexts = [self.dit.embed_text([embedding.prompt["video"].to(self.device)]) for embedding in batch]

        def velocity(clips: Clips, sigma: float) -> Clips:
            time = torch.full((1,), rcm_timestep(sigma), device=self.device)    # no copy, which waits for the GPU
            return [{"video": self.dit(clip["video"][None], time, context)[0]}
                    for clip, context in zip(clips, contexts, strict=True)]
        return velocity


class TurboWanDenoiser(FewSteps, WanDenoiser):
    """Embeddings in, Latents out, with TurboDiffusion's Wan models: one transformer, or two experts that take turns."""

    def velocity_without_guidance(self, batch: list[Embedding]) -> Velocity:
        conditions = [self.condition(embedding) for embedding in batch]
        contexts: dict[int, list[Context]] = {}

        def velocity(clips: Clips, sigma: float) -> Clips:
            expert = self.card.expert_at(1000 * sigma)
            dit = self.turn(expert)
            if expert not in contexts:
                contexts.clear()                        # the other's turn is over
                contexts[expert] = [self.context(dit, embedding, embedding.prompt) for embedding in batch]
            time = torch.full((1,), rcm_timestep(sigma), device=self.device)    # no copy, which waits for the GPU
            return [{"video": dit(clip["video"][None], time, context, condition)[0]}
                    for clip, context, condition in zip(clips, contexts[expert], conditions, strict=True)]
        return velocity
