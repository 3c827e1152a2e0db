"""Linum's way from noise to video: Euler steps along a guided velocity, or the few steps of a distilled model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dailies.model.family import Told
from dailies.model.guidance import AdaptiveProjectedGuidance, AverageToo, classifier_free
from dailies.model.linum.card import LinumCard
from dailies.model.linum.transformer import LinumDiT
from dailies.model.samplers import Clips, Steps, Velocity, euler, rcm
from dailies.model.schedules import flow_match_sigmas, rcm_sigmas, rcm_timestep

Guide = Callable[[Tensor, Tensor], Tensor]              # velocities with and without the prompt in, one out


class LinumSampler:
    """The clips of a batch are computed one by one, so a batch changes no bit of them: as one tensor they would meet
    other products, whose last bits guidance makes visible within a few steps.
    """

    weights_move = False

    def __init__(self, card: LinumCard, dit: LinumDiT, device: str):
        self.card, self.dit, self.device = card, dit, device

    @property
    def transformers(self) -> list[LinumDiT]:
        return [self.dit]

    @property
    def solver(self) -> str:
        return "rcm" if self.card.solver == "rcm" else f"euler and {self.card.guider}"

    def draws(self, num_steps: int) -> int:
        return num_steps if self.card.solver == "rcm" else 1

    def sample(self, batch: Sequence[Told], draw: Callable[[int], Clips], steps: Steps) -> Clips:
        request = batch[0].request
        if self.card.solver == "rcm":
            sigmas = rcm_sigmas(request.num_steps, self.card.sigma_max).tolist()
            return rcm(self.velocity(batch), draw(0), sigmas, draw, steps)
        sigmas = flow_match_sigmas(request.num_steps, self.card.shift).tolist()
        guides = [self.guide(request.guidance) for _ in batch]
        averages = [guide for guide in guides if isinstance(guide, AdaptiveProjectedGuidance)]
        if averages:
            steps = AverageToo(averages, steps)
        return euler(self.guided_velocity(batch, guides), draw(0), sigmas, steps)

    def velocity(self, batch: Sequence[Told]) -> Velocity:
        """Of a distilled model, which has guidance in it."""
        contexts = [self.dit.embed_text([told.prompt["video"].to(self.device)]) for told in batch]

        def velocity(clips: Clips, sigma: float) -> Clips:
            time = torch.full((1,), rcm_timestep(sigma), device=self.device)    # no copy, which waits for the GPU
            return [{"video": self.dit(clip["video"][None], time, context)[0]}
                    for clip, context in zip(clips, contexts, strict=True)]
        return velocity

    def guided_velocity(self, batch: Sequence[Told], guides: Sequence[Guide]) -> Velocity:
        """The velocity of clips, each with its own guide. Their texts' keys and values are made here, once."""
        predictions = [self.prediction(told) for told in batch]

        def velocity(clips: Clips, sigma: float) -> Clips:
            timestep = torch.full((1,), 1000 * sigma, device=self.device)
            return [{"video": guide(*predict(clip["video"][None], timestep))}
                    for clip, predict, guide in zip(clips, predictions, guides, strict=True)]
        return velocity

    def prediction(self, told: Told) -> Callable[[Tensor, Tensor], Sequence[Tensor] | Tensor]:
        """Of one clip: video [1, C, T, H, W] and timestep [1] in, [C, T, H, W] with its prompt and without it out."""
        prompt, negative = (text["video"].to(self.device) for text in (told.prompt, told.negative))
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
