"""A long clip's steps are saved: stopped anywhere and continued, it is the same clip, and no step is done twice."""

import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch
from golden import E2E, E2E_CARD
from turbo_tiny import TURBO_TINY, TURBO_TINY_I2V, new_tensors
from wan_tiny import WAN_TINY, WAN_TINY_A14B, WAN_TINY_I2V_A14B, write_weights

from dailies.actors.actor import Actor
from dailies.actors.denoiser import Denoiser
from dailies.actors.messages import Embedding, Latent, Request
from dailies.model import checkpoint
from dailies.model.family import NonFiniteLatent
from dailies.model.samplers import euler, unipc
from dailies.model.shapes import VideoShape
from dailies.pipeline.run import saved_steps as steps
from dailies.pipeline.run.intermediates import Persisted, Restore, key_of_request, sealed, unsealed
from dailies.pipeline.run.layout import LATENTS, SAVED_STEPS
from dailies.pipeline.run.saved_steps import Halted, PersistSampled
from dailies.pipeline.store import StoreError, open_store

NUM_STEPS = 5
SHAPE = VideoShape(frames=9, height=32, width=48)
LINUM = {"apg": E2E_CARD, "apg-in-pairs": replace(E2E_CARD, pair_guidance=True), "cfg": replace(E2E_CARD, guider="cfg")}
WAN = {"unipc": WAN_TINY, "dpm++": replace(WAN_TINY, solver="dpm++"), "two-experts": WAN_TINY_A14B,
       "image": WAN_TINY_I2V_A14B}
TURBO = {"rcm": TURBO_TINY, "rcm-two-experts": TURBO_TINY_I2V}


@pytest.fixture(scope="module")
def denoisers(tmp_path_factory):
    """A denoiser by name, made when it is first asked for."""
    made = {}

    def denoiser(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name in LINUM:
                made[name] = Denoiser(LINUM[name], E2E)
            elif name in WAN:
                write_weights(folder, WAN[name])
                made[name] = Denoiser(WAN[name], folder)
            else:
                torch.manual_seed(2)
                for part in TURBO[name].layouts[0].dits:
                    checkpoint.save(folder / part, new_tensors(TURBO[name]))
                made[name] = Denoiser(TURBO[name], folder)
        return made[name]
    return denoiser


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "out"))


def embedding_for(denoiser, seed=1, **changes):
    card = denoiser.card
    said = dict(clip_id=f"{seed:064x}", model=card.name, weights_fingerprint="w", prompt="", negative_prompt="",
                seed=seed, shape=SHAPE, fps=16.0, num_steps=4 if card in TURBO.values() else NUM_STEPS, guidance=4.0,
                precision=denoiser.on.precision, attention=denoiser.on.attention)
    draw = torch.Generator().manual_seed(seed)
    prompt, negative = (torch.randn(length, 32, generator=draw) for length in (7, 3))
    shape = card.grid.of(SHAPE)
    image = (torch.randn(20, *shape[1:], generator=draw),) if card.takes_image else ()
    return Embedding(request=Request(**said | changes), prompt={"video": prompt}, negative={"video": negative},
                     image=image)


def keep_of(denoiser, store, halt_at=None):
    """halt_at: that many steps after which it is asked to stop; 0 is before the first that is done."""
    keep = PersistSampled(SimpleNamespace(make=lambda: denoiser), store)
    asked = count()
    keep.halted = lambda: next(asked) == halt_at
    return keep


def latents(store, embeddings):
    return [store.get(key_of_request(LATENTS, embedding.request)) for embedding in embeddings]


def folders(store):
    return {info.key.split("/")[0] for info in store.list()}


class Watched:
    """A denoiser whose forwards are counted."""

    def __init__(self, denoiser):
        self.forwards = 0
        for dit in denoiser.sampler.transformers:
            dit.register_forward_hook(self.count)

    def count(self, *_):
        self.forwards += 1


@pytest.mark.parametrize("name", [*LINUM, *WAN, *TURBO])
def test_a_clip_that_is_stopped_after_any_step_is_continued_to_the_same_bytes(name, denoisers, tmp_path):
    denoiser = denoisers(name)
    watched, embedding = Watched(denoiser), embedding_for(denoiser)
    straight = open_store(str(tmp_path / "straight"))
    keep_of(denoiser, straight)([embedding])
    want, forwards = latents(straight, [embedding]), watched.forwards
    for step in range(embedding.request.num_steps):
        store, watched.forwards = open_store(str(tmp_path / str(step))), 0
        with pytest.raises(Halted):
            keep_of(denoiser, store, halt_at=step)([embedding])
        assert folders(store) == ({SAVED_STEPS} if step else set())
        keep = keep_of(denoiser, store)
        keep([embedding])
        assert latents(store, [embedding]) == want and folders(store) == {LATENTS} and keep.partly == (step > 0)
        assert watched.forwards == forwards             # no step was done twice


@pytest.mark.parametrize("name", ["apg", "unipc", "rcm-two-experts"])
def test_a_clip_can_be_stopped_again_and_again(name, denoisers, tmp_path):
    denoiser = denoisers(name)
    embedding = embedding_for(denoiser)
    straight, store = open_store(str(tmp_path / "straight")), open_store(str(tmp_path / "out"))
    keep_of(denoiser, straight)([embedding])
    for _ in range(embedding.request.num_steps - 1):
        with pytest.raises(Halted):
            keep_of(denoiser, store, halt_at=1)([embedding])
    keep_of(denoiser, store)([embedding])
    assert latents(store, [embedding]) == latents(straight, [embedding])


@pytest.mark.parametrize("name", ["apg", "apg-in-pairs", "two-experts", "rcm"])
def test_clips_of_a_batch_are_continued_in_any_other_batch(name, denoisers, tmp_path):
    denoiser = denoisers(name)
    embeddings = [embedding_for(denoiser, seed) for seed in range(4)]
    straight, store = open_store(str(tmp_path / "straight")), open_store(str(tmp_path / "out"))
    for embedding in embeddings:
        keep_of(denoiser, straight)([embedding])
    with pytest.raises(Halted):
        keep_of(denoiser, store, halt_at=2)(embeddings[:2])
    with pytest.raises(Halted):
        keep_of(denoiser, store, halt_at=1)(embeddings[2:3])
    keep_of(denoiser, store)([embeddings[1]])
    persisted = keep_of(denoiser, store)([embeddings[3], embeddings[0], embeddings[2]])
    assert [value.request.seed for value in persisted] == [3, 0, 2]
    assert latents(store, embeddings) == latents(straight, embeddings) and folders(store) == {LATENTS}


def test_a_clip_that_goes_on_elsewhere_says_which_processors_made_it(denoisers, tmp_path, monkeypatch):
    denoiser, (store, straight) = denoisers("cfg"), (open_store(str(tmp_path / name)) for name in ("out", "straight"))
    embedding = replace(embedding_for(denoiser), determinism=("a",))

    def made(store):
        return Restore(store).fetch(Persisted(
            request=embedding.request, key=key_of_request(LATENTS, embedding.request))).determinism

    keep_of(denoiser, straight)([embedding])
    assert made(straight) == ("a", denoiser.determinism)
    for place, halt_at in (("a", 1), ("a", 1), ("b", 1), ("b", None)):
        monkeypatch.setattr(type(denoiser), "determinism", place)
        with pytest.raises(Halted) if halt_at else nullcontext():
            keep_of(denoiser, store, halt_at=halt_at)([embedding])
    assert made(store) == ("a", "a then b")


def by_number(data, key):
    """An object of this clip as it was before streams had names: the place alone, of the video."""
    tensors, metadata = unsealed(data, key)
    return sealed({name.replace("stream.video", "stream.0").removesuffix(".video"): stream
                   for name, stream in tensors.items()}, metadata)


def test_what_was_saved_before_streams_had_names_is_the_video(denoisers, tmp_path):
    denoiser, (store, straight) = denoisers("unipc"), (open_store(str(tmp_path / name)) for name in ("out", "straight"))
    embedding = embedding_for(denoiser)
    keep_of(denoiser, straight)([embedding])
    with pytest.raises(Halted):
        keep_of(denoiser, store, halt_at=2)([embedding])
    key = key_of_request(SAVED_STEPS, embedding.request)
    store.put(key, by_number(store.get(key), key))
    assert set(unsealed(store.get(key), key)[0]) == {"0", "1", "2", "3"}
    keep = keep_of(denoiser, store)
    keep([embedding])
    assert keep.partly and latents(store, [embedding]) == latents(straight, [embedding])
    key = key_of_request(LATENTS, embedding.request)
    store.put(key, by_number(store.get(key), key))
    found, want = (Restore(place).fetch(Persisted(request=embedding.request, key=key)) for place in (store, straight))
    assert list(found.streams) == ["video"] and torch.equal(found.streams["video"], want.streams["video"])


class TwoStreams(Actor):
    """A sampler of video and audio, each with a velocity of its own."""

    determinism = "here"

    def schedule(self, request):
        return "two"

    def __call__(self, batch, steps):
        def velocity(clips, sigma):
            return [{"video": clip["video"].sin(), "audio": clip["audio"].cos() * sigma} for clip in clips]

        start = [{"video": torch.full((2, 3), 1.0 + embedding.request.seed), "audio": torch.ones(5)}
                 for embedding in batch]
        clips = unipc(velocity, start, [1 - number / NUM_STEPS for number in range(NUM_STEPS + 1)], steps)
        return [Latent(request=embedding.request, streams=clip) for embedding, clip in zip(batch, clips, strict=True)]


def test_clips_of_two_streams_are_continued_with_both(denoisers, tmp_path):
    embeddings = [embedding_for(denoisers("apg"), seed) for seed in (1, 2)]
    straight = open_store(str(tmp_path / "straight"))
    keep_of(TwoStreams(), straight)(embeddings)
    for step in range(1, NUM_STEPS):
        store = open_store(str(tmp_path / str(step)))
        with pytest.raises(Halted):
            keep_of(TwoStreams(), store, halt_at=step)(embeddings)
        for embedding in embeddings:                    # in a batch of its own
            keep_of(TwoStreams(), store)([embedding])
        assert latents(store, embeddings) == latents(straight, embeddings)


def other_schedule(data, store, denoiser):
    other = open_store(store.uri + "-other")
    embedding = embedding_for(denoiser, num_steps=NUM_STEPS + 1)
    with pytest.raises(Halted):
        keep_of(denoiser, other, halt_at=2)([embedding])
    return other.get(key_of_request(SAVED_STEPS, embedding.request))


def other_clip(data, store, denoiser):
    other = open_store(store.uri + "-other")
    embedding = embedding_for(denoiser, seed=2)
    with pytest.raises(Halted):
        keep_of(denoiser, other, halt_at=2)([embedding])
    return other.get(key_of_request(SAVED_STEPS, embedding.request))


@pytest.mark.parametrize("damage", [
    pytest.param(lambda data, *_: data[:-5], id="truncated"),
    pytest.param(lambda data, *_: data[:-1] + bytes([data[-1] ^ 1]), id="flipped"),
    pytest.param(lambda data, *_: b"", id="empty"),
    pytest.param(lambda data, *_: data.replace(b'"step":"2"', b'"step":"3"'), id="another step"),
    pytest.param(other_schedule, id="of another number of steps"), pytest.param(other_clip, id="of another clip")])
def test_steps_that_are_damaged_or_of_something_else_are_removed_and_the_clip_begins_anew(
        damage, denoisers, store, tmp_path):
    denoiser = denoisers("unipc")
    embedding = embedding_for(denoiser)
    straight = open_store(str(tmp_path / "straight"))
    keep_of(denoiser, straight)([embedding])
    with pytest.raises(Halted):
        keep_of(denoiser, store, halt_at=2)([embedding])
    key = key_of_request(SAVED_STEPS, embedding.request)
    damaged = damage(store.get(key), store, denoiser)
    assert damaged != store.get(key)
    store.put(key, damaged)
    with pytest.raises(Halted):
        keep_of(denoiser, store, halt_at=0)([embedding])
    assert folders(store) == set()
    keep_of(denoiser, store)([embedding])
    assert latents(store, [embedding]) == latents(straight, [embedding])


# When it is saved, in time that only counts.

class Slow(Actor):
    """A sampler whose steps take `step_s` on a clock of its own, and a store that takes `save_s` of it to write."""

    def __init__(self, store, monkeypatch, *, num_steps, step_s, save_s):
        self.now, self.num_steps, self.step_s, self.save_s = 0.0, num_steps, step_s, save_s
        self.saves, self.lookups, self.store, self.put, self.get = [], [], store, store.put, store.get
        monkeypatch.setattr(steps.time, "monotonic", lambda: self.now)
        store.put, store.get = self.slow_put, self.counted_get
        self.keep = PersistSampled(SimpleNamespace(make=lambda: self), store)

    def slow_put(self, key, data):
        self.now += self.save_s
        if key.startswith(SAVED_STEPS):
            self.saves.append(self.now)
        self.put(key, data)

    def counted_get(self, key, **limits):
        self.lookups.append(key.split("/")[0])
        return self.get(key, **limits)

    determinism = "here"

    def schedule(self, request):
        return "slow"

    def __call__(self, batch, steps):
        def velocity(clips, sigma):
            self.now += self.step_s
            return [{"video": torch.ones_like(clip["video"])} for clip in clips]

        sigmas = [1 - number / self.num_steps for number in range(self.num_steps + 1)]
        clips = euler(velocity, [{"video": torch.zeros(2, 3)} for _ in batch], sigmas, steps)
        return [Latent(request=embedding.request, streams=clip) for embedding, clip in zip(batch, clips, strict=True)]

    def sample(self, denoiser, seed=1):
        return self.keep([embedding_for(denoiser, seed, num_steps=self.num_steps)])


def test_short_clips_are_never_saved_and_after_the_first_not_looked_for(store, denoisers, monkeypatch):
    slow = Slow(store, monkeypatch, num_steps=14, step_s=2.0, save_s=0.1)
    for seed in range(5):
        slow.sample(denoisers("apg"), seed)
    assert slow.saves == [] and slow.lookups.count(SAVED_STEPS) == 1 and slow.lookups.count(LATENTS) == 5


@pytest.mark.parametrize("save_s", [0.01, 0.5, 4.0])
def test_saving_takes_at_most_a_hundredth_of_the_work_and_half_a_minute_is_the_least(
        save_s, store, denoisers, monkeypatch):
    slow = Slow(store, monkeypatch, num_steps=1000, step_s=2.0, save_s=save_s)
    slow.sample(denoisers("apg"))
    between = [later - earlier - save_s for earlier, later in pairwise(slow.saves)]
    assert slow.saves[0] == 30.0 + save_s
    assert all(max(30.0, 100 * save_s) - 1e-6 <= worked_s < max(30.0, 100 * save_s) + 2.0 for worked_s in between)
    assert len(between) == (2000 - 30 - 1) // max(30, 100 * save_s)


def test_a_store_that_cannot_be_written_to_stops_no_clip_before_its_latent_is_made(store, denoisers, monkeypatch):
    slow = Slow(store, monkeypatch, num_steps=100, step_s=2.0, save_s=0.1)
    put = slow.put

    def broken(key, data):
        if key.startswith(SAVED_STEPS):
            raise StoreError("no space left")
        put(key, data)

    slow.put = broken
    assert slow.sample(denoisers("apg"))[0].key.startswith(LATENTS) and len(slow.saves) == 6
    assert folders(store) == {LATENTS}


def test_a_clip_that_ends_in_nan_begins_anew(denoisers, store, monkeypatch):
    denoiser = denoisers("apg")
    embedding = embedding_for(denoiser)
    with pytest.raises(Halted):
        keep_of(denoiser, store, halt_at=2)([embedding])
    with monkeypatch.context() as broken, pytest.raises(NonFiniteLatent):
        broken.setattr("dailies.model.guidance.AdaptiveProjectedGuidance.__call__", lambda self, cond,
                       uncond: cond * math.nan)
        keep_of(denoiser, store)([embedding])
    assert folders(store) == set()
