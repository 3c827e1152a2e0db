"""Reads a clip of the demo's world back: pixels in, attributes out. It knows how scenes are drawn and no model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from jobs.demo.world import BACKGROUNDS, COLORS, RADII, SIZE, SPEEDS, distance

AREAS = {"circle": 3.1416, "square": 3.1684, "triangle": 2.3674, "cross": 3.2}     # of a shape of radius 1


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
    if abs(dx) > abs(dy):
        direction = "right" if dx > 0 else "left"
    else:
        direction = "down" if dy > 0 else "up"
    return dict(shape=shape, color=nearest(color, COLORS), background=nearest(background, BACKGROUNDS),
                direction=direction, size=nearest_ratio(radius, RADII),
                speed=nearest_ratio(max(abs(dx), abs(dy)), SPEEDS))


def top_value(x: Tensor, share: float) -> Tensor:
    """The value that `share` of all entries reach."""
    return x.flatten().kthvalue(max(1, round((1 - share) * x.numel()))).values


def centroids(coverage: Tensor) -> Tensor:
    cells = torch.arange(SIZE) + 0.5
    mass = coverage.sum(dim=(1, 2)).clamp_min(1e-6)
    return torch.stack(((coverage * cells).sum(dim=(1, 2)) / mass,
                        (coverage * cells[:, None]).sum(dim=(1, 2)) / mass), dim=1)


def best_shape(coverage: Tensor, centres: Tensor, area: Tensor) -> str:
    """The shape of this area whose drawing around the centres differs least from the coverage."""
    picked = torch.linspace(0, len(coverage) - 1, min(9, len(coverage))).long()
    cells = torch.arange(SIZE) + 0.5
    x = cells[None, None, :] - centres[picked, 0, None, None]
    y = cells[None, :, None] - centres[picked, 1, None, None]
    errors = {}
    for shape, unit_area in AREAS.items():
        radius = (area / unit_area).sqrt().clamp_min(1)
        drawn = (0.5 - distance(shape, x / radius, y / radius) * radius).clamp(0, 1)
        errors[shape] = (drawn - coverage[picked]).abs().sum().item()
    return min(errors, key=errors.get)


def nearest(color: Tensor, palette: Mapping[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: (color - torch.tensor(palette[name])).norm().item())


def nearest_ratio(value: float, choices: Mapping[str, float]) -> str:
    return min(choices, key=lambda name: max(value, 1e-6) / choices[name] if value > choices[name]
               else choices[name] / max(value, 1e-6))
