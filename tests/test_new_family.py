"""A family of models is a module of its own and a card that names it: one of two streams, video and audio, is added
here in a package that is not ours, and its clips are rendered, with their sound, by what renders all others."""

import io
import sys
from dataclasses import replace
from importlib import import_module
from itertools import count

import av
import numpy as np
import pytest
import torch

from dailies.actors.decoder import NO_SOUND
from dailies.actors.device_lock import Halted
from dailies.jobs.convert import convert
from dailies.model import checkpoint
from dailies.model.catalog import CATALOG
from dailies.model.family import family_of
from dailies.model.weights import fingerprint, weights_files
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.plan import Plan
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import EMBEDDINGS, LATENTS, SAVED_STEPS
from dailies.pipeline.run.run import Run
from dailies.pipeline.stages import Worker, run_local
from dailies.pipeline.store import open_store
from dailies.pipeline.text_to_video import text_to_video

CARD = '''
from dataclasses import dataclass

from dailies.model.card import Layout, ModelCard


@dataclass(frozen=True, kw_only=True)
class DuetCard(ModelCard):
    family: str = "of_a_stranger.duet:DUET"
    mute: bool = False

    @property
    def layouts(self):
        return Layout(dits=("dit.safetensors",), vae="vae.safetensors", text_encoder="text.safetensors", tokenizer=None,
                      audio_vae="audio.safetensors"),

    @property
    def width(self):
        return 16

    @property
    def text_widths(self):
        return {"video": 8, "audio": 6}

    def stream_shapes(self, shape):
        return {"video": self.grid.of(shape), "audio": (2, shape.frames, 4)}


CARD = DuetCard(name="duet", description="sings while it moves", resolutions={"32p": (32, 48)}, resolution="32p",
                min_side=16, max_pixels=64 * 64, frame_step=24, duration_s=1.0, num_steps=5, guidance=2.0,
                audio_rate=24_000, precisions=("fp32",), attentions=("dense",))
'''

FAMILY = '''
import torch
from torch import nn
from torch.nn import functional as F

from dailies.model import checkpoint
from dailies.model.family import Decoded, ModelPart
from dailies.model.guidance import classifier_free
from dailies.model.keys import KeyTable
from dailies.model.samplers import each, euler
from dailies.model.schedules import flow_match_sigmas


class Texts(nn.Module):
    """A row for each byte of a text, one for each stream."""
    max_tokens = 40

    def __init__(self):
        super().__init__()
        self.video, self.audio = nn.Embedding(256, 8), nn.Embedding(256, 6)

    @torch.inference_mode()
    def encode(self, text):
        read = torch.tensor(list(text.encode()[:self.max_tokens]), dtype=torch.long)
        return {"video": self.video(read), "audio": self.audio(read)}

    def cut(self, text):
        return max(0, len(text.encode()) - self.max_tokens)


class DiT(nn.Module):
    """Each stream sees itself, the other and its text."""

    def __init__(self):
        super().__init__()
        self.video, self.audio = nn.Linear(16, 16), nn.Linear(8, 8)
        self.heard, self.seen = nn.Linear(8, 16), nn.Linear(16, 8)
        self.told, self.sung = nn.Linear(8, 16), nn.Linear(6, 8)

    def forward(self, video, audio, sigma, text):
        pixels, notes = video.movedim(0, -1), audio.permute(1, 0, 2).flatten(1)
        told, sung = self.told(text["video"].sum(0)), self.sung(text["audio"].sum(0))
        moves = torch.tanh(self.video(pixels) + self.heard(notes.mean(0)) + told) + sigma * pixels
        sings = torch.tanh(self.audio(notes) + self.seen(pixels.mean((0, 1, 2))) + sung) + sigma * notes
        return {"video": moves.movedim(-1, 0), "audio": sings.unflatten(1, (2, 4)).permute(1, 0, 2)}


class Sampler:
    solver, weights_move = "euler", False

    def __init__(self, dit):
        self.transformers = [dit]

    def draws(self, num_steps):
        return 1

    def sample(self, batch, draw, steps):
        def velocity(clips, sigma):
            with_it, without = ([dit(clip["video"], clip["audio"], sigma, getattr(told, text))
                                 for clip, told in zip(clips, batch)] for text in ("prompt", "negative"))
            return each(lambda cond, uncond: classifier_free(cond, uncond, request.guidance), with_it, without)
        (dit,), request = self.transformers, batch[0].request
        return euler(velocity, draw(0), flow_match_sigmas(request.num_steps).tolist(), steps)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.colour = nn.Linear(16, 3)


class Loudness(nn.Module):
    def __init__(self):
        super().__init__()
        self.loud = nn.Linear(4, 1)


class Decoder:
    def __init__(self, pictures, loudness, mute):
        self.pictures, self.loudness, self.mute = pictures, loudness, mute

    def __call__(self, streams, shape, memory):
        colours = self.pictures.colour(streams["video"].movedim(0, -1)).movedim(-1, 0)[None]
        rgb = F.interpolate(colours, (shape.frames, shape.height, shape.width), mode="trilinear")[0].sigmoid()
        rgb = (255 * rgb).to(torch.uint8).permute(1, 2, 3, 0).contiguous()
        if self.mute:
            return Decoded(rgb=rgb)
        loud = self.loudness.loud(streams["audio"]).sigmoid()[..., 0].repeat_interleave(1000, 1)     # 24 kHz at 24 fps
        pitch = 2 * torch.pi * torch.arange(loud.shape[1]) / 24_000 * torch.tensor([[440.0], [660.0]])
        return Decoded(rgb=rgb, audio=(0.5 * loud * torch.sin(pitch)).T)


PARTS = {"dit": DiT, "vae": Pictures, "text_encoder": Texts, "audio_vae": Loudness}


class Family:
    def parts(self, card):
        return tuple(self.part(card, kind, target) for kind, _, target in card.layouts[0].placed())

    def part(self, card, kind, target):
        table = KeyTable(name=kind, rules={f"{kind}.": ""})

        def build(path, device):
            return checkpoint.build(PARTS[kind], path, table, name=card.name, device=device, precision="fp32")
        return ModelPart(kind=kind, tables=(table,), new=PARTS[kind],
                         load=lambda weights, on: build(weights / target, on.device),
                         check=lambda path, config: build(path, "meta"))

    def load(self, card, weights, on, kind):
        return next(part for part in self.parts(card) if part.kind == kind).load(weights, on)

    def load_encoder(self, card, weights, on):
        return self.load(card, weights, on, "text_encoder")

    def load_sampler(self, card, weights, on):
        return Sampler(self.load(card, weights, on, "dit"))

    def load_decoder(self, card, weights, on):
        return Decoder(self.load(card, weights, on, "vae"), self.load(card, weights, on, "audio_vae"), card.mute)

    def stored_precision(self, card, weights):
        return None

    def fallbacks(self, card, weights, on):
        return {}


DUET = Family()
'''


@pytest.fixture
def duet(tmp_path, monkeypatch):
    """The card, in the catalogue; its weights lie in its folder."""
    package = tmp_path / "of_a_stranger"
    package.mkdir()
    for name, text in (("__init__", ""), ("card", CARD), ("duet", FAMILY)):
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    card = replace(import_module("of_a_stranger.card").CARD, folder=tmp_path / "weights")
    monkeypatch.setitem(CATALOG, card.name, card)
    torch.manual_seed(3)
    for part, (_, _, target) in zip(family_of(card).parts(card), card.layouts[0].placed(), strict=True):
        checkpoint.save(card.folder / target, checkpoint.released_state(part.new(), part.tables[0]))
    yield card
    for name in [name for name in sys.modules if name.partition(".")[0] == "of_a_stranger"]:
        sys.modules.pop(name)


def plan_of(card):
    return Plan.make(Manifest.read((), prompts=("a bell that swings", "a door that creaks")), card, precision="fp32",
                     weights_fingerprint=fingerprint(weights_files(card, card.folder)))


def stages_of(card, store):
    return text_to_video(card, None, store, card.runtime(), keep_latents=True)


def rendered(card, store):
    """The ledger's rows, and what was noted of each clip."""
    run, notes = Run.of(store, plan_of(card)), {}
    run.begin()
    with run.open(keep_latents=True) as bookkeeper:
        for requests, _ in bookkeeper.rounds():
            for outcome in run_local(stages_of(card, store), requests):
                bookkeeper.record(outcome)
                notes[outcome.value.request.clip_id] = outcome.notes
    return ledger.read(store).to_pylist(), notes


def latents_in(store):
    return {info.key: store.get(info.key) for info in store.list(f"{LATENTS}/")}


def sound_of(data):
    """rate, [channels, samples]"""
    with av.open(io.BytesIO(data)) as container:
        return container.streams.audio[0].rate, np.concatenate([frame.to_ndarray()
                                                                for frame in container.decode(audio=0)], axis=1)


def test_its_clips_are_rendered_with_their_sound(duet, tmp_path):
    store = open_store(str(tmp_path / "out"))
    rows, _ = rendered(duet, store)
    assert [(row["status"], row["has_audio"], row["fallbacks"]) for row in rows] == 2 * [("done", True, [])]
    assert len({row["sha256"] for row in rows}) == 2 and all(row["quality.audio_peak"] > 0.01 for row in rows)
    for row in rows:
        rate, sound = sound_of(store.get(row["path"]))
        assert rate == duet.audio_rate and abs(sound.shape[1] / rate - row["duration_s"]) < 0.1
        for channel, pitch in zip(sound[:, :24_000], (440, 660), strict=True):         # heard as it was made
            assert np.abs(np.fft.rfft(channel)).argmax() == pitch


def test_a_clip_that_is_halted_between_two_steps_goes_on_to_the_same_bytes_of_both_streams(duet, tmp_path):
    straight, halted = (open_store(str(tmp_path / name)) for name in ("straight", "halted"))
    want, _ = rendered(duet, straight)
    first, asked = next(iter(plan_of(duet).requests())), count()
    encode, sample, _ = stages_of(duet, halted)
    values, _ = Worker("encode", encode.steps, 1)([first])
    with pytest.raises(Halted, match="stopped after step 2 of 5"):
        Worker("sample", sample.steps, 1, halted=lambda: next(asked) == 2)(values)
    (saved,) = halted.list(f"{SAVED_STEPS}/")
    tensors, _ = checkpoint.unpack(halted.get(saved.key))
    assert set(tensors) == {"0.video", "0.audio"}
    got, notes = rendered(duet, halted)
    assert "went on after step 2 of 5" in notes[first.clip_id] and not list(halted.list(f"{SAVED_STEPS}/"))
    assert latents_in(halted) == latents_in(straight) and len(latents_in(halted)) == 2
    streams, _ = checkpoint.unpack(next(iter(latents_in(halted).values())))
    assert {name: list(stream.shape) for name, stream in streams.items()} == {
        "stream.video": [16, 7, 4, 6], "stream.audio": [2, 25, 4]}
    assert [row["sha256"] for row in got] == [row["sha256"] for row in want]
    assert not list(halted.list(f"{EMBEDDINGS}/")), "cleared up, as of every run"


def test_sound_that_is_not_decoded_is_told_of(duet, tmp_path):
    rows, _ = rendered(replace(duet, mute=True), open_store(str(tmp_path / "out")))
    assert [(row["status"], row["has_audio"], row["fallbacks"]) for row in rows] == 2 * [("done", False, [NO_SOUND])]


def test_sound_of_another_rate_than_its_card_says_costs_the_clip_and_is_not_published(duet, tmp_path):
    rows, _ = rendered(replace(duet, audio_rate=48_000), open_store(str(tmp_path / "out")))
    told = "sound must be [samples, 2] and last as long as the pictures"
    assert all(row["status"] == "failed" and told in row["error"] for row in rows)


def test_its_weights_are_converted_and_checked_by_its_own_list_of_parts(duet, tmp_path):
    assert convert(str(duet.folder), duet.name, str(tmp_path / "converted"), json=True) == 0
    written = open_store(str(tmp_path / "converted"))
    assert {info.key for info in written.list()} == set(duet.layouts[0].parts)
    for part, (_, _, target) in zip(family_of(duet).parts(duet), duet.layouts[0].placed(), strict=True):
        part.check(tmp_path / "converted" / target, None)
