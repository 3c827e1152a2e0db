"""Samplers: pure functions of a velocity over streams, (video,) or (video, audio); they know no model and no prompt."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

Streams = tuple[Tensor, ...]
Velocity = Callable[[Streams, float], Streams]          # noisy streams and sigma in, d streams / d sigma out
Renoise = Callable[[int], Streams]                      # number of a step, from 1, in; fresh noise for its end out
State = tuple[Streams, ...]     # what goes from one step to the next: the streams, then what the solver remembers


class Steps:
    """Says where a sampler begins, which is here the start, and is told of every step; pipeline/run/saved_steps.py saves them."""

    def begin(self, start: State) -> tuple[int, State]:
        """How many steps are done already, and the state after them."""
        return 0, start

    def done(self, step: int, state: State) -> None:
        """`step` steps are done; `state` decides the rest, with the velocity and the sigmas."""


STRAIGHT = Steps()                                      # from the first step to the last


def euler(velocity: Velocity, streams: Streams, sigmas: Sequence[float], steps: Steps = STRAIGHT) -> Streams:
    """Integrate from noise at sigmas[0] to clean streams at sigmas[-1] = 0."""
    begun, (streams,) = steps.begin((streams,))
    for i in range(begun, len(sigmas) - 1):
        sigma, next_sigma = sigmas[i], sigmas[i + 1]
        streams = tuple(x + (next_sigma - sigma) * v for x, v in zip(streams, velocity(streams, sigma), strict=True))
        steps.done(i + 1, (streams,))
    return streams


def unipc(velocity: Velocity, streams: Streams, sigmas: Sequence[float], steps: Steps = STRAIGHT) -> Streams:
    """UniPC of second order (bh2, predicting the clean streams), from noise at sigmas[0] to sigmas[-1] = 0.

    One velocity per step. It serves twice: to correct the step that led to it, and to predict the next.
    Source   Zhao et al. 2023 (arXiv 2302.04867), as the Wan releases apply it to flow matching.
    """
    num_steps = len(sigmas) - 1
    begun, (streams, corrected, *clean) = steps.begin((streams, streams))
    for i in range(begun, num_steps):
        clean = [*clean[-2:], clean_streams(velocity, streams, sigmas[i])]      # predictions of the last three steps
        if i > 0:
            corrected = correct(corrected, clean, sigmas[: i + 1], order=min(2, i))     # each step's own order
        order = min(2, i + 1, num_steps - i)            # the last step is of first order
        streams = extrapolate(corrected, clean, sigmas[: i + 2], order)
        steps.done(i + 1, (streams, corrected, *clean[-2:]))
    return streams


def dpm_solver(velocity: Velocity, streams: Streams, sigmas: Sequence[float], steps: Steps = STRAIGHT) -> Streams:
    """DPM-Solver++ (2M, midpoint), from noise at sigmas[0] to sigmas[-1] = 0.

    Source   Lu et al. 2022 (arXiv 2211.01095), as the Wan releases apply it to flow matching.
    """
    num_steps = len(sigmas) - 1
    begun, (streams, *clean) = steps.begin((streams,))
    for i in range(begun, num_steps):
        clean = [*clean[-1:], clean_streams(velocity, streams, sigmas[i])]
        streams = extrapolate(streams, clean, sigmas[: i + 2], order=min(2, i + 1, num_steps - i))
        steps.done(i + 1, (streams, clean[-1]))
    return streams


def rcm(velocity: Velocity, noise: Streams, sigmas: Sequence[float], renoise: Renoise | None = None,
        steps: Steps = STRAIGHT) -> Streams:
    """The few steps of a distilled (consistency) model: each predicts the clean streams, then noise is put back.

    noise: the first draw. It starts at sigmas[0], which is just below 1, scaled and not mixed.  renoise: the later
    draws, one for each step but the last, of the same shape; None takes the noise that the velocity implies (the ODE).
    The state is float64, so velocity is given float64; the result is fp32.
    Source   Zheng et al. 2025 (arXiv 2510.08431), as the TurboDiffusion release samples.
    """
    begun, (streams,) = steps.begin((tuple(sigmas[0] * x.double() for x in noise),))
    for i in range(begun, len(sigmas) - 1):
        sigma, next_sigma = sigmas[i], sigmas[i + 1]
        if renoise is None:
            streams = tuple(x - (sigma - next_sigma) * v
                            for x, v in zip(streams, velocity(streams, sigma), strict=True))
        else:
            streams = clean_streams(velocity, streams, sigma)
            if next_sigma > 0:
                streams = tuple((1 - next_sigma) * x + next_sigma * fresh.double()
                                for x, fresh in zip(streams, renoise(i + 1), strict=True))
        steps.done(i + 1, (streams,))
    return tuple(x.float() for x in streams)


def clean_streams(velocity: Velocity, streams: Streams, sigma: float) -> Streams:
    """What the streams would be without noise, if the velocity stayed as it is."""
    return tuple(x - sigma * v for x, v in zip(streams, velocity(streams, sigma), strict=True))


def extrapolate(streams: Streams, clean: Sequence[Streams], sigmas: Sequence[float], order: int) -> Streams:
    """One step of the exponential integrator, from sigmas[-2] to sigmas[-1].

    clean: predictions at sigmas[:-1].  order 1 takes the last one as constant, 2 draws a line through the last two.
    """
    *_, here, there = sigmas
    step = log_snr(there) - log_snr(here)               # infinite to sigma 0
    gain = (there - 1) * math.expm1(-step)              # the share of the clean prediction
    slope = 0.0
    if order == 2:                                      # 0 where the step before came from pure noise, at sigma 1
        slope = 0.5 * gain * step / (log_snr(here) - log_snr(sigmas[-3]))
    before = clean[-2] if order == 2 else clean[-1]
    return tuple(there / here * x + gain * m + slope * (m - m_before)
                 for x, m, m_before in zip(streams, clean[-1], before, strict=True))


def correct(streams: Streams, clean: Sequence[Streams], sigmas: Sequence[float], order: int) -> Streams:
    """The step from sigmas[-2] to sigmas[-1] once more, now that the prediction at its end is known.

    streams: those at sigmas[-2], corrected.  clean: predictions at all of sigmas.
    """
    *_, here, there = sigmas
    step = log_snr(there) - log_snr(here)
    gain = (there - 1) * math.expm1(-step)
    weight, weight_before = 0.5, 0.0                    # of the change to the end, and of the one from the step before
    before = clean[-2]
    if order == 2:
        ratio = (log_snr(sigmas[-3]) - log_snr(here)) / step
        first = math.expm1(-step) / -step - 1
        b_first, b_second = first / math.expm1(-step), 2 * (first / -step - 0.5) / math.expm1(-step)
        weight_before = (b_first - b_second) / (1 - ratio)
        weight = b_first - weight_before
        weight_before /= ratio
        before = clean[-3]
    return tuple(there / here * x + gain * (m + weight * (m_end - m) + weight_before * (m_before - m))
                 for x, m_end, m, m_before in zip(streams, clean[-1], clean[-2], before, strict=True))


def log_snr(sigma: float) -> float:
    """ln((1 - sigma) / sigma): -inf at noise, inf without."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)
