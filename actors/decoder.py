"""The actor that turns latents into frames."""

from pathlib import Path

import torch

from dailies.actors.actor import Actor
from dailies.actors.determinism import class_on
from dailies.actors.messages import Frames, Latent
from dailies.model.card import ModelCard
from dailies.model.family import family_of
from dailies.model.memory import memory_on
from dailies.model.runtime import Runtime

SAFE_SHARE = 4              # a clip that has failed twice is decoded in a quarter of the memory
NO_SOUND = "without sound: its decoder made none of the audio that was sampled"


class Decoder(Actor):
    """Latents in, Frames out; what decodes a clip's streams, on one device."""

    def __init__(self, card: ModelCard, weights: Path, on: Runtime | None = None):
        """on: by default the model's own on a CPU.  Raises CheckpointError."""
        on = on or card.runtime()
        torch.set_num_threads(on.threads)
        self.device, self.determinism = on.device, class_on(on.device, threads=on.threads)
        family = family_of(card)
        self.fallbacks = tuple(family.fallbacks(card, weights, on).get("decode", ()))
        self.streams = family.load_decoder(card, weights, on)

    @torch.inference_mode()
    def __call__(self, batch: list[Latent]) -> list[Frames]:
        """Raises ArithmeticError for NaN or infinity, OutOfMemoryError where a GPU has no memory for the least."""
        with self.lock:
            return [self.decode(latent) for latent in batch]

    def decode(self, latent: Latent) -> Frames:
        memory = memory_on(self.device) // (SAFE_SHARE if self.safe else 1)
        made = self.streams(latent.streams, latent.request.shape, memory)
        asked = latent.request.settings.get("audio")    # of models with sound a row may say that it wants none
        silent = (NO_SOUND,) if "audio" in latent.streams and made.audio is None and asked is not False else ()
        return Frames(request=latent.request, rgb=made.rgb, audio=None if asked is False else made.audio,
                      fallbacks=latent.fallbacks + self.fallbacks + made.notes + silent,
                      determinism=(*latent.determinism, self.determinism))
