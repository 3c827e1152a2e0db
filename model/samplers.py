"""Samplers: pure functions of a velocity over the streams of clips; they know no model and no prompt.

A clip is its streams by name, "video" and, where the model has sound, "audio"; a batch is a list of clips. What is done
to a clip does not depend on those beside it.
"""

import math
from collections.abc import Callable, Sequence

from torch import Tensor

Streams = dict[str, Tensor]                             # of one clip
Clips = list[Streams]
Velocity = Callable[[Clips, float], Clips]              # noisy clips and sigma in, d clips / d sigma out
Renoise = Callable[[int], Clips]                        # number of a step, from 1, in; fresh noise for its end out
State = tuple[Clips, ...]       # what goes from one step to the next: the clips, then what the solver remembers


class Steps:
    """Says where a sampler begins, which is here the start, and is told of every step; pipeline/run/saved_steps.py
    saves them."""

    begun = 0                                           # steps that are done already

    def begin(self, start: State) -> tuple[int, State]:
        """How many steps are done already, and the state after them."""
        return 0, start

    def done(self, step: int, state: State) -> None:
        """`step` steps are done; `state` decides the rest, with the velocity and the sigmas."""


STRAIGHT = Steps()                                      # from the first step to the last


def each(make: Callable[..., Tensor], *batches: Clips) -> Clips:
    """make(x, y, ...) of every stream of every clip, x of the first batch, y of the second."""
    return [{name: make(*(clip[name] for clip in clips)) for name in clips[0]} for clips in zip(*batches, strict=True)]


def euler(velocity: Velocity, clips: Clips, sigmas: Sequence[float], steps: Steps = STRAIGHT) -> Clips:
    """Integrate from noise at sigmas[0] to clean clips at sigmas[-1] = 0."""
    begun, (clips,) = steps.begin((clips,))
    for i in range(begun, len(sigmas) - 1):
        step = sigmas[i + 1] - sigmas[i]
        clips = each(lambda x, v, step=step: x + step * v, clips, velocity(clips, sigmas[i]))
        steps.done(i + 1, (clips,))
    return clips


def unipc(velocity: Velocity, clips: Clips, sigmas: Sequence[float], steps: Steps = STRAIGHT) -> Clips:
    """UniPC of second order (bh2, predicting the clean clips), from noise at sigmas[0] to sigmas[-1] = 0.

    One velocity per step. It serves twice: to correct the step that led to it, and to predict the next.
    Source   Zhao et al. 2023 (arXiv 2302.04867), as the Wan releases apply it to flow matching.
    """
    num_steps = len(sigmas) - 1
    begun, (clips, corrected, *clean) = steps.begin((clips, clips))
    for i in range(begun, num_steps):
        clean = [*clean[-2:], clean_clips(velocity, clips, sigmas[i])]          # predictions of the last three steps
        if i > 0:
            corrected = correct(corrected, clean, sigmas[: i + 1], order=min(2, i))     # each step's own order
        order = min(2, i + 1, num_steps - i)            # the last step is of first order
        clips = extrapolate(corrected, clean, sigmas[: i + 2], order)
        steps.done(i + 1, (clips, corrected, *clean[-2:]))
    return clips


def dpm_solver(velocity: Velocity, clips: Clips, sigmas: Sequence[float], steps: Steps = STRAIGHT) -> Clips:
    """DPM-Solver++ (2M, midpoint), from noise at sigmas[0] to sigmas[-1] = 0.

    Source   Lu et al. 2022 (arXiv 2211.01095), as the Wan releases apply it to flow matching.
    """
    num_steps = len(sigmas) - 1
    begun, (clips, *clean) = steps.begin((clips,))
    for i in range(begun, num_steps):
        clean = [*clean[-1:], clean_clips(velocity, clips, sigmas[i])]
        clips = extrapolate(clips, clean, sigmas[: i + 2], order=min(2, i + 1, num_steps - i))
        steps.done(i + 1, (clips, clean[-1]))
    return clips


def rcm(velocity: Velocity, noise: Clips, sigmas: Sequence[float], renoise: Renoise | None = None,
        steps: Steps = STRAIGHT) -> Clips:
    """The few steps of a distilled (consistency) model: each predicts the clean clips, then noise is put back.

    noise: the first draw. It starts at sigmas[0], which is just below 1, scaled and not mixed.  renoise: the later
    draws, one for each step but the last, of the same shape; None takes the noise that the velocity implies (the ODE).
    The state is float64, so velocity is given float64; the result is fp32.
    Source   Zheng et al. 2025 (arXiv 2510.08431), as the TurboDiffusion release samples.
    """
    begun, (clips,) = steps.begin((each(lambda x: sigmas[0] * x.double(), noise),))
    for i in range(begun, len(sigmas) - 1):
        sigma, after = sigmas[i], sigmas[i + 1]
        if renoise is None:
            clips = each(lambda x, v, step=sigma - after: x - step * v, clips, velocity(clips, sigma))
        else:
            clips = clean_clips(velocity, clips, sigma)
            if after > 0:
                clips = each(lambda x, fresh, share=after: (1 - share) * x + share * fresh.double(),
                             clips, renoise(i + 1))
        steps.done(i + 1, (clips,))
    return each(Tensor.float, clips)


def clean_clips(velocity: Velocity, clips: Clips, sigma: float) -> Clips:
    """What the clips would be without noise, if the velocity stayed as it is."""
    return each(lambda x, v: x - sigma * v, clips, velocity(clips, sigma))


def extrapolate(clips: Clips, clean: Sequence[Clips], sigmas: Sequence[float], order: int) -> Clips:
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
    return each(lambda x, m, m_before: there / here * x + gain * m + slope * (m - m_before), clips, clean[-1], before)


def correct(clips: Clips, clean: Sequence[Clips], sigmas: Sequence[float], order: int) -> Clips:
    """The step from sigmas[-2] to sigmas[-1] once more, now that the prediction at its end is known.

    clips: those at sigmas[-2], corrected.  clean: predictions at all of sigmas.
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
    return each(
        lambda x, m_end, m, m_before:
            there / here * x + gain * (m + weight * (m_end - m) + weight_before * (m_before - m)),
        clips, clean[-1], clean[-2], before)


def log_snr(sigma: float) -> float:
    """ln((1 - sigma) / sigma): -inf at noise, inf without."""
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0.0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)
