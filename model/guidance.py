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
        """Guided velocity, shaped like cond [..., C, T, H, W], fp32."""
        cond, uncond = cond.float(), uncond.float()
        guidance = cond - uncond
        if self.average is not None:
            guidance = guidance + self.momentum * self.average
        self.average = guidance                        # what is remembered is not yet bounded
        if self.max_norm > 0:
            norm = torch.linalg.vector_norm(guidance, dim=(-4, -2, -1), keepdim=True)    # per clip and latent step
            guidance = guidance * (self.max_norm / norm).clamp(max=1.0)
        clip = (-4, -3, -2, -1)
        unit = cond.double() / torch.linalg.vector_norm(cond.double(), dim=clip, keepdim=True).clamp_min(1e-12)
        along = (guidance.double() * unit).sum(dim=clip, keepdim=True) * unit
        across = guidance.double() - along
        return cond + self.scale * (across.float() + self.parallel * along.float())


class AverageToo(Steps):
    """Steps whose state has the running averages of APG behind what the sampler carries; a guide for each video."""

    def __init__(self, guides: Sequence[AdaptiveProjectedGuidance], steps: Steps):
        self.guides, self.steps = guides, steps

    def begin(self, start: State) -> tuple[int, State]:
        nothing = [{"video": torch.zeros_like(clip["video"], dtype=torch.float32)} for clip in start[0]]
        begun, (*state, averages) = self.steps.begin((*start, nothing))
        for guide, average in zip(self.guides, averages, strict=True):
            guide.average = average["video"]
        return begun, tuple(state)

    def done(self, step: int, state: State) -> None:
        self.steps.done(step, (*state, [{"video": guide.average} for guide in self.guides]))
