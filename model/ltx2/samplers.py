"""The samplers of LTX-2's pipelines that are its own; Euler and the few steps of a student are in model/samplers.py.

Both are given what predicts clean clips, which has put back what is not sampled, such as an image's tokens; `keep`
puts it back into noisy clips.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from dailies.model.samplers import STRAIGHT, Clips, Renoise, Steps, each

Denoise = Callable[[Clips, float], Clips]               # noisy clips and sigma in, clips without noise out
Keep = Callable[[Clips], Clips]

LAST_SIGMA = 0.0011                                     # of res_2s, before 0
REFINED_BELOW, REFINED_ABOVE = 0.5, 0.03                # its anchor, in steps so short, at sigmas so high
REFINEMENTS = 100


def ancestral(denoise: Denoise, clips: Clips, sigmas: Sequence[float], renoise: Renoise, keep: Keep,
              steps: Steps = STRAIGHT) -> Clips:
    """Euler steps that go further down than asked, and put fresh noise back: the distilled models from 2.5 on.

    renoise: draws 1 to len(sigmas) - 2.
    """
    begun, (clips,) = steps.begin((clips,))
    for i in range(begun, len(sigmas) - 1):
        sigma, after = sigmas[i], sigmas[i + 1]
        clean = denoise(clips, sigma)
        if after == 0:
            clips = clean
        else:
            down = after * after / sigma
            share, scale = down / sigma, (1 - after) / (1 - down)
            fresh = math.sqrt(max(0.0, after * after - (down * scale) ** 2))

            def step(x: Tensor, x0: Tensor, noise: Tensor, share: float = share, scale: float = scale,
                     fresh: float = fresh) -> Tensor:
                return scale * (share * x + (1 - share) * x0) + fresh * noise
            clips = keep(each(step, clips, clean, renoise(i + 1)))
        steps.done(i + 1, (clips,))
    return clips


def res_2s(denoise: Denoise, clips: Clips, sigmas: Sequence[float], renoise: Renoise, keep: Keep,
           steps: Steps = STRAIGHT, *, eta: float = 0.5) -> Clips:
    """An exponential integrator of second order that puts noise back, two evaluations a step and one at the end.

    The state is float64, and `denoise` is given it; the result is fp32.  renoise: draws 1 to 2 * (len(sigmas) - 1),
    of which a step takes two.  eta: the share of the noise that is put back; 0 is the ordinary integrator.
    Source   the "HQ" pipelines of LTX-2, after Zhang and Chen 2023 (arXiv 2204.13902).
    """
    places = (*sigmas[:-1], LAST_SIGMA)
    begun, (clips,) = steps.begin((each(Tensor.double, clips),))
    for i, (sigma, after) in enumerate(pairwise(places)):
        if i < begun:
            continue
        clips = one_step(denoise, clips, sigma, after, [standardised(renoise(2 * i + n)) for n in (1, 2)], keep, eta)
        if i == len(places) - 2:
            clips = denoise(clips, after)
        steps.done(i + 1, (clips,))
    return each(Tensor.float, clips)


def one_step(denoise: Denoise, clips: Clips, sigma: float, after: float, noises: Sequence[Clips], keep: Keep,
             eta: float) -> Clips:
    """From sigma to after, by way of their geometric mean."""
    length, middle = math.log(sigma / after), math.sqrt(sigma * after)
    first = 0.5 * phi(1, -length / 2)
    second_weight = 2 * phi(2, -length)
    first_weight = phi(1, -length) - second_weight
    anchor, clean = clips, each(Tensor.double, denoise(clips, sigma))
    towards = each(lambda x0, x: x0 - x, clean, anchor)
    half = each(lambda x, d: x + length * first * d, anchor, towards)
    half = keep(with_fresh_noise(anchor, half, noises[0], sigma, middle, eta))
    if length < REFINED_BELOW and sigma > REFINED_ABOVE:
        for _ in range(REFINEMENTS):                    # until the noisy middle lies on a step from the anchor
            anchor = each(lambda x, d: x - length * first * d, half, towards)
            towards = each(lambda x0, x: x0 - x, clean, anchor)
    again = each(lambda x0, x: x0.double() - x, denoise(half, middle), anchor)
    end = each(lambda x, d, e: x + length * (first_weight * d + second_weight * e), anchor, towards, again)
    return keep(with_fresh_noise(anchor, end, noises[1], sigma, after, eta))


def with_fresh_noise(clips: Clips, ahead: Clips, noise: Clips, sigma: float, after: float, eta: float) -> Clips:
    """`ahead`, to which a step from `clips` led without noise, with a share of its noise made fresh."""
    up = min(eta * after, 0.9999 * after)
    rest = math.sqrt(after * after - up * up)
    scale = 1 - after + rest
    down = rest / scale

    def mixed(x: Tensor, x_ahead: Tensor, fresh: Tensor) -> Tensor:
        implied = (x - x_ahead) / (sigma - after)
        return scale * (x - sigma * implied + down * implied) + up * fresh
    return each(mixed, clips, ahead, noise)


def standardised(clips: Clips) -> Clips:
    """float64, of mean 0 and standard deviation 1 in each stream, as the vendor's noise for res_2s is."""
    return each(lambda x: (x.double() - x.double().mean()) / x.double().std(), clips)


def phi(order: int, z: float) -> float:
    """(e^z - 1) / z, or (e^z - 1 - z) / z^2."""
    return math.expm1(z) / z if order == 1 else (math.expm1(z) - z) / (z * z)
