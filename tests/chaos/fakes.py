"""The model's actors with their networks taken out: quick, and what they make is decided by the request alone.

Everything else around them is what a real night has. They note what they begin and finish in one file of JSON lines,
appended by every process; what was sampled twice, and by how much, is counted there and not guessed (tally.py).
A prompt such as "segfault in sample 7" is poison: the actor that gets it does so.
"""

import ctypes
import hashlib
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dailies.actors.clip_writer import ClipWriter
from dailies.actors.decoder import Decoder
from dailies.actors.denoiser import Denoiser, noise
from dailies.actors.messages import Clip, Embedding, Frames, Latent, Request
from dailies.actors.text_encoder import TextEncoder
from dailies.model.card import ModelCard
from dailies.model.runtime import Runtime
from dailies.model.samplers import Clips, Steps, each
from dailies.model.wan.decoder import to_uint8
from dailies.pipeline.run.intermediates import Persisted
from dailies.pipeline.run.lease import process_start
from dailies.pipeline.run.saved_steps import PersistSampled
from tests.chaos.losses import find_no_memory, meets

PIECE_S = 0.02                          # sampling is so many sleeps, each noted when it begins
POISON = re.compile(r"(raise|hang|segfault|allocate|nan|black) in (sample|decode)\b")
ALLOCATED = 256 * 2**20                 # bytes that poison may take before it is killed


@dataclass(frozen=True, kw_only=True)
class Script:
    """How long the fakes take, and where they note it."""

    notes: str                          # file
    encode_s: float = 0.01              # of a prompt
    sample_s: float = 0.2               # of a clip, as the next two
    decode_s: float = 0.03
    ahead: int = 250                    # clips encoded ahead
    overlap: bool = False               # as on GPUs, though it is CPUs
    least_limit_s: float | None = None  # what a row may always take in a stage; None: as it ships
    fill: str | None = None             # clips, ledger or latents: the disk is full when the run comes to write there
    ballast: str | None = None          # the file that fills it
    lost: str | None = None             # folder that says what machines have lost (losses.py)

    @property
    def pieces(self) -> int:
        return round(self.sample_s / PIECE_S)

    def note(self, what: str, **said: str | int | None) -> None:
        entry = {"what": what, "pid": os.getpid(), "at": time.time(), **said}
        with open(self.notes, "ab", buffering=0) as file:       # one write to its end: lines of two processes never mix
            file.write(json.dumps(entry).encode() + b"\n")

    def note_process(self, stage: str) -> None:
        self.note("process", stage=stage, start=process_start(os.getpid()))


class FakeEncoder(TextEncoder):
    def __init__(self, *, script: Script, **model: object):
        self.script = script
        script.note_process("encode")

    def embed(self, request: Request) -> Embedding:
        self.script.note("encoding")
        time.sleep(self.script.encode_s)
        made = Embedding(request=request, prompt={"video": fingerprint(request.prompt)},
                         negative={"video": fingerprint(request.negative_prompt)})
        self.script.note("encoded")
        return made


class FakeSampler:
    """The latent is the noise that the clip starts from."""

    solver, weights_move = "fake", False
    transformers: Sequence[torch.nn.Module] = ()
    script: Script                      # its denoiser's

    def draws(self, num_steps: int) -> int:
        return 1

    def sample(self, batch: Sequence[Embedding], draw: Callable[[int], Clips], steps: Steps) -> Clips:
        made = draw(0)
        for embedding in batch:
            request = embedding.request
            if not torch.equal(embedding.prompt["video"], fingerprint(request.prompt)):
                raise AssertionError(f"clip {request.clip_id} got the embedding of another prompt")
            self.script.note("sampling", clip=request.clip_id)
            if meets(self.script.lost, "memory"):
                find_no_memory()
            poison = poison_of(request, "sample")
            for _ in range(self.script.pieces):
                self.script.note("piece", clip=request.clip_id)
                time.sleep(PIECE_S)
            if poison == "nan":
                made = each(lambda x: x * torch.nan, made)
            self.script.note("sampled", clip=request.clip_id)
        return made


class FakeFamily:
    def load_sampler(self, card: ModelCard, weights: Path, on: Runtime) -> FakeSampler:
        return FakeSampler()

    def fallbacks(self, card: ModelCard, weights: Path | None, on: Runtime) -> dict[str, tuple[str, ...]]:
        return {}


FAMILY = FakeFamily()


class FakeDenoiser(Denoiser):
    def __init__(self, *, card: ModelCard, script: Script, **model):
        script.note_process("sample")
        super().__init__(replace(card, family=f"{__name__}:FAMILY"), **model)
        self.sampler.script = script


class FakeDecoder(Decoder):
    """The latent's first cells, enlarged, move through the picture."""

    def __init__(self, *, card: ModelCard, script: Script, on: Runtime, **model):
        self.card, self.script, self.device = card, script, on.device
        script.note_process("publish")

    def decode(self, latent: Latent) -> Frames:
        request = latent.request
        self.script.note("decoding", clip=request.clip_id)
        poison = poison_of(request, "decode")
        if not torch.equal(latent.streams["video"], noise(request, self.card.stream_shapes(request.shape))["video"]):
            raise AssertionError(f"clip {request.clip_id} got the latent of another clip")
        time.sleep(self.script.decode_s)
        rgb = pictures(latent.streams["video"], request) * (poison != "black")
        self.script.note("decoded", clip=request.clip_id)
        return Frames(request=request, rgb=rgb, fallbacks=latent.fallbacks)


class NotedKeep(PersistSampled):
    """And a note of each latent that is safe: from there on nobody may sample it again."""

    def __init__(self, *, script: Script, **options):
        self.script = script
        super().__init__(**options)

    def keep(self, latent: Latent) -> Persisted:
        persisted = super().keep(latent)
        self.script.note("kept", clip=latent.request.clip_id)
        return persisted


class NotedWriter(ClipWriter):
    def __init__(self, *, script: Script, **options):
        self.script = script
        script.note_process("publish")                  # the decoder's, or one beside it
        super().__init__(**options)

    def publish(self, frames: Frames) -> Clip:
        self.script.note("writing", clip=frames.request.clip_id)
        meets(self.script.lost, "disk")
        clip = super().publish(frames)
        self.script.note("written", clip=frames.request.clip_id)
        return clip


def fingerprint(text: str) -> Tensor:
    """[1, 32] of bytes, for a prompt's embedding."""
    return torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)[None].float()


def pictures(latent: Tensor, request: Request) -> Tensor:
    """uint8 [frames, height, width, 3], smooth and in motion."""
    shape = request.shape
    colours = interpolate(latent[:3, 0][None], (shape.height, shape.width), mode="bilinear")[0]
    picture = to_uint8(colours / 3).permute(1, 2, 0)
    return torch.stack([picture.roll(frame, 1) for frame in range(shape.frames)])


def poison_of(request: Request, place: str) -> str | None:
    """The kind, if it is for this place; most kinds do not come back from here."""
    found = POISON.match(request.prompt)
    if not found or found[2] != place:
        return None
    match found[1]:
        case "raise":
            raise RuntimeError("this row is poison")
        case "hang":
            time.sleep(3600)
        case "segfault":
            ctypes.string_at(0)
        case "allocate":
            allocate()
    return found[1]


def allocate() -> None:
    """Take memory until there is no more, and die as at the hands of the system's OOM killer; the machine is spared."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ALLOCATED, resource.RLIM_INFINITY))
    blocks = []
    try:
        while True:
            blocks.append(bytearray(2**24))
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)
