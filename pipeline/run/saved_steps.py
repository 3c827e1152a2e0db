"""The steps of a long clip, saved while it is sampled: whatever ends the process costs seconds of work, not the clip.

`PersistSampled` is the `Persist` of a sampler. What a sampler carries from one step to the next is one object per clip,
steps/ab/<clip_id>.safetensors, written over and over and removed when the latent lies there. Who samples the
clip next, on whatever machine and in whatever batch, goes on from there, and the latent is the same to the last bit.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dailies.actors.denoiser import Denoiser
from dailies.actors.device_lock import Halted
from dailies.actors.messages import Embedding, Failure, Latent, Request
from dailies.model.samplers import State, Steps, Streams
from dailies.pipeline.run.intermediates import (
    Damaged,
    Fits,
    MakesStep,
    ObjectStore,
    Persist,
    Persisted,
    Seal,
    anything,
    key_of_request,
    read_object,
    sealed,
    unsealed,
)
from dailies.pipeline.run.layout import LATENTS, SAVED_STEPS

SCHEDULE = "course"                                     # as the objects have called it from the beginning
SAVE_SHARE = 0.01                                       # of the work may be saving it
SAVE_AFTER_S = 30.0                                     # less is not worth it: a process takes as long to start


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Where a clip stands."""

    step: int                                           # steps done
    state: tuple[Streams, ...]                          # what the sampler carries, of this clip; on the CPU
    determinism: str                                    # the class of who made the steps until here


class PersistSampled(Persist):
    """A sampler whose latents stay in the run folder, and whose steps do until then.

    A save is due after SAVE_AFTER_S of work, or as much as makes the last save's seconds SAVE_SHARE of it, whichever is
    more. Where clips of a bucket take less than that in all, nothing is saved and nothing is looked for. At 720p and 5
    s a state is 77 MB with Wan 14B (UniPC: four latents) and 57 MB with Linum (a latent and APG's average); saved to a
    folder of a busy machine with two cores that took 1.1 s and 0.44 s (medians of 7; at best 0.55 s and 0.41 s), so a
    clip that is killed there loses at most 110 s or 44 s of sampling.
    """

    step: Denoiser

    def __init__(self, step: MakesStep, store: ObjectStore, *, seal: Seal = Seal(), fits: Fits = anything):
        """step: makes a Denoiser."""
        super().__init__(step, store, LATENTS, seal=seal, fits=fits)
        self.save_s = 0.0                               # what the last save took
        self.clip_s: dict[str, float] = {}            # by bucket, what a clip took lately from noise to latent

    def work(self, batch: list[Embedding]) -> list[Persisted | Failure]:
        """Clips that stand at the same step go on together. Raises Halted."""
        saved = [self.saved(embedding.request) for embedding in batch]
        self.partly = self.partly or any(saved)
        groups: dict[int, list[int]] = defaultdict(list)
        for place, found in enumerate(saved):
            groups[found.step if found else 0].append(place)
        results: list = [None] * len(batch)
        for _, places in sorted(groups.items(), reverse=True):          # what is nearly done first
            made = self.sample([batch[place] for place in places], [saved[place] for place in places])
            for place, value in zip(places, made, strict=True):
                results[place] = value
        return results

    def sample(self, batch: list[Embedding], saved: list[Saved | None]) -> list[Persisted | Failure]:
        request, began, waited_s = batch[0].request, time.monotonic(), self.lock.waited_s
        steps = SavedSteps(self, [embedding.request for embedding in batch], saved)
        try:
            latents = self.step(batch, steps)
            worked_s = time.monotonic() - began - (self.lock.waited_s - waited_s)
            step_s = worked_s / (self.steps_of(request) - steps.begun)
            self.clip_s[request.bucket] = self.steps_of(request) * step_s
            made: list[Persisted | Failure] = [self.keep(continued(latent, found))
                                               for latent, found in zip(latents, saved, strict=True)]
        except ArithmeticError:                         # what was saved may be where it went wrong
            self.forget(steps)
            raise
        except (ValueError, IndexError, TypeError):     # no state of this sampler's, though the seal is right
            if not steps.begun:
                raise
            self.forget(steps)
            for embedding in batch:
                self.note(embedding.request, "sampled from its start: the steps that were saved did not fit")
            return self.sample(batch, [None] * len(batch))
        self.forget(steps)
        return made

    def steps_of(self, request: Request) -> int:
        """All of them, of a second stage too."""
        return request.num_steps + self.step.further_steps

    def forget(self, steps: "SavedSteps") -> None:
        for request in steps.in_store:
            self.store.delete(key_of_request(SAVED_STEPS, request))

    def saved(self, request: Request) -> Saved | None:
        """Where the clip stands; None: at the start. What is of no use is removed."""
        if self.clip_s.get(request.bucket, math.inf) < SAVE_AFTER_S:
            return None
        key = key_of_request(SAVED_STEPS, request)
        try:
            with read_object(self.store, key, request, self.fits) as data:
                found = self.opened(request, *unsealed(data, key, self.seal))
        except KeyError:
            return None
        except Damaged as error:
            self.note(request, f"sampled from its start: {error}")
            self.store.delete(key)
            return None
        self.note(request, f"went on after step {found.step} of {self.steps_of(request)}")
        return found

    def opened(self, request: Request, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Saved:
        """Raises Damaged for what belongs to another schedule, and for what no sampler of this one carries."""
        step, num_steps, state = metadata.get("step", ""), self.steps_of(request), state_in(tensors)
        if metadata.get(SCHEDULE) != self.step.schedule(request):
            raise Damaged("the steps that were saved are of another schedule")
        if not (step.isascii() and step.isdecimal() and len(step) < 10 and 0 < int(step) < num_steps):
            raise Damaged(f"the steps that were saved end at {step[:20]!r}, of {num_steps}")
        if not state or not all(stream.is_floating_point() and stream.isfinite().all() for stream in tensors.values()):
            raise Damaged("the steps that were saved are no numbers")
        return Saved(step=int(step), state=state, determinism=metadata.get("determinism", "not known"))

    def save(self, request: Request, step: int, state: Sequence[Streams], before: Saved | None) -> None:
        """before: where the clip stood when it was begun here."""
        key = key_of_request(SAVED_STEPS, request)
        tensors = {f"{place}.{name}": stream.cpu() for place, streams in enumerate(state)
                   for name, stream in streams.items()}
        determinism = after(before, self.step.determinism)
        self.store.put(key, sealed(tensors, {"key": key, SCHEDULE: self.step.schedule(request), "step": str(step),
                                            "determinism": determinism}, self.seal))


class SavedSteps(Steps):
    """One run of the sampler, over clips that stand at the same step."""

    def __init__(self, keeper: PersistSampled, requests: list[Request], saved: list[Saved | None]):
        self.keeper, self.requests, self.saved = keeper, requests, saved
        self.begun = saved[0].step if saved[0] else 0
        self.in_store = requests if self.begun else []
        self.since = time.monotonic()                   # of the last save

    def begin(self, start: State) -> tuple[int, State]:
        if self.keeper.halted():
            raise Halted("stopped before another step was begun")
        self.since = time.monotonic()                   # until now it has waited for the clip before
        if not self.begun:
            return 0, start
        device = next(iter(start[0][0].values())).device
        found_all = [found for found in self.saved if found]            # each of them, as it stands at a step
        for clip, found in zip(start[0], found_all, strict=True):
            for streams in found.state:                 # APG remembers averages of the video alone
                if not streams.items() or not all(name in clip and same(stream, clip[name])
                                                  for name, stream in streams.items()):
                    raise Damaged("the steps that were saved are of other streams, or of another shape")
        return self.begun, tuple([{name: stream.to(device) for name, stream in streams.items()} for streams in slot]
                                 for slot in zip(*(found.state for found in found_all), strict=True))

    def done(self, step: int, state: State) -> None:
        num_steps = self.keeper.steps_of(self.requests[0])
        if step == num_steps:
            return                                      # the latent itself is next
        if self.keeper.halted():
            self.save(step, state)
            raise Halted(f"stopped after step {step} of {num_steps}, which is saved")
        if time.monotonic() - self.since >= max(SAVE_AFTER_S, self.keeper.save_s / SAVE_SHARE):
            with suppress(Exception):                   # the store's trouble: it may be over when the latent is made
                self.save(step, state)
        if self.keeper.lock.is_wanted():
            self.give_way(state)

    def give_way(self, state: State) -> None:
        """To a decoder on the same GPU."""
        wait_for_device(state)
        began = time.monotonic()
        self.keeper.lock.give_way()
        self.since += time.monotonic() - began

    def save(self, step: int, state: State) -> None:
        wait_for_device(state)                          # what the GPU has still to do is no cost of saving
        began = time.monotonic()
        try:
            self.in_store = self.requests
            for place, request in enumerate(self.requests):
                self.keeper.save(request, step, [clips[place] for clips in state], self.saved[place])
        finally:
            self.since = time.monotonic()
            self.keeper.save_s = self.since - began


def after(before: Saved | None, now: str) -> str:
    """The class of steps of which `now` made those after `before`."""
    if before is None or before.determinism == now or before.determinism.endswith(f" then {now}"):
        return now if before is None else before.determinism
    return f"{before.determinism} then {now}"


def continued(latent: Latent, before: Saved | None) -> Latent:
    """The latent, which says of its class who made the first steps."""
    if before is None or not latent.determinism:
        return latent
    return replace(latent, determinism=(*latent.determinism[:-1], after(before, latent.determinism[-1])))


def wait_for_device(state: State) -> None:
    stream = next(iter(state[0][0].values()))
    if stream.is_cuda:
        torch.cuda.synchronize(stream.device)


def same(stream: Tensor, like: Tensor) -> bool:
    return stream.shape == like.shape and stream.dtype == like.dtype


def state_in(tensors: dict[str, Tensor]) -> tuple[Streams, ...]:
    """What the sampler carried, by "place.name"; of version 0.1 by the place alone, of the video.  Raises Damaged."""
    slots: dict[int, Streams] = defaultdict(dict)
    for key, stream in tensors.items():
        place, _, name = key.partition(".")
        if not (place.isascii() and place.isdecimal() and len(place) < 3):
            raise Damaged(f"the steps that were saved have a part {key[:20]!r}")
        slots[int(place)][name or "video"] = stream
    if sorted(slots) != list(range(len(slots))):
        raise Damaged("the steps that were saved are not whole")
    return tuple(slots[place] for place in range(len(slots)))
