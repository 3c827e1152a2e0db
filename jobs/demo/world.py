"""The demo model's world: a plain shape moves over a plain background, drawn by this program and said in a sentence.

A `Scene` holds what the sentence may say (shape, colour, background, direction, size, speed) and what it never says
(where the shape starts, small variations of shade, radius and pace), so that one sentence has many clips.
"""

import itertools
import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

SIDE = 64                                              # pixels a side
FPS = 24
COLORS = {"red": (220, 40, 40), "green": (40, 165, 60), "blue": (45, 75, 225), "yellow": (235, 210, 45),
          "purple": (155, 60, 190), "cyan": (60, 200, 215)}
BACKGROUNDS = {"black": (20, 20, 24), "gray": (128, 128, 128), "white": (238, 238, 238), "brown": (112, 76, 46)}
RADII = {"small": 8.0, "large": 13.0}                  # pixels
SPEEDS = {"slow": 9 / 48, "fast": 26 / 48}             # pixels per frame
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}    # x to the right, y down

# how far a shape of radius 1 reaches from its centre: left, up, right, down
EXTENTS = {"circle": (1, 1, 1, 1), "square": (0.89, 0.89, 0.89, 0.89), "triangle": (1.17, 1.35, 1.17, 0.675),
           "cross": (1.2, 1.2, 1.2, 1.2)}
ATTRIBUTES = {"shape": tuple(EXTENTS), "color": tuple(COLORS), "background": tuple(BACKGROUNDS),
              "direction": tuple(DIRECTIONS), "size": tuple(RADII), "speed": tuple(SPEEDS)}

# Never drawn for training: a model that renders them has learnt the attributes, not the list of clips.
HELD_OUT = (dict(shape="circle", color="cyan"), dict(shape="square", color="purple"),
            dict(shape="triangle", color="red"),
            dict(shape="cross", color="yellow"), dict(background="brown", direction="up"))


@dataclass(frozen=True, kw_only=True)
class Scene:
    shape: str
    color: str
    background: str
    direction: str
    size: str
    speed: str
    variation: tuple[float, ...] = field(default=(0.5,) * 10)    # each in [0, 1]: radius, pace, x, y, two shades of RGB

    @classmethod
    def draw(cls, rng: random.Random, *, held_out: bool | None = False) -> "Scene":
        """A random scene.  held_out: False draws what training may see, True what it may not, None either."""
        while True:
            scene = cls(**{name: rng.choice(values) for name, values in ATTRIBUTES.items()},
                        variation=tuple(rng.random() for _ in range(10)))
            if held_out is None or scene.held_out == held_out:
                return scene

    @property
    def held_out(self) -> bool:
        return any(all(getattr(self, name) == value for name, value in combination.items()) for combination in HELD_OUT)

    @property
    def attributes(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ATTRIBUTES}

    @property
    def radius(self) -> float:
        return RADII[self.size] * (0.94 + 0.12 * self.variation[0])

    def path(self, frames: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """Centre in frame 0 and velocity in pixels per frame, both (x, y); the shape stays inside for all `frames`."""
        pace = SPEEDS[self.speed] * (0.9 + 0.2 * self.variation[1])
        velocity = tuple(pace * d for d in DIRECTIONS[self.direction])
        left, up, right, down = (reach * self.radius + 1.5 for reach in EXTENTS[self.shape])
        start = []
        for v, before, after, where in zip(velocity, (left, up), (right, down), self.variation[2:4], strict=True):
            travel = v * (frames - 1)
            low, high = before - min(0.0, travel), SIDE - after - max(0.0, travel)
            start.append(low + where * (high - low) if high > low else (low + high) / 2)
        return tuple(start), velocity

    def shades(self) -> tuple[Tensor, Tensor]:
        """RGB of the shape and of the background, [3] in [0, 1]."""
        jitter = (torch.tensor(self.variation[4:10]) - 0.5) * 16
        return ((torch.tensor(COLORS[self.color]) + jitter[:3]) / 255).clamp(0, 1), (
            (torch.tensor(BACKGROUNDS[self.background]) + jitter[3:]) / 255).clamp(0, 1)

    def render(self, frames: int, *, start: int = 0, total: int | None = None) -> tuple[Tensor, Tensor]:
        """Video [3, frames, 64, 64] in [-1, 1] and the shape's coverage [frames, 64, 64] in [0, 1].

        A clip of `total` frames is laid out, and `frames` of it from `start` are drawn.
        """
        (x0, y0), (vx, vy) = self.path(total or start + frames)
        time = torch.arange(start, start + frames, dtype=torch.float32)
        cells = torch.arange(SIDE) + 0.5
        x = (cells[None, None, :] - (x0 + vx * time)[:, None, None]) / self.radius
        y = (cells[None, :, None] - (y0 + vy * time)[:, None, None]) / self.radius
        coverage = (0.5 - distance(self.shape, x, y) * self.radius).clamp(0, 1)
        shape, background = self.shades()
        video = background[:, None, None, None] + (shape - background)[:, None, None, None] * coverage
        return video * 2 - 1, coverage


# Every combination of attributes, and which of them training may see. A scene is one of these and its variation.
SCENE_KINDS = tuple(dict(zip(ATTRIBUTES, values, strict=True)) for values in itertools.product(*ATTRIBUTES.values()))
SEEN_KINDS = tuple(i for i, kind in enumerate(SCENE_KINDS) if not Scene(**kind).held_out)


class Painter:
    """Draws many scenes at once from tensors on one device: the pictures of `Scene.render`, with nothing on the host.

    So a GPU that trains need not wait for a CPU, and a step that draws can be recorded as a CUDA graph.
    Letters  B scenes  F frames; a kind is an index into SCENE_KINDS.
    """

    def __init__(self, device: str | torch.device):
        def table(of_kind) -> Tensor:
            return torch.tensor([of_kind(kind) for kind in SCENE_KINDS], dtype=torch.float64, device=device)

        self.seen = torch.tensor(SEEN_KINDS, device=device)
        self.shapes = table(lambda kind: list(EXTENTS).index(kind["shape"])).long()
        self.radii, self.speeds = table(lambda kind: RADII[kind["size"]]), table(lambda kind: SPEEDS[kind["speed"]])
        self.directions = table(lambda kind: DIRECTIONS[kind["direction"]])                  # [kinds, 2], x and y
        self.extents = table(lambda kind: EXTENTS[kind["shape"]])                            # left, up, right, down
        self.shades = table(lambda kind: (*COLORS[kind["color"]], *BACKGROUNDS[kind["background"]])).float()
        self.cells = torch.arange(SIDE, device=device) + 0.5

    def of(self, scenes: "list[Scene]") -> tuple[Tensor, Tensor]:
        """Kinds and variations of these."""
        device = self.seen.device
        return (torch.tensor([SCENE_KINDS.index(scene.attributes) for scene in scenes], device=device),
                torch.tensor([scene.variation for scene in scenes], device=device))

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Kinds [B] that training may see, all alike as in Scene.draw, and variations [B, 10], by torch's generator."""
        picked = torch.randint(len(self.seen), (count,), device=self.seen.device)
        return self.seen[picked], torch.rand(count, 10, device=self.seen.device)

    def render(self, kinds: Tensor, variation: Tensor, frames: int, *, start: int | Tensor = 0,
               total: int | None = None) -> tuple[Tensor, Tensor]:
        """Video [B, 3, F, 64, 64] in [-1, 1] and coverage [B, F, 64, 64] in [0, 1].

        kinds [B], variation [B, 10] in [0, 1].  start: the same for all, or [B] and then with total.
        """
        wide = variation.double()                      # sums of places are made in Python's floats by `Scene` too
        radius = self.radii[kinds] * (0.94 + 0.12 * wide[:, 0])
        velocity = (self.speeds[kinds] * (0.9 + 0.2 * wide[:, 1]))[:, None] * self.directions[kinds]
        before, after = (self.extents[kinds] * radius[:, None] + 1.5).unflatten(1, (2, 2)).unbind(1)     # [B, 2] each
        travel = velocity * ((start + frames if total is None else total) - 1)
        low, high = before - travel.clamp_max(0), SIDE - after - travel.clamp_min(0)
        first = torch.where(high > low, low + wide[:, 2:4] * (high - low), (low + high) / 2)
        time = torch.arange(frames, device=radius.device) + (start[:, None] if isinstance(start, Tensor) else start)
        centres = (first[:, None] + velocity[:, None] * time[..., None]).float()                     # [B, F, 2]
        radius = radius.float()[:, None, None, None]
        x = (self.cells - centres[:, :, None, None, 0]) / radius                                     # [B, F, 1, 64]
        y = (self.cells[:, None] - centres[:, :, None, None, 1]) / radius
        shape, away = self.shapes[kinds][:, None, None, None], None
        for i, name in enumerate(EXTENTS):
            apart = distance(name, x, y)
            away = apart if away is None else torch.where(shape == i, apart, away)
        coverage = (0.5 - away * radius).clamp(0, 1)
        colors = ((self.shades[kinds] + (variation[:, 4:] - 0.5) * 16) / 255).clamp(0, 1)
        shape, background = colors[..., None, None, None].unflatten(1, (2, 3)).unbind(1)             # [B, 3, 1, 1, 1]
        return (background + (shape - background) * coverage[:, None]) * 2 - 1, coverage


def distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the edge of a shape of radius 1 around the origin, negative inside; y points down."""
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.89
    if shape == "cross":
        upright, level = (torch.maximum(x.abs() - a, y.abs() - b) for a, b in ((0.4, 1.2), (1.2, 0.4)))
        return torch.minimum(upright, level)
    side = math.sqrt(3) / 2                            # triangle: one point up, corners 1.35 from the centre
    return torch.maximum(y - 0.675, x.abs() * side - y / 2 - 0.675)


ATTRIBUTE_WORDS = {
    "circle": ("circle", "circle", "disc"), "square": ("square", "square", "box"), "triangle": ("triangle",),
    "cross": ("cross", "cross", "plus sign"),
    "gray": ("gray", "gray", "grey"), "purple": ("purple", "purple", "violet"), "cyan": ("cyan", "cyan", "turquoise"),
    "small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge"),
    "slow": ("slowly", "slowly", "at a slow pace", "unhurriedly"),
    "fast": ("quickly", "fast", "rapidly", "at high speed"),
    "left": ("left", "left", "to the left", "leftwards"), "right": ("right", "right", "to the right", "rightwards"),
    "up": ("up", "up", "upwards", "to the top"), "down": ("down", "down", "downwards", "to the bottom"),
}
VERBS = ("moves", "moves", "glides", "drifts", "slides", "travels", "goes")
CLIP_SENTENCES = (
    "a {size} {color} {shape} {verb} {direction} {speed} on a {background} background",
    "a {size} {color} {shape} {verb} {speed} {direction} on a {background} background",
    "on a {background} background a {size} {color} {shape} {verb} {direction} {speed}",
    "a {size} {color} {shape} {verb} {direction} {speed} over a {background} background",
    "{background} background, a {size} {color} {shape} that {verb} {direction} {speed}",
    "the {shape} is {color} and {size}, the background is {background}, and it {verb} {direction} {speed}",
    "a {size} {shape} in {color} {verb} {direction} {speed} in front of a {background} wall",
    "a video of a {size} {color} {shape}, it {verb} {direction} {speed}, the background is {background}",
)
IMAGE_SENTENCES = (
    "a picture of a {size} {color} {shape} on a {background} background",
    "a still image: a {size} {color} {shape}, {background} background",
    "a photo of a {size} {shape} in {color} in front of a {background} wall",
)


def sentence_about(scene: Scene, rng: random.Random, *, still: bool = False, complete: bool = True) -> str:
    """A sentence about the scene.  complete: every attribute is said; else size and speed may be left out."""
    words = {name: rng.choice(ATTRIBUTE_WORDS.get(value, (value,))) for name, value in scene.attributes.items()}
    if not complete:
        words |= {name: "" for name in ("size", "speed") if rng.random() < 0.2}
    sentence = rng.choice(IMAGE_SENTENCES if still else CLIP_SENTENCES).format(verb=rng.choice(VERBS), **words)
    sentence = " ".join(sentence.split()).replace(" ,", ",").replace(" and ,", ",")
    return sentence.removesuffix(".") + "." if rng.random() < 0.2 else sentence


def unseen(count: int, *, seed: int = 7) -> list[tuple[Scene, str]]:
    """Scenes and complete sentences from a seed not used in training; every second is a combination kept from it."""
    rng = random.Random(f"unseen {seed}")
    scenes = [Scene.draw(rng, held_out=i % 2 == 1) for i in range(count)]
    return [(scene, sentence_about(scene, rng)) for scene in scenes]
