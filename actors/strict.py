"""The actor that stands guard where nothing may be done instead of what was asked for."""

from dailies.actors.decoder import NO_SOUND
from dailies.actors.messages import Embedding, Frames, Latent


class NotAsAsked(ValueError):
    """Something was done instead of what the row asks for, and --strict forbids it."""

    about_row = True


class StrictMode:
    """Values in, the same values out.  Raises NotAsAsked for one that carries a fallback."""

    def __call__(self, batch: list[Embedding | Latent]) -> list[Embedding | Latent]:
        for value in batch:
            if value.fallbacks:
                raise NotAsAsked(f"--strict, and {'; '.join(value.fallbacks)}")
        return batch


class StrictSound:
    """Frames in, the same out.  Raises NotAsAsked for those without the sound that was sampled with them. Others of a
    decoder's fallbacks tell of a machine's memory, and change nothing that can be seen or heard.
    """

    def __call__(self, batch: list[Frames]) -> list[Frames]:
        for frames in batch:
            if NO_SOUND in frames.fallbacks:
                raise NotAsAsked(f"--strict, and {NO_SOUND}")
        return batch
