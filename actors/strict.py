"""The actor that stands guard where nothing may be done instead of what was asked for."""

from dailies.actors.messages import Embedding, Latent


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
