"""The actor that turns embeddings into latents with a Wan model: one transformer, or two experts that take turns."""

from pathlib import Path

import torch
from torch import Tensor

from dailies.actors.denoiser import Denoiser
from dailies.actors.memory import free_memory
from dailies.actors.messages import Embedding
from dailies.model.guidance import classifier_free
from dailies.model.offload import HostCopy, num_bytes
from dailies.model.samplers import Clips, Steps, Streams, Velocity, dpm_solver, unipc
from dailies.model.schedules import wan_sigmas, whole_timestep
from dailies.model.wan.transformer import Context, WanDiT

SOLVERS = {"unipc": unipc, "dpm++": dpm_solver}
SAMPLERS_SHARE = 0.75                                   # of a GPU's memory; the rest is for decoder and encoder
HOST_SHARE = 0.5                                        # of the free host memory, for experts that take turns


class WanDenoiser(Denoiser):
    """Embeddings in, Latents out. The clips of a batch are computed one by one, so a batch changes no bit of them.

    What they share is the turn of an expert: where two do not fit on the GPU, they change places once per batch. Where
    the host has room for both they stay there too, and a turn copies one in and none back.
    """

    def load(self, weights: Path) -> None:
        first = self.card.dit(weights, self.device, self.precision, self.attention)
        self.experts, self.running, self.kept = [first], 0, []
        for expert in range(1, self.card.num_experts):
            if not self.fits_twice(first):              # made where it will run: what is made depends on that
                if 2 * num_bytes(first) <= HOST_SHARE * free_memory():
                    self.kept.append(HostCopy(first))
                    self.kept[0].leave()
                else:
                    first.to("cpu")
                self.running, self.weights_move = expert, True
            self.experts.append(self.card.dit(weights, self.device, self.precision, self.attention, expert=expert))
        if self.kept:
            self.kept.append(HostCopy(self.experts[1]))

    @property
    def transformers(self) -> list[WanDiT]:
        return self.experts

    def fits_twice(self, dit: WanDiT) -> bool:
        """Whether a second one leaves the room that sampling takes."""
        if not self.device.startswith("cuda"):
            return True
        total = torch.cuda.get_device_properties(self.device).total_memory
        return SAMPLERS_SHARE * total > num_bytes(dit) + 1e9 * self.card.memory_gb.get("sample", 0)

    @property
    def solver(self) -> str:
        return self.card.solver

    def sample(self, batch: list[Embedding], start: Clips, steps: Steps) -> Clips:
        request = batch[0].request
        sigmas = wan_sigmas(request.num_steps, self.card.shift_for(request.shape), self.card.solver).tolist()
        return SOLVERS[self.card.solver](self.velocity(batch, request.guidance), start, sigmas, steps)

    def velocity(self, batch: list[Embedding], scale: float) -> Velocity:
        """The guided velocity of clips. Keys and values of text and image are made once per clip and expert."""
        conditions = [self.condition(embedding) for embedding in batch]
        contexts: dict[int, list[tuple[Context, Context]]] = {}

        def velocity(clips: Clips, sigma: float) -> Clips:
            timestep = whole_timestep(sigma)
            expert = self.card.expert_at(timestep)
            dit = self.turn(expert)
            if expert not in contexts:
                contexts.clear()                        # the other's turn is over
                contexts[expert] = [self.contexts(dit, embedding) for embedding in batch]
            guidance = scale * (1.0, self.card.low_noise_guidance)[expert]
            time = torch.full((1,), timestep, device=self.device)      # made there: a copy would wait for the GPU
            made = []
            for clip, texts, condition in zip(clips, contexts[expert], conditions, strict=True):
                video = clip["video"][None]
                cond, uncond = (dit(video, time, text, condition)[0] for text in texts)
                made.append({"video": classifier_free(cond, uncond, guidance)})
            return made
        return velocity

    def turn(self, expert: int) -> WanDiT:
        """This expert on the device; if it waited elsewhere, the other waits there now."""
        if self.running != expert and self.kept:
            self.kept[self.running].leave()
            self.kept[expert].bring(self.device)
        elif self.running != expert:
            home = next(self.experts[expert].parameters()).device
            self.experts[self.running].to(home)
            self.experts[expert].to(self.device)
        self.running = expert
        return self.experts[expert]

    def contexts(self, dit: WanDiT, embedding: Embedding) -> tuple[Context, Context]:
        """Of the prompt and of the negative prompt; both see the same picture."""
        return self.context(dit, embedding, embedding.prompt), self.context(dit, embedding, embedding.negative)

    def context(self, dit: WanDiT, embedding: Embedding, text: Streams) -> Context:
        rows = [embedding.image[1].to(self.device)] if len(embedding.image) > 1 else None
        return dit.embed([text["video"].to(self.device)], rows)

    def condition(self, embedding: Embedding) -> Tensor | None:
        """[1, C, T, H, W]: the picture's mask and latent, which the model sees beside its own; or None, without one."""
        if bool(embedding.image) != self.card.takes_image:
            wanted = "an image" if self.card.takes_image else "text alone"
            raise ValueError(f"{self.card.name} makes video from {wanted}; "
                             f"clip {embedding.request.clip_id} comes {'with' if embedding.image else 'without'} one")
        return embedding.image[0][None].to(self.device) if embedding.image else None
