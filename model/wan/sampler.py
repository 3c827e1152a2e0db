"""Wan's way from noise to video: one transformer, or two experts that take turns; guided, or in a few steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dailies.model.family import Told
from dailies.model.guidance import classifier_free
from dailies.model.memory import free_memory
from dailies.model.offload import HostCopy, num_bytes
from dailies.model.samplers import Clips, Steps, Streams, Velocity, dpm_solver, rcm, unipc
from dailies.model.schedules import rcm_sigmas, rcm_timestep, wan_sigmas, whole_timestep
from dailies.model.wan.card import WanCard
from dailies.model.wan.transformer import Context, WanDiT

SOLVERS = {"unipc": unipc, "dpm++": dpm_solver}
SAMPLERS_SHARE = 0.75                                   # of a GPU's memory; the rest is for decoder and encoder
HOST_SHARE = 0.5                                        # of the free host memory, for experts that take turns


@dataclass(kw_only=True)
class Experts:
    """Transformers of one model of which one runs at a time.

    Where two do not fit on the GPU, they change places. Where the host has room for both they stay there too, and a
    turn copies one in and none back.
    """

    device: str
    dits: list[WanDiT] = field(default_factory=list)
    running: int = 0
    kept: list[HostCopy] = field(default_factory=list)
    move: bool = False

    @classmethod
    def load(cls, card: WanCard, device: str, load: Callable[[int], WanDiT]) -> "Experts":
        """load: of an expert's number, 0 the only one or that for high noise.  Raises CheckpointError."""
        made = cls(device=device, dits=[load(0)])
        for expert in range(1, card.num_experts):
            first = made.dits[0]
            if not made.fit(first, card):               # made where it will run: what is made depends on that
                if 2 * num_bytes(first) <= HOST_SHARE * free_memory():
                    made.kept.append(HostCopy(first))
                    made.kept[0].leave()
                else:
                    first.to("cpu")
                made.running, made.move = expert, True
            made.dits.append(load(expert))
        if made.kept:
            made.kept.append(HostCopy(made.dits[1]))
        return made

    def fit(self, dit: WanDiT, card: WanCard) -> bool:
        """Whether a second one leaves the memory that sampling takes."""
        if not self.device.startswith("cuda"):
            return True
        total = torch.cuda.get_device_properties(self.device).total_memory
        return SAMPLERS_SHARE * total > num_bytes(dit) + 1e9 * card.memory_gb.get("sample", 0)

    def turn(self, expert: int) -> WanDiT:
        """This expert on the device; if it waited elsewhere, the other waits there now."""
        if self.running != expert and self.kept:
            self.kept[self.running].leave()
            self.kept[expert].bring(self.device)
        elif self.running != expert:
            home = next(self.dits[expert].parameters()).device
            self.dits[self.running].to(home)
            self.dits[expert].to(self.device)
        self.running = expert
        return self.dits[expert]


class WanSampler:
    """The clips of a batch are computed one by one, so a batch changes no bit of them. What they share is the turn of
    an expert: experts change places once per batch.
    """

    def __init__(self, card: WanCard, experts: Experts):
        self.card, self.experts, self.device = card, experts, experts.device

    @property
    def transformers(self) -> list[WanDiT]:
        return self.experts.dits

    @property
    def weights_move(self) -> bool:
        return self.experts.move

    @property
    def solver(self) -> str:
        return self.card.solver

    def draws(self, num_steps: int) -> int:
        return num_steps if self.card.solver == "rcm" else 1

    def sample(self, batch: Sequence[Told], draw: Callable[[int], Clips], steps: Steps) -> Clips:
        request = batch[0].request
        if self.card.solver == "rcm":
            sigmas = rcm_sigmas(request.num_steps, self.card.sigma_max).tolist()
            return rcm(self.velocity(batch, None), draw(0), sigmas, draw, steps)
        sigmas = wan_sigmas(request.num_steps, self.card.shift_for(request.shape), self.card.solver).tolist()
        return SOLVERS[self.card.solver](self.velocity(batch, request.guidance), draw(0), sigmas, steps)

    def velocity(self, batch: Sequence[Told], scale: float | None) -> Velocity:
        """Of clips, whose keys and values of text and image are made once per clip and expert.

        scale: of guidance; None: it is distilled in.
        """
        conditions = [self.condition(told) for told in batch]
        contexts: dict[int, list[list[Context]]] = {}

        def velocity(clips: Clips, sigma: float) -> Clips:
            timestep = rcm_timestep(sigma) if scale is None else whole_timestep(sigma)
            expert = self.card.expert_at(1000 * sigma)
            dit = self.experts.turn(expert)
            if expert not in contexts:
                contexts.clear()                        # the other's turn is over
                contexts[expert] = [[self.context(dit, told, text) for text in self.texts(told, scale)]
                                    for told in batch]
            time = torch.full((1,), timestep, device=self.device)      # made there: a copy would wait for the GPU
            made = []
            for clip, texts, condition in zip(clips, contexts[expert], conditions, strict=True):
                predicted, *without = [dit(clip["video"][None], time, text, condition)[0] for text in texts]
                made.append({"video": predicted if scale is None else classifier_free(
                    predicted, without[0], scale * (1.0, self.card.low_noise_guidance)[expert])})
            return made
        return velocity

    def texts(self, told: Told, scale: float | None) -> tuple[Streams, ...]:
        return (told.prompt,) if scale is None else (told.prompt, told.negative)

    def context(self, dit: WanDiT, told: Told, text: Streams) -> Context:
        """Prompt and negative prompt see the same picture."""
        rows = [told.image[1].to(self.device)] if len(told.image) > 1 else None
        return dit.embed([text["video"].to(self.device)], rows)

    def condition(self, told: Told) -> Tensor | None:
        """[1, C, T, H, W]: the picture's mask and latent, which the model sees beside its own; or None, without one."""
        if bool(told.image) != self.card.takes_image:
            wanted = "an image" if self.card.takes_image else "text alone"
            raise ValueError(f"{self.card.name} makes video from {wanted}; "
                             f"clip {told.request.clip_id} comes {'with' if told.image else 'without'} one")
        return told.image[0][None].to(self.device) if told.image else None
