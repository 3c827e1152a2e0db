"""Intermediates: what one stage made lies in the run folder until the next has used it, and only its name travels.

A finished latent then survives whatever dies, and a run that is continued finds it: `Persist` around a step looks
before it works, `Restore` opens what was kept, `Discard` forgets a latent whose clip is published. Without them whole
values travel.

Whoever can write the run folder can put anything there. Each object is sealed with the run's key (seal.py), says which
key of the store it belongs to, and must fit its request; another is removed and made again.
"""

import hmac
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dailies.actors.actor import Actor, as_actor
from dailies.actors.device_lock import DeviceLock
from dailies.actors.messages import Clip, Embedding, Failure, Latent, Request
from dailies.model.checkpoint import pack, unpack
from dailies.model.samplers import Streams
from dailies.pipeline.run.large_objects import object_bytes
from dailies.pipeline.run.layout import EMBEDDINGS, LATENTS, intermediate_key
from dailies.pipeline.store import TooLarge

CONNECTIONS = 16                                        # at a time, where many objects are removed
MAX_INTERMEDIATE_BYTES = 2**31                          # of an object, where nobody knows what it should be
MOST_SAVED_LATENTS = 8                                  # that a sampler carries: twice UniPC's
MOST_HEADER_BYTES = 2**20
MOST_NOTES = 100                                        # fallbacks that an object may name
NO_SEAL = "0" * 64                                      # in an object's place for its seal while it is sealed
SEAL = re.compile(rb'"seal":"([0-9a-f]{64})"')          # quotes in other texts of the header are escaped


class ObjectStore(Protocol):
    """What is needed of a store, as pipeline/store/base.py promises it.  `get` of what is absent raises KeyError."""

    def get(self, key: str, *, at_most: int | None = None) -> bytes: ...
    def put(self, key: str, data: bytes) -> None: ...
    def delete(self, key: str) -> None: ...


class MakesStep(Protocol):
    """A description of an actor that can travel: dailies.pipeline.stages.Step."""

    def make(self) -> Callable[[list], list]: ...


class Damaged(ValueError):
    """What lies in the run folder is not what was put there."""


class Seal:
    """A key, and what it makes of bytes: nobody without it can make an object that is taken for one of this run."""

    def __init__(self, key: bytes = b""):
        """key: empty where values only have to be kept whole."""
        self.key = key

    def __repr__(self) -> str:                          # an error may quote what it was given
        return "Seal(...)"

    def of(self, *pieces: bytes | memoryview) -> bytes:
        made = hmac.new(self.key, digestmod="sha256")
        for piece in pieces:
            made.update(piece)
        return made.hexdigest().encode()


class Fits(Protocol):
    """Whether a value is what its request asks for (actors/fitting.py): None, or what is wrong with it."""

    def __call__(self, value: Embedding | Latent) -> str | None: ...
    def embedding_bytes(self, request: Request) -> int: ...
    def latent_bytes(self, request: Request) -> int: ...


UNKEYED = Seal()                        # frozen: one does for all calls


class Anything:
    """What fits where nobody knows the model."""

    def __call__(self, value: Embedding | Latent) -> str | None:
        return None

    def embedding_bytes(self, request: Request) -> int:
        return MAX_INTERMEDIATE_BYTES

    latent_bytes = embedding_bytes


anything = Anything()


@dataclass(frozen=True, kw_only=True)
class Persisted:
    """A value that waits in the run folder."""

    request: Request
    key: str


class Persist(Actor):
    """A step whose results stay in the run folder: its values in, a Persisted for each out. Works for what is missing.

    Threads may call it side by side: while one computes, another looks for the next value or saves the last one. It
    returns when its results are saved.
    """

    def __init__(self, step: MakesStep, store: ObjectStore, folder: str, *, seal: Seal = UNKEYED,
                 fits: Fits = anything):
        """folder: EMBEDDINGS for a step that makes them, LATENTS for one that makes those."""
        self.step, self.store, self.folder, self.seal, self.fits = as_actor(step.make()), store, folder, seal, fits
        self.mine = threading.local()                   # of each thread that calls

    def __call__(self, batch: list) -> list[Persisted | Failure]:
        self.mine.notes = []
        results: list[Any] = [value if isinstance(value, Failure) else self.find(_request_of(value)) for value in batch]
        missing = [place for place, found in enumerate(results) if found is None]
        self.partly = any(isinstance(found, Persisted) for found in results)
        if missing:
            for place, value in zip(missing, self.work([batch[place] for place in missing]), strict=True):
                results[place] = value
        return results

    def work(self, batch: list) -> list[Persisted | Failure]:
        return [value if isinstance(value, Failure) else self.keep(value) for value in self.step(batch)]

    def find(self, request: Request) -> Persisted | None:
        """Reads the whole object: the next stage could not make a damaged one again."""
        persisted = Persisted(request=request, key=key_of_request(self.folder, request))
        try:
            restored(self.store, persisted, self.seal, self.fits)
        except KeyError:
            return None
        except Damaged as error:
            self.note(request, f"made again, not taken from the run folder: {error}")
            return None
        if self.folder == LATENTS:
            self.note(request, "its latent was found in the run folder")
        return persisted

    def keep(self, value: Embedding | Latent) -> Persisted:
        persisted = Persisted(request=value.request, key=key_of_request(self.folder, value.request))
        self.store.put(persisted.key, packed(value, persisted.key, self.seal))
        return persisted

    def note(self, request: Request, text: str) -> None:
        self.mine.notes.append((request.clip_id, text))

    @property
    def notes(self) -> Sequence[tuple[str, str]]:  # type: ignore[override]  # each thread has its own
        """Of this thread's last batch: clip_id, and what is to be told of what was found of it."""
        return getattr(self.mine, "notes", [])

    @property
    def partly(self) -> bool:
        """Whether something of this thread's last batch had been done before."""
        return getattr(self.mine, "partly", False)

    @partly.setter
    def partly(self, partly: bool) -> None:
        self.mine.partly = partly

    # the rest is the step's own, which takes the lock while it computes

    @property
    def lock(self) -> DeviceLock:
        return self.step.lock

    @lock.setter
    def lock(self, lock: DeviceLock) -> None:
        self.step.lock = lock

    @property
    def safe(self) -> bool:
        return self.step.safe

    @safe.setter
    def safe(self, safe: bool) -> None:
        self.step.safe = safe

    @property
    def device(self) -> str:  # type: ignore[override]  # the step's own
        return self.step.device

    @property
    def takes_turns(self) -> bool:  # type: ignore[override]  # the step's own
        return self.step.takes_turns


class Restore:
    """Persisted in, what was kept out, on the CPU; any other value passes untouched."""

    def __init__(self, store: ObjectStore, *, seal: Seal = UNKEYED, fits: Fits = anything):
        self.store, self.seal, self.fits = store, seal, fits

    def __call__(self, batch: list) -> list:
        return [self.fetch(value) if isinstance(value, Persisted) else value for value in batch]

    def fetch(self, persisted: Persisted) -> Embedding | Latent:
        """Raises the store's KeyError for what is gone. What is damaged is removed first, so that it is made again."""
        for _ in range(3):                              # somebody may be making it again at this moment
            try:
                return restored(self.store, persisted, self.seal, self.fits)
            except Damaged as error:
                damage = error
                self.store.delete(persisted.key)
        raise damage


class Discard:
    """Clips pass; the latents that those of the call before were made from are removed.

    One call late: where this process is killed before its answer is heard, the clip is asked for again, and without its
    latent it would be sampled again.
    """

    def __init__(self, store: ObjectStore):
        self.store = store
        self.published: list[Request] = []              # in the last call

    def __call__(self, batch: list[Clip | Failure]) -> list[Clip | Failure]:
        for request in self.published:
            self.store.delete(key_of_request(LATENTS, request))
        self.published = [value.request for value in batch if isinstance(value, Clip)]
        return batch


def clear(store: ObjectStore, keys: Iterable[str]) -> None:
    """Remove many objects: what is left of a folder when all its clips are published."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(store.delete, keys):
            pass


def key_of_request(folder: str, request: Request) -> str:
    """Where a request's embedding, latent or steps lie."""
    return intermediate_key(folder, request.embedding_key if folder == EMBEDDINGS else request.clip_id)


def _request_of(value: Request | Persisted | Embedding) -> Request:
    return value if isinstance(value, Request) else value.request


def packed(value: Embedding | Latent, key: str, seal: Seal) -> bytes:
    """A safetensors file that names the key of the store it belongs to, and is sealed."""
    if isinstance(value, Embedding):
        parts: dict[str, Mapping[Any, Tensor]] = {"prompt": value.prompt, "negative": value.negative,
                                                  "image": dict(enumerate(value.image))}
    else:
        parts = {"stream": value.streams}
    tensors = {f"{part}.{name}": tensor.detach().cpu()
               for part, named in parts.items() for name, tensor in named.items()}
    return sealed(tensors, {"key": key, "kind": type(value).__name__, "fallbacks": json.dumps(value.fallbacks),
                            "determinism": json.dumps(value.determinism)}, seal)


def restored(store: ObjectStore, persisted: Persisted, seal: Seal, fits: Fits) -> Embedding | Latent:
    """What `packed` was given, as an answer to the request of `persisted`.  Raises Damaged; KeyError if it is gone."""
    with read_object(store, persisted.key, persisted.request, fits) as data:
        return value_in(*unsealed(data, persisted.key, seal), persisted, fits)


def value_in(tensors: dict[str, Tensor], metadata: dict[str, str], persisted: Persisted,
             fits: Fits) -> Embedding | Latent:
    """Raises Damaged."""
    kind = "Embedding" if persisted.key.startswith(f"{EMBEDDINGS}/") else "Latent"
    names = ("prompt", "negative", "image") if kind == "Embedding" else ("stream",)
    parts = {name: streams_in(name, tensors) for name in names}
    if metadata.get("kind") != kind or sum(map(len, parts.values())) != len(tensors):
        raise Damaged(f"{persisted.key} holds no {kind}")
    told: dict[str, Any] = {name: texts_in(metadata.get(name, ""), persisted.key)
                            for name in ("fallbacks", "determinism")}
    if kind == "Embedding":
        image = tuple(tensors[f"image.{place}"] for place in range(len(parts["image"])))
        value: Embedding | Latent = Embedding(request=persisted.request, prompt=parts["prompt"],
                                                  negative=parts["negative"], image=image, **told)
    else:
        value = Latent(request=persisted.request, streams=parts["stream"], **told)
    if wrong := fits(value):
        raise Damaged(f"{persisted.key} is not what was asked for: {wrong}")
    return value


@contextmanager
def read_object(store: ObjectStore, key: str, request: Request, fits: Fits) -> Iterator[bytes]:
    """Held until the block ends (large_objects.py).  Raises KeyError, and Damaged for more than there can be."""
    try:
        with object_bytes(store, key, most_object_bytes(key, request, fits)) as data:
            yield data
    except TooLarge as error:
        raise Damaged(f"{key} is too large: {error}") from error


def most_object_bytes(key: str, request: Request, fits: Fits) -> int:
    """More than an object has that is what its request asks for."""
    if key.startswith(f"{EMBEDDINGS}/"):
        return MOST_HEADER_BYTES + fits.embedding_bytes(request)
    return MOST_HEADER_BYTES + fits.latent_bytes(request) * (1 if key.startswith(f"{LATENTS}/") else MOST_SAVED_LATENTS)


def texts_in(said: str, key: str) -> tuple[str, ...]:
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or len(found) > MOST_NOTES or not all(isinstance(text, str) for text in found):
        raise Damaged(f"{key} holds no list of texts")
    return tuple(found)


def sealed(tensors: dict[str, Tensor], metadata: dict[str, str], seal: Seal = UNKEYED) -> bytes:
    """metadata: "key" in it says where the bytes are to lie."""
    data = pack(tensors, metadata | {"seal": NO_SEAL})
    return data.replace(f'"seal":"{NO_SEAL}"'.encode(), b'"seal":"' + seal.of(data) + b'"', 1)


def unsealed(data: bytes, key: str, seal: Seal = UNKEYED) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `sealed` was given, if it was for this key, with this seal.  Raises Damaged."""
    header_bytes = min(int.from_bytes(data[:8], "little"), MOST_HEADER_BYTES)
    found = SEAL.search(data, 8, 8 + header_bytes)      # before anything else of it is believed
    view = memoryview(data)
    if not found or not hmac.compare_digest(
            seal.of(view[:found.start(1)], NO_SEAL.encode(), view[found.end(1):]), found.group(1)):
        raise Damaged(f"{key} is damaged, or was not put there by this run")
    try:
        tensors, metadata = unpack(data)
    except Exception as error:                          # sealed, and yet malformed: whoever did it has the key
        raise Damaged(f"{key}: {error}") from error
    metadata.pop("seal", None)
    if metadata.get("key") != key or not all(isinstance(text, str) for text in metadata.values()):
        raise Damaged(f"{key} holds what belongs to another name")
    return tensors, metadata


def streams_in(part: str, tensors: dict[str, Tensor]) -> Streams:
    """By name. Where streams had numbers (until version 0.1), 0 was the video."""
    found = {key.removeprefix(f"{part}."): tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
    return {"video": found["0"]} if list(found) == ["0"] else found
