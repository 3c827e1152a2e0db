"""Text, or text and an image, to video: which actors, in what order, and what one replica of each needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from dailies.actors.clip_writer import ClipWriter
from dailies.actors.decoder import Decoder
from dailies.actors.denoiser import Denoiser
from dailies.actors.fitting import Fitting
from dailies.actors.gate import Gate
from dailies.actors.image_encoder import ImageTextEncoder
from dailies.actors.strict import StrictMode, StrictSound
from dailies.actors.text_encoder import TextEncoder
from dailies.model.card import ModelCard
from dailies.model.runtime import Runtime
from dailies.model.weights import locate
from dailies.pipeline.manifest.images import read_image
from dailies.pipeline.run.intermediates import Discard, Persist, Restore, Seal
from dailies.pipeline.run.layout import EMBEDDINGS, clip_key, poster_key
from dailies.pipeline.run.saved_steps import PersistSampled
from dailies.pipeline.stages import Stage, Step
from dailies.pipeline.store import Store
from dailies.pipeline.store.fetch import bring

ENCODED_AHEAD = 1000                    # clips whose prompts are encoded before the encoder makes room for a sampler


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What goes on side by side around one device."""

    calls: int                          # in an encoder or sampler: one computes; others fetch, draw noise, save
    writers: int                        # processes beside a decoder that look at frames, encode them and publish


# A GPU must never wait for a CPU: 3 calls cover a sampler's fetch before and its save behind; 2 writers make a clip in
# half of its 1.9 CPU seconds (480p, 81 frames), where sampling and decoding it take the GPU longer. On a CPU all of it
# wants the same cores, and one after the other is as quick.
OVERLAP = {"cuda": Overlap(calls=3, writers=2), "cpu": Overlap(calls=1, writers=0)}


def text_to_video(card: ModelCard, weights: str | Path | None, store: Store, on: Runtime, *, batch: int = 1,
                  samplers: int | None = None, keep_latents: bool = False, strict: bool = False, seal: Seal = Seal(),
                  spoilt: Mapping[str, str] = {}) -> list[Stage]:
    """weights: as `locate` takes them; each machine finds or fetches its own.  on: its threads are a sampler's, and
    fixed, because the last bits of a latent may depend on them.  keep_latents: leave them in the run folder after
    publishing.  strict: a clip that was not made as its row asks fails before the next stage.  seal: of what waits in
    the run folder.  spoilt: clip_id -> SHA-256 of a file under its name that is not that clip, and is replaced.
    """
    alone = replace(on, threads=1)

    def model(actor: Callable[..., Any], on: Runtime = alone, name: str | None = None,
              **options: Any) -> Step:
        return Step(actor=with_weights, name=name, args=dict(actor=actor, card=card, weights=weights, on=on, **options))

    on_gpu = on.device.startswith("cuda")
    overlap = OVERLAP["cuda" if on_gpu else "cpu"]
    encoder = model(ImageTextEncoder, read=read_image) if card.takes_image else model(TextEncoder)
    kept = dict(store=store, seal=seal, fits=Fitting(card))
    fetch = (Step(actor=Restore, args=kept), *([Step(actor=StrictMode)] if strict else []))
    encode = Step(actor=Persist, args=dict(step=encoder, folder=EMBEDDINGS, **kept))
    sampler = model(Denoiser, on)
    sample = Step(actor=PersistSampled, args=dict(step=sampler, **kept))
    decode = model(Decoder, name="decode")
    write = [*([Step(actor=StrictSound)] if strict else []), Step(actor=Gate),
             Step(actor=ClipWriter, args=dict(store=store, key_of=clip_key, spoilt=spoilt,
                                              audio_rate=card.audio_rate, poster_key_of=poster_key))]
    if not keep_latents:
        write.append(Step(actor=Discard, args=dict(store=store)))
    return [
        Stage(name="encode", steps=(encode,), gpus=card.encoder_share if on_gpu else 0.0, concurrency=overlap.calls,
              key=attrgetter("embedding_key"), window=ENCODED_AHEAD),
        Stage(name="sample", steps=(*fetch, sample), gpus=0.75 if on_gpu else 0.0, concurrency=overlap.calls,
              cpus=float(on.threads), replicas=samplers, batch=max(batch, card.clips_per_turn)),
        # Frames never travel: who writes them is on the decoder's machine. Beside the sampler, not in its process: a
        # clip that kills the decoder costs no sampling, and DeviceLock gives each the GPU while the other has no use
        # for it. On a CPU it needs a fraction of what sampling needs.
        Stage(name="publish", steps=(*fetch, decode), then=tuple(write),
              processes=overlap.writers, concurrency=overlap.writers + 2 if overlap.writers else 1,
              gpus=0.25 if on_gpu else 0.0, cpus=2.0 if on_gpu else 0.5),
    ]


def with_weights(actor: Callable[..., Any], card: ModelCard, weights: str | Path | None, **options: Any) -> Any:
    """The actor, with the weights where this machine has them."""
    return actor(card=card, weights=locate(weights, card, fetch=bring), **options)
