"""The shelf: what one stage made lies in the run folder until the next has used it, and only its name travels.

A finished latent then survives whatever dies, and a run that is continued finds it: `Keep` around a step looks before
it works, `Fetch` opens what was kept, `Drop` forgets a latent whose clip is published. Without them whole values
travel.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, uint8

from actors.device_lock import NO_LOCK, DeviceLock
from actors.messages import Clip, Embedding, Failure, Latent, Request
from model.checkpoint import pack, unpack
from model.weights import CheckpointError

EMBEDDINGS, LATENTS = "embeddings", "latents"           # folders of the run
CONNECTIONS = 16                                        # at a time, where many objects are removed
MADE_HERE = re.compile(r"(embeddings|latents|steps)/([0-9a-f]{2})/\2[0-9a-f]{62}\.safetensors")


class Shelf(Protocol):
    """What is needed of a store; pipeline/store.py says what each promises. `get` of what is absent: a KeyError."""

    def get(self, key: str) -> bytes: ...
    def put(self, key: str, data: bytes) -> None: ...
    def delete(self, key: str) -> None: ...


class MakesStep(Protocol):
    """A description of an actor that can travel: pipeline.stages.Step."""

    def make(self) -> Callable[[list], list]: ...


class Damaged(ValueError):
    """What lies on the shelf is not what was put there."""


@dataclass(frozen=True, kw_only=True)
class Shelved:
    """A value that waits on the shelf."""

    request: Request
    key: str


class Keep:
    """A step whose results stay on the shelf: its values in, a Shelved for each out. Works only for what is missing.

    Threads may call it side by side: while one computes, another looks for the next value or saves the last one. It
    returns when its results are saved.
    """

    def __init__(self, step: MakesStep, store: Shelf, folder: str):
        """folder: EMBEDDINGS for a step that makes them, LATENTS for one that makes those."""
        self.step, self.store, self.folder = step.make(), store, folder
        self.mine = threading.local()                   # of each thread that calls

    def __call__(self, batch: list) -> list[Shelved | Failure]:
        results = [value if isinstance(value, Failure) else self.find(request_of(value)) for value in batch]
        missing = [place for place, found in enumerate(results) if found is None]
        self.partly = any(isinstance(found, Shelved) for found in results)
        if missing:
            for place, value in zip(missing, self.work([batch[place] for place in missing]), strict=True):
                results[place] = value
        return results

    def work(self, batch: list) -> list[Shelved | Failure]:
        return [value if isinstance(value, Failure) else self.keep(value) for value in self.step(batch)]

    def find(self, request: Request) -> Shelved | None:
        """Reads the whole object: the next stage could not make a damaged one again."""
        shelved = Shelved(request=request, key=shelf_key(self.folder, request))
        try:
            opened(self.store.get(shelved.key), shelved)
        except (KeyError, Damaged):
            return None
        return shelved

    def keep(self, value: Embedding | Latent) -> Shelved:
        shelved = Shelved(request=value.request, key=shelf_key(self.folder, value.request))
        self.store.put(shelved.key, packed(value, shelved.key))
        return shelved

    @property
    def partly(self) -> bool:
        """Whether something of this thread's last batch had been done before."""
        return getattr(self.mine, "partly", False)

    @partly.setter
    def partly(self, partly: bool) -> None:
        self.mine.partly = partly

    @property
    def lock(self) -> DeviceLock:
        """Of the step inside, which takes it while it computes."""
        return getattr(self.step, "lock", NO_LOCK)

    @lock.setter
    def lock(self, lock: DeviceLock) -> None:
        if hasattr(self.step, "lock"):
            self.step.lock = lock

    @property
    def safe(self) -> bool:
        """Of the step inside, if it knows of such a profile."""
        return getattr(self.step, "safe", False)

    @safe.setter
    def safe(self, safe: bool) -> None:
        if hasattr(self.step, "safe"):
            self.step.safe = safe

    @property
    def device(self) -> str | None:
        """Of the step inside."""
        return getattr(self.step, "device", None)

    @property
    def takes_turns(self) -> bool:
        """Whether the step inside has its device to itself while it computes."""
        return getattr(self.step, "takes_turns", True)


class Fetch:
    """Shelved in, what was kept out, on the CPU; any other value passes untouched."""

    def __init__(self, store: Shelf):
        self.store = store

    def __call__(self, batch: list) -> list:
        return [self.fetch(value) if isinstance(value, Shelved) else value for value in batch]

    def fetch(self, shelved: Shelved) -> Embedding | Latent:
        """Raises the store's KeyError for what is gone. What is damaged is removed first, so that it is made again."""
        for _ in range(3):                              # somebody may be making it again at this moment
            try:
                return opened(self.store.get(shelved.key), shelved)
            except Damaged as error:
                damage = error
                self.store.delete(shelved.key)
        raise damage


class Drop:
    """Clips pass; the latents that those of the call before were made from are removed.

    One call late: where this process is killed before its answer is heard, the clip is asked for again, and without its
    latent it would be sampled again.
    """

    def __init__(self, store: Shelf):
        self.store = store
        self.published: list[Request] = []              # in the last call

    def __call__(self, batch: list[Clip | Failure]) -> list[Clip | Failure]:
        for request in self.published:
            self.store.delete(shelf_key(LATENTS, request))
        self.published = [value.request for value in batch if isinstance(value, Clip)]
        return batch


def clear(store: Shelf, keys: Iterable[str]) -> None:
    """Remove many objects: what is left of a folder when all its clips are published."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for _ in pool.map(store.delete, keys):
            pass


def is_ours(key: str) -> bool:
    """Whether `shelf_key` could have made it. Whatever else lies in a folder of the shelf is not ours to remove."""
    return MADE_HERE.fullmatch(key) is not None


def shelf_key(folder: str, request: Request) -> str:
    """Where a request's embedding or latent lies; the two characters spread a listing over many prefixes."""
    name = request.embedding_key if folder == EMBEDDINGS else request.clip_id
    return f"{folder}/{name[:2]}/{name}.safetensors"


def request_of(value: Request | Shelved | Embedding) -> Request:
    return value if isinstance(value, Request) else value.request


def packed(value: Embedding | Latent, key: str) -> bytes:
    """A safetensors file that names the key it belongs to and holds a hash of all its content."""
    if isinstance(value, Embedding):
        tensors = numbered("prompt", value.prompt) | numbered("negative", value.negative)
        tensors |= numbered("image", value.image)
    else:
        tensors = numbered("stream", value.streams)
    return sealed(tensors, {"key": key, "kind": type(value).__name__, "fallbacks": json.dumps(value.fallbacks),
                            "determinism": json.dumps(value.determinism)})


def opened(data: bytes, shelved: Shelved) -> Embedding | Latent:
    """What `packed` was given, as an answer to the request of `shelved`.  Raises Damaged."""
    tensors, metadata = unsealed(data, shelved.key)
    # of a run that an older version began nobody knows the class
    said = dict(fallbacks=tuple(json.loads(metadata["fallbacks"])),
                determinism=tuple(json.loads(metadata.get("determinism", "[]"))))
    if metadata["kind"] == "Embedding":
        return Embedding(request=shelved.request, prompt=counted("prompt", tensors),
                         negative=counted("negative", tensors), image=counted("image", tensors), **said)
    return Latent(request=shelved.request, streams=counted("stream", tensors), **said)


def sealed(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """metadata: "key" in it says where the bytes are to lie."""
    return pack(tensors, metadata | {"sha256": content_hash(tensors, metadata)})


def unsealed(data: bytes, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `sealed` was given, if it was for this key.  Raises Damaged."""
    try:
        tensors, metadata = unpack(data)
    except CheckpointError as error:
        raise Damaged(f"{key}: {error}") from error
    said = metadata.pop("sha256", None)
    if said != content_hash(tensors, metadata) or metadata.get("key") != key:
        raise Damaged(f"{key} does not hold what was put there")
    return tensors, metadata


def numbered(name: str, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"{name}.{place}": tensor.detach().cpu() for place, tensor in enumerate(tensors)}


def counted(name: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensors[f"{name}.{place}"] for place in range(sum(key.startswith(f"{name}.") for key in tensors)))


def content_hash(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(uint8).numpy())
    return digest.hexdigest()
