"""Hears a clip of the demo with sound, and sees when its shape turns: pixels and samples in, times and pitches out.

It knows how the world rings and moves (`world_av.py`) and no model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dailies.jobs.demo.checker import nearest_ratio
from dailies.jobs.demo.world import DIRECTIONS, FPS
from dailies.jobs.demo.world_av import LOUDNESS, PITCHES

FAINTEST_TONE = 0.02                                    # of full scale
ONSET_SHARE = 0.2                                       # of the loudest, at which a tone has begun
HEARD_S, SHORT_S = 0.4, 0.005                           # of a tone for its pitch; of a moment
TURNS_PER_FRAME = 10                                    # places tried for the turn


def onset_s(sound: Tensor, rate: int) -> float | None:
    """Seconds to the beginning of the first tone, None for silence.  sound [samples, 2] in [-1, 1]."""
    if len(sound) < (size := round(SHORT_S * rate)):
        return None
    loudness = F.max_pool1d(sound.float().abs().amax(1)[None, None], size, stride=size)[0, 0]
    if loudness.max() < FAINTEST_TONE:
        return None
    return (loudness >= ONSET_SHARE * loudness.max()).nonzero()[0].item() * SHORT_S


def color_heard(sound: Tensor, rate: int) -> str | None:
    """The colour whose pitch is nearest to the loudest frequency after the onset, None for silence."""
    begin = onset_s(sound, rate)
    if begin is None:
        return None
    part = sound[round(begin * rate):round((begin + HEARD_S) * rate)].float().mean(1)
    spectrum = torch.fft.rfft(part * torch.hann_window(len(part), periodic=False), n=4 * rate).abs()
    pitch = spectrum.argmax().item() / 4
    return min(PITCHES, key=lambda color: abs(PITCHES[color] - pitch))


def size_heard(sound: Tensor) -> str:
    return nearest_ratio(sound.abs().max().item(), LOUDNESS)


def turn_s(centres: Tensor, direction: str) -> float:
    """Seconds to the moment at which the shape is nearest to the border that it moves to: where the two straight, even
    ways, there and back, meet that fit its places best.

    centres [frames, 2]: x and y in pixels, by frame.
    """
    towards = centres.double() @ torch.tensor(DIRECTIONS[direction], dtype=torch.float64)
    times = torch.arange(len(centres), dtype=torch.float64)
    tried = torch.arange(TURNS_PER_FRAME, TURNS_PER_FRAME * (len(centres) - 2), dtype=torch.float64) / TURNS_PER_FRAME
    away = (times - tried[:, None]).abs()                                       # [tried, frames]
    ways = torch.stack((torch.ones_like(away), away), dim=2)
    fitted = torch.linalg.lstsq(ways, towards.expand(len(tried), -1)[..., None]).solution
    error = (ways @ fitted - towards[:, None]).square().mean(dim=(1, 2))
    error[fitted[:, 1, 0] >= 0] = torch.inf                                     # it moves there first, then back
    return tried[error.argmin()].item() / FPS
