"""The world of the demo with sound: a shape moves to the border of the picture and turns back, and its touch is heard.

The sentences are those of `world.py`: the colour is heard as the pitch, the size as the loudness, and when the shape
touches the border, which no sentence says, is heard as the moment that the tone begins.

Pitches are multiples of 100 Hz, and every tone swings as if it had begun with the clip: a mel frame is 10 ms, so the
same place within a frame has the same phase, and a vocoder, which does not know where it is, can make a steady tone.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from dailies.jobs.demo.phases import CLIP_FRAMES
from dailies.jobs.demo.world import COLORS, DIRECTIONS, EXTENTS, FPS, SIDE, Scene, distance, sentence_about

AUDIO_RATE = 24_000                                     # of what the vocoder makes; the VAE's mels are of 16 kHz
PITCHES = dict(zip(COLORS, (300.0, 400.0, 500.0, 600.0, 800.0, 1000.0), strict=True))       # Hz: two chords of three
LOUDNESS = {"small": 0.2, "large": 0.5}                 # peak of the tone, of full scale
ATTACK_S, DECAY_S = 0.004, 0.35                         # it rises in this time, and falls to a third in that
PACES = {"slow": 11.0, "fast": 22.0}                   # pixels per second
TOUCHES = {"slow": (0.9, 1.4), "fast": (0.45, 0.95)}    # seconds into the clip, between which the shape touches


@dataclass(frozen=True, kw_only=True)
class Bounce(Scene):
    """A scene whose shape touches the border once."""

    @property
    def touch_s(self) -> float:
        """Seconds from the first picture to the touch."""
        low, high = TOUCHES[self.speed]
        return low + (high - low) * self.variation[2]

    @property
    def pitch(self) -> float:
        return PITCHES[self.color]

    def centres(self, frames: int = CLIP_FRAMES, begin: int = 0) -> Tensor:
        """Of the shape in each frame from `begin` on, [frames, 2]: x and y in pixels."""
        pace = PACES[self.speed] * (0.9 + 0.2 * self.variation[1])
        left, up, right, down = (reach * self.radius for reach in EXTENTS[self.shape])
        dx, dy = DIRECTIONS[self.direction]
        # from the place of the touch, before it and after
        away = pace * ((begin + torch.arange(frames)) / FPS - self.touch_s).abs()
        across = self.variation[3]
        if dx:
            x = (SIDE - right) - away if dx > 0 else left + away
            y = torch.full_like(x, up + 2 + across * (SIDE - up - down - 4))
        else:
            y = (SIDE - down) - away if dy > 0 else up + away
            x = torch.full_like(y, left + 2 + across * (SIDE - left - right - 4))
        return torch.stack((x, y), dim=1)

    def pictures(self, frames: int = CLIP_FRAMES, begin: int = 0) -> tuple[Tensor, Tensor]:
        """Video [3, frames, 64, 64] in [-1, 1] and the shape's coverage [frames, 64, 64] in [0, 1]."""
        cells, centres = torch.arange(SIDE) + 0.5, self.centres(frames, begin)
        x = (cells[None, None, :] - centres[:, 0, None, None]) / self.radius
        y = (cells[None, :, None] - centres[:, 1, None, None]) / self.radius
        coverage = (0.5 - distance(self.shape, x, y) * self.radius).clamp(0, 1)
        shape, background = self.shades()
        video = background[:, None, None, None] + (shape - background)[:, None, None, None] * coverage
        return video * 2 - 1, coverage

    def sound(self, samples: int, rate: int) -> Tensor:
        """Both ears alike [2, samples] in [-1, 1]: silence, then the tone."""
        return tone(self.pitch, LOUDNESS[self.size], self.touch_s, samples, rate)

    def samples(self, rate: int, frames: int = CLIP_FRAMES) -> int:
        return round(frames / FPS * rate)


def tone(pitch: float, loudness: float, onset_s: float, samples: int, rate: int) -> Tensor:
    """[2, samples]: a tone that begins at onset_s, rises at once and dies away; its phase is that of the clip."""
    time = torch.arange(samples, dtype=torch.float64) / rate
    since = (time - onset_s).clamp_min(0)
    envelope = (since / ATTACK_S).clamp_max(1) * torch.exp(-since / DECAY_S)
    return (loudness * envelope * torch.sin(2 * math.pi * pitch * time)).float().expand(2, -1)


def unseen_bounces(count: int, *, seed: int = 7) -> list[tuple[Bounce, str]]:
    """Scenes and complete sentences from a seed not used in training; every second is a combination kept from it."""
    rng = random.Random(f"unseen bounces {seed}")
    scenes = [Bounce.draw(rng, held_out=i % 2 == 1) for i in range(count)]
    return [(scene, sentence_about(scene, rng)) for scene in scenes]
