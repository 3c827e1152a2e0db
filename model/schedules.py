"""Noise schedules: how many steps -> the sigmas to stop at, from noise (near 1) down to 0."""

import math

import torch
from torch import Tensor


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Spend more of the steps at high noise: shift * s / (1 + (shift - 1) * s).  sigma in [0, 1]."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_match_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """The num_steps + 1 sigmas of the flow-matching Euler schedule, fp32 on the CPU; the first is 1, the last 0.

    The shift acts twice, as in diffusers' FlowMatchEulerDiscreteScheduler: on the smallest of 1000 training sigmas,
    which bounds the grid, and then on the grid. So the last sigma before 0 does not come closer to 0 with more steps.
    Raises ValueError for less than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    smallest = shifted(torch.tensor(1 / 1000, dtype=torch.float32), shift).double().item()
    grid = torch.linspace(1000.0, 1000 * smallest, num_steps, dtype=torch.float64) / 1000
    return torch.cat((shifted(grid, shift).float(), torch.zeros(1)))


def wan_sigmas(num_steps: int, shift: float, solver: str = "unipc") -> Tensor:
    """The num_steps + 1 sigmas of the Wan releases, float64 on the CPU; the last is 0.

    The first is 1 for dpm++, and just below 1 for unipc, which takes 0.999 of its training sigmas for the start.
    Raises ValueError for less than one step or another solver.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    # the release keeps its 1000 training sigmas in fp32, and 0.999 is not a number there
    starts = {"unipc": torch.tensor(0.999, dtype=torch.float32).item(), "dpm++": 1.0}
    if solver not in starts:
        raise ValueError(f"solver must be {' or '.join(starts)}; got {solver!r}")
    start = starts[solver]
    # summed as the release does it: another last bit can make timestep 249 of 250
    grid = torch.arange(num_steps, dtype=torch.float64) * (-start / num_steps) + start
    return torch.cat((shifted(grid, shift), torch.zeros(1, dtype=torch.float64)))


RCM_ANGLES = (1.5, 1.4, 1.0)                            # of the second, third and fourth step: tan is noise to signal


def rcm_sigmas(num_steps: int, sigma_max: float) -> Tensor:
    """The num_steps + 1 sigmas of the TurboDiffusion release, float64 on the CPU; the last is 0.

    sigma_max: noise to signal where the first step begins; more of it gives less variety. There is no shift: the places
    are those that the student was trained at.
    Raises ValueError for less than one step or more than four.
    """
    if not 1 <= num_steps <= 1 + len(RCM_ANGLES):
        raise ValueError(f"num_steps must be 1 to {1 + len(RCM_ANGLES)} for a distilled model; got {num_steps}")
    angles = torch.tensor((math.atan(sigma_max), *RCM_ANGLES[:num_steps - 1], 0.0), dtype=torch.float64)
    return angles.sin() / (angles.sin() + angles.cos())


def rcm_timestep(sigma: float) -> float:
    """The timestep that a distilled Wan model is given: 1000 * sigma in fp32, rounded to bf16 (932 for 933.78), as in
    its training."""
    return (1000 * torch.tensor(sigma, dtype=torch.float32)).bfloat16().item()


def whole_timestep(sigma: float) -> int:
    """The timestep that Wan's transformer is given: 1000 * sigma, cut and not rounded to a whole number."""
    return int(1000 * sigma)
