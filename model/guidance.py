"""Guidance: how the velocity with the prompt and the velocity without it become one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dailies.model.samplers import State, Steps


def classifier_free(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond); scale 1 is the prompt's velocity alone."""
    return uncond + scale * (cond - uncond)


class AdaptiveProjectedGuidance:
    """APG with momentum: guidance averaged over steps, bounded in length per frame, its share along cond removed.

    One object serves one clip and one run of the sampler: it remembers the running average from step to step.
    The base is cond and the factor is scale, so with everything else off it equals classifier_free at 1 + scale.
    Source   Sadat et al. 2024 (arXiv 2410.02416), as the Linum v2 release applies it.
    """

    def __init__(self, scale: float, *, momentum: float = -0.75, max_norm: float = 20.0, parallel: float = 0.0):
        self.scale, self.momentum, self.max_norm, self.parallel = scale, momentum, max_norm, parallel
        self.average: Tensor | None = None

    def __call__(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Guided velocity, shaped like cond [B, C, T, H, W], fp32."""
        cond, uncond = cond.float(), uncond.float()
        guidance = cond - uncond
        if self.average is not None:
            guidance = guidance + self.momentum * self.average
        self.average = guidance                        # what is remembered is not yet bounded
        if self.max_norm > 0:
            norm = torch.linalg.vector_norm(guidance, dim=(1, 3, 4), keepdim=True)       # per clip and latent step
            guidance = guidance * (self.max_norm / norm).clamp(max=1.0)
        unit = cond.double() / torch.linalg.vector_norm(cond.double(), dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-12)
        along = (guidance.double() * unit).sum(dim=(1, 2, 3, 4), keepdim=True) * unit    # per clip
        across = guidance.double() - along
        return cond + self.scale * (across.float() + self.parallel * along.float())


class AverageToo(Steps):
    """Steps whose state has the running averages of APG behind what the sampler carries; a guide for each stream."""

    def __init__(self, guides: Sequence[AdaptiveProjectedGuidance], steps: Steps):
        self.guides, self.steps = guides, steps

    def begin(self, start: State) -> tuple[int, State]:
        nothing = tuple(torch.zeros_like(x, dtype=torch.float32) for x in start[0])
        begun, (*state, averages) = self.steps.begin((*start, nothing))
        for guide, average in zip(self.guides, averages, strict=True):
            guide.average = average
        return begun, tuple(state)

    def done(self, step: int, state: State) -> None:
        self.steps.done(step, (*state, tuple(guide.average for guide in self.guides)))
