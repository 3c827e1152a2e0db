"""Reads a clip of the demo's world back: pixels in, attributes out. It knows how scenes are drawn and no model.

`read_attributes` says what a clip shows as a whole; `follow` looks at every frame alone, so that a shape that changes
its colour or falls apart on the way is seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dailies.jobs.demo.world import BACKGROUNDS, COLORS, RADII, SIDE, SPEEDS, distance

AREAS = {"circle": 3.1416, "square": 3.1684, "triangle": 2.3674, "cross": 3.2}     # of a shape of radius 1
FAINTEST = 30.0                                         # of 255: less apart from the background is no shape


def read_attributes(rgb: Tensor) -> dict[str, str]:
    """What a clip shows: shape, color, background, direction, size, speed, in the words of `world.ATTRIBUTES`.

    rgb uint8 [frames, 64, 64, 3], at least 2 frames. The nearest answer is given even for a clip that shows nothing:
    compare it with what was asked.
    """
    video = rgb.float()
    background = video.flatten(0, 2).median(dim=0).values      # no shape covers half of the picture
    apart = (video - background).norm(dim=-1)                  # [frames, 64, 64]
    full = top_value(apart, 0.02)
    coverage = ((apart / full.clamp_min(1)).clamp(0, 1) * 1.5 - 0.25).clamp(0, 1)    # steeper: compression blurs edges
    color = video[apart > 0.8 * full].mean(dim=0) if (apart > 0.8 * full).any() else background
    centres = centroids(coverage)                              # [frames, 2], x and y
    area = coverage.flatten(1).sum(dim=1).median()
    shape = best_shape(coverage, centres, area)
    radius = (area / AREAS[shape]).sqrt().item()
    quarter = max(1, len(centres) // 4)
    moved = (centres[-quarter:].mean(dim=0) - centres[:quarter].mean(dim=0)) / (len(centres) - quarter)
    dx, dy = moved.tolist()
    direction = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else "down" if dy > 0 else "up"
    return dict(shape=shape, color=nearest(color, COLORS), background=nearest(background, BACKGROUNDS),
                direction=direction, size=nearest_ratio(radius, RADII),
                speed=nearest_ratio(max(abs(dx), abs(dy)), SPEEDS))


@dataclass(frozen=True, kw_only=True)
class Track:
    """What is seen of one shape in every frame of a clip."""

    colors: tuple[str, ...]                             # nearest in COLORS; "" where nothing stands out
    centres: Tensor                                     # [frames, 2], x and y in pixels
    strayed: Tensor                                     # [frames], pixels from the straight, even path that fits best
    iou: Tensor                                         # [frames], with the shape as it is drawn at this place and size


def follow(rgb: Tensor, shape: str) -> Track:
    """Look for `shape` in every frame of rgb uint8 [frames, 64, 64, 3], at least 2."""
    video = rgb.float()
    background = video.flatten(0, 2).median(dim=0).values
    apart = (video - background).norm(dim=-1)                  # [frames, 64, 64]
    full = torch.stack([top_value(frame, 0.02) for frame in apart])[:, None, None]
    shown = full.flatten() > FAINTEST
    mask = apart > 0.5 * full.clamp_min(FAINTEST)
    inside = (apart > 0.8 * full)[..., None]
    color = (video * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp_min(1)
    centres = centroids(mask.float())
    radius = (mask.sum(dim=(1, 2)) / AREAS[shape]).sqrt().clamp_min(1)[:, None, None]
    drawn = covered(shape, centres, radius) > 0.5
    iou = (mask & drawn).sum(dim=(1, 2)) / (mask | drawn).sum(dim=(1, 2)).clamp_min(1)
    time = torch.stack((torch.ones(len(video)), torch.linspace(-1, 1, len(video))), dim=1)
    path = time @ torch.linalg.lstsq(time, centres).solution
    return Track(colors=tuple(nearest(c, COLORS) if seen else "" for c, seen in zip(color, shown, strict=True)),
                 centres=centres, strayed=(centres - path).norm(dim=1), iou=iou * shown)


def covered(shape: str, centres: Tensor, radius: Tensor) -> Tensor:
    """Coverage [frames, 64, 64] of a shape drawn at centres [frames, 2] with radius [frames, 1, 1], or one for all."""
    cells = torch.arange(SIDE) + 0.5
    x = cells[None, None, :] - centres[:, 0, None, None]
    y = cells[None, :, None] - centres[:, 1, None, None]
    return (0.5 - distance(shape, x / radius, y / radius) * radius).clamp(0, 1)


def top_value(x: Tensor, share: float) -> Tensor:
    """The value that `share` of all entries reach."""
    return x.flatten().kthvalue(max(1, round((1 - share) * x.numel()))).values


def centroids(coverage: Tensor) -> Tensor:
    cells = torch.arange(SIDE) + 0.5
    mass = coverage.sum(dim=(1, 2)).clamp_min(1e-6)
    return torch.stack(((coverage * cells).sum(dim=(1, 2)) / mass,
                        (coverage * cells[:, None]).sum(dim=(1, 2)) / mass), dim=1)


def best_shape(coverage: Tensor, centres: Tensor, area: Tensor) -> str:
    """The shape of this area whose drawing around the centres differs least from the coverage."""
    picked = torch.linspace(0, len(coverage) - 1, min(9, len(coverage))).long()
    errors = {}
    for shape, unit_area in AREAS.items():
        radius = (area / unit_area).sqrt().clamp_min(1)
        errors[shape] = (covered(shape, centres[picked], radius) - coverage[picked]).abs().sum().item()
    return min(errors, key=errors.get)


def nearest(color: Tensor, palette: Mapping[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: (color - torch.tensor(palette[name])).norm().item())


def nearest_ratio(value: float, choices: Mapping[str, float]) -> str:
    return min(choices, key=lambda name: max(value, 1e-6) / choices[name] if value > choices[name]
               else choices[name] / max(value, 1e-6))
