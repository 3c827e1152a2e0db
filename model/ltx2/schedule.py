"""The sigmas of LTX-2: a schedule for the models that are guided, fixed lists for those that were distilled."""

import math

import torch
from torch import Tensor

TOKENS = 4096                                           # that the vendor's pipelines count, whatever the clip's size
BASE_SHIFT, MAX_SHIFT = 0.95, 2.05                      # at 1024 and at 4096 tokens
TERMINAL_SIGMA = 0.1                                          # the last sigma before 0

DISTILLED = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
REFINING = (0.909375, 0.725, 0.421875, 0.0)             # of the second of two stages


def ltx2_sigmas(num_steps: int, tokens: int = TOKENS) -> Tensor:
    """The num_steps + 1 sigmas of LTX2Scheduler, float64 on the CPU; the first is 1, the last 0.

    tokens: shift the steps to high noise, by more than the published range where there are more of them. The vendor's
    pipelines say 4096 for every clip, diffusers says the clip's own; this project follows the vendor.
    Raises ValueError for less than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    slope = (MAX_SHIFT - BASE_SHIFT) / (4096 - 1024)
    shift = math.exp(slope * tokens + BASE_SHIFT - 1024 * slope)
    grid = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    sigmas = shift / (shift + (1 / grid - 1))
    if num_steps > 1:                                   # one step has nothing to stretch
        sigmas = 1 - (1 - sigmas) * (1 - TERMINAL_SIGMA) / (1 - sigmas[-1])
    return torch.cat((sigmas, torch.zeros(1, dtype=torch.float64)))
