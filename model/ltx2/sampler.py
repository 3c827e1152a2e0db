"""LTX-2's way from noise to a clip: two streams under guidances of their own, in one stage or in two."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dailies.model.family import Asked, Told
from dailies.model.ltx2.adaln import Levels
from dailies.model.ltx2.card import LtxCard
from dailies.model.ltx2.guidance import COND, ISOLATED, NEUTRAL, PERTURBED, UNCONDITIONAL, StreamGuide
from dailies.model.ltx2.refine import LaterSteps
from dailies.model.ltx2.rope import audio_positions, video_positions
from dailies.model.ltx2.samplers import ancestral, res_2s
from dailies.model.ltx2.schedule import DISTILLED, REFINING, ltx2_sigmas
from dailies.model.ltx2.transformer import LtxTransformer, Modality, Ropes, TextKeys
from dailies.model.samplers import STRAIGHT, Clips, Steps, Streams, each, euler

Guides = dict[str, StreamGuide]                         # by stream
_VIDEO, _AUDIO = "video", "audio"


@dataclass(frozen=True, kw_only=True)
class Place:
    """What of one clip stays the same from step to step, at one size."""

    grid: tuple[int, int, int]                          # of the video latent
    positions: dict[str, Tensor]
    ropes: tuple[Ropes, Ropes | None]
    first: Tensor | None                                # [C, 1, H, W] normalised, of the image that it begins with
    keyframes: Tensor | None                            # [1, N], 1 for tokens of the first latent step (2.5)
    contexts: dict[tuple[int, str], Tensor | TextKeys] = field(default_factory=dict)     # by text and stream, once read


@dataclass(frozen=True, kw_only=True)
class Refiner:
    """What a second stage takes beside the transformer."""

    enlarged: Callable[[Tensor], Tensor]                # normalised latents [C, T, H, W]: of twice the sides
    refining: Callable[[], AbstractContextManager[None]]    # meanwhile the transformer is that of the second stage


class LtxSampler:
    """The clips of a batch are computed one by one, so a batch changes no bit of them."""

    weights_move = True                                 # nothing is recorded: its forward is given more than tensors

    def __init__(self, card: LtxCard, dit: LtxTransformer, device: str, refiner: Refiner | None = None):
        self.card, self.dit, self.device, self.refiner = card, dit, device, refiner

    @property
    def transformers(self) -> list[LtxTransformer]:
        return [self.dit]

    @property
    def solver(self) -> str:
        return self.card.solver + (", then refined" if self.refiner else "")

    def draws(self, num_steps: int) -> int:
        """For the start, for each step that puts noise back, and for the start of the second stage."""
        return {"euler": 1, "ancestral": num_steps, "res_2s": 2 * num_steps + 1}[self.card.solver] + bool(self.refiner)

    def sample(self, batch: Sequence[Told], draw: Callable[[int], Clips], steps: Steps) -> Clips:
        return (self.in_one_stage if self.refiner is None else self.in_two_stages)(batch, draw(0), draw, steps)

    def in_one_stage(self, batch: Sequence[Told], start: Clips, draw: Callable[[int], Clips], steps: Steps) -> Clips:
        request = batch[0].request
        return self.walk(batch, start, self.firsts(batch), self.sigmas(request),
                         self.guides(request, _AUDIO in start[0]), self.card.solver, draw, steps)

    def in_two_stages(self, batch: Sequence[Told], start: Clips, draw: Callable[[int], Clips], steps: Steps) -> Clips:
        """At half the size, then at the clip's own. The sound is the first stage's, but of a distilled model."""
        assert self.refiner is not None
        request, has_first_sound = batch[0].request, not self.card.distilled and _AUDIO in start[0]
        fresh = draw(self.draws(request.num_steps) - 1)
        second = LaterSteps(steps, request.num_steps)
        if second.is_under_way:
            start = fresh                               # of its shapes alone; what was saved takes its place
        else:
            clips = self.made_small(batch, start, draw, steps)
            large = [{**clip, _VIDEO: self.refiner.enlarged(clip[_VIDEO])} for clip in clips]
            start = each(lambda x, noise: x + REFINING[0] * (noise - x), large, fresh)
            if has_first_sound:
                second.beside = [{_AUDIO: clip[_AUDIO]} for clip in clips],
        with self.refiner.refining():
            made = self.walk(batch, start, self.firsts(batch), REFINING, {}, "euler", draw, second)
        if not has_first_sound:
            return made
        sound, = second.beside
        return [{**clip, **heard} for clip, heard in zip(made, sound, strict=True)]

    def made_small(self, batch: Sequence[Told], start: Clips, draw: Callable[[int], Clips], steps: Steps) -> Clips:
        """The first stage: of independent numbers a part is as independent, so it starts at a corner of the clip's own
        noise."""
        request = batch[0].request
        small = [{**clip, _VIDEO: corner_of(clip[_VIDEO])} for clip in start]
        firsts = [small_image(told, clip) for told, clip in zip(batch, small, strict=True)]
        return self.walk(batch, small, firsts, self.sigmas(request), self.guides(request, _AUDIO in start[0]),
                         self.card.solver, draw, steps)

    def firsts(self, batch: Sequence[Told]) -> list[Tensor | None]:
        return [told.image[0].to(self.device) if told.image else None for told in batch]

    def sigmas(self, request: Asked) -> list[float]:
        return list(DISTILLED) if self.card.distilled else ltx2_sigmas(request.num_steps).tolist()

    def guides(self, request: Asked, with_sound: bool) -> Guides:
        """Of a stream alone the other is not missed."""
        if self.card.distilled:
            return {_VIDEO: NEUTRAL, _AUDIO: NEUTRAL}
        said = request.settings
        return {stream: StreamGuide(text=float(text), perturbed=float(said["stg"]), blocks=self.card.stg_blocks,
                                    isolated=float(said["modality_guidance"]) if with_sound else 1.0,
                                    rescale=self.card.rescale)
                for stream, text in ((_VIDEO, request.guidance), (_AUDIO, said["audio_guidance"]))}

    def walk(self, batch: Sequence[Told], start: Clips, firsts: Sequence[Tensor | None], sigmas: Sequence[float],
             guides: Guides, solver: str, draw: Callable[[int], Clips], steps: Steps = STRAIGHT) -> Clips:
        """start: as noisy as sigmas[0] says.  firsts: as Place.first."""
        places = [self.place(clip, first) for clip, first in zip(start, firsts, strict=True)]

        def keep(clips: Clips) -> Clips:
            return [begun_with(clip, place.first) for clip, place in zip(clips, places, strict=True)]

        def denoise(clips: Clips, sigma: float) -> Clips:
            return keep([self.clean(told, clip, sigma, place, guides)
                         for told, clip, place in zip(batch, clips, places, strict=True)])

        def velocity(clips: Clips, sigma: float) -> Clips:
            return each(lambda x, x0: (x - x0) / sigma, clips, denoise(clips, sigma))
        if solver == "euler":
            return euler(velocity, keep(start), sigmas, steps)
        return {"ancestral": ancestral, "res_2s": res_2s}[solver](denoise, keep(start), sigmas, draw, keep, steps)

    def clean(self, told: Told, clip: Streams, sigma: float, place: Place, guides: Guides) -> Streams:
        """The clip without noise, guided, fp32 or as the clip is."""
        guides = {stream: guides.get(stream, NEUTRAL) for stream in clip}
        wanted = frozenset().union(*(guide.wants for guide in guides.values()))
        predicted = {COND: self.predicted(told.prompt, clip, sigma, place)}
        if UNCONDITIONAL in wanted:
            predicted[UNCONDITIONAL] = self.predicted(told.negative, clip, sigma, place)
        if PERTURBED in wanted:                         # of the stream alone whose guide asks for it
            skip = {f"skip_{stream}": guide.blocks for stream, guide in guides.items() if PERTURBED in guide.wants}
            predicted[PERTURBED] = self.predicted(told.prompt, clip, sigma, place, **skip)
        if ISOLATED in wanted:
            predicted[ISOLATED] = self.predicted(told.prompt, clip, sigma, place, isolated=True)
        return {stream: guide({name: made[stream] for name, made in predicted.items()})
                for stream, guide in guides.items()}

    def predicted(self, text: Streams, clip: Streams, sigma: float, place: Place, **how: object) -> Streams:
        """The clip without noise by one evaluation, not guided."""
        at = torch.full((1,), sigma, device=self.device)
        times = {stream: Levels(at[:, None]) for stream in clip}
        if place.first is not None:                     # its tokens are clean: two levels, and which each token has
            cells = place.grid[1] * place.grid[2]
            index = torch.arange(place.grid[0] * cells, device=self.device)[None] >= cells
            times[_VIDEO] = Levels(torch.cat((torch.zeros_like(at), at))[None], index.long())
        given = {stream: Modality(as_tokens(x).float(), times[stream], at, place.positions[stream],
                                  self.context(text, stream, place),
                                  keyframes=place.keyframes if stream == _VIDEO else None)
                 for stream, x in clip.items()}
        # by name: a clip that was saved may have its streams in another order
        velocities = dict(zip((_VIDEO, _AUDIO), self.dit(given[_VIDEO], given.get(_AUDIO), ropes=place.ropes, **how),
                              strict=True))
        made = {stream: x - sigma * as_latent(velocities[stream], x) for stream, x in clip.items()}
        if place.first is not None:                     # at time 0 what is predicted is what is there
            made[_VIDEO] = torch.cat((clip[_VIDEO][:, :1], made[_VIDEO][:, 1:]), dim=1)
        return made

    def context(self, text: Streams, stream: str, place: Place) -> Tensor | TextKeys:
        """What a stream attends to, read once for all steps of a stage; a second stage has other weights."""
        key = id(text), stream                          # of the prompt or the negative one, which outlive the stage
        if key not in place.contexts:
            place.contexts[key] = self.dit.read(text[stream].to(self.device)[None], audio=stream == _AUDIO)
        return place.contexts[key]

    def place(self, clip: Streams, first: Tensor | None) -> Place:
        grid = tuple(clip[_VIDEO].shape[1:])
        positions = {_VIDEO: video_positions(grid, self.card.fps).to(self.device)}
        if _AUDIO in clip:
            positions[_AUDIO] = audio_positions(clip[_AUDIO].shape[1]).to(self.device)
        ropes, keyframes = self.dit.ropes(positions[_VIDEO], positions.get(_AUDIO)), None
        if self.dit.config.keyframes:
            keyframes = torch.zeros(grid, device=self.device)
            keyframes[0] = 1
            keyframes = keyframes.flatten()[None]
        return Place(grid=grid, positions=positions, ropes=ropes, first=first, keyframes=keyframes)


def as_tokens(x: Tensor) -> Tensor:
    """Tokens [1, N, C] of a latent: video [C, T, H, W] in the order T, H, W; audio [C, A, M], C * M numbers each."""
    return x.flatten(1).T[None] if x.dim() == 4 else x.permute(1, 0, 2).flatten(1)[None]


def as_latent(tokens: Tensor, like: Tensor) -> Tensor:
    """The latent whose tokens these are, shaped like `like`."""
    if like.dim() == 4:
        return tokens[0].T.unflatten(1, like.shape[1:])
    return tokens[0].unflatten(1, (like.shape[0], like.shape[2])).permute(1, 0, 2)


def begun_with(clip: Streams, first: Tensor | None) -> Streams:
    """The clip with the latent of its image as its first step."""
    if first is None:
        return clip
    return {**clip, _VIDEO: torch.cat((first.to(clip[_VIDEO].dtype), clip[_VIDEO][:, 1:]), dim=1)}


def corner_of(video: Tensor) -> Tensor:
    """The corner of a latent [C, T, H, W] that has half of its sides."""
    return video[:, :, :video.shape[2] // 2, :video.shape[3] // 2].contiguous()


def small_image(told: Told, clip: Streams) -> Tensor | None:
    """The image's latent at the first stage's size, which comes as a matrix [C, H * W]."""
    if not told.image:
        return None
    return told.image[1].to(clip[_VIDEO].device).unflatten(1, clip[_VIDEO].shape[2:])[:, None]
