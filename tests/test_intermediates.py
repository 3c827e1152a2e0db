"""What a stage made waits in the run folder: whole, found again, made anew where it is damaged."""

import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from dailies.actors.actor import Actor
from dailies.actors.device_lock import DeviceLock
from dailies.actors.fitting import Fitting
from dailies.actors.messages import Clip, Embedding, Failure, FirstFrame, Latent, Request
from dailies.model.catalog import CATALOG
from dailies.model.shapes import VideoShape
from dailies.pipeline.run.intermediates import (
    Damaged,
    Discard,
    Persist,
    Restore,
    Seal,
    clear,
    key_of_request,
    most_object_bytes,
    packed,
    read_object,
)
from dailies.pipeline.run.layout import EMBEDDINGS, LATENTS, SAVED_STEPS
from dailies.pipeline.stages import Stage, Step, run_local
from dailies.pipeline.store import NotFound, open_store

RUNS = []                                               # the requests that an encoder or sampler below has worked for


class Encoder(Actor):
    device = "cpu"

    def __call__(self, batch):
        RUNS.extend(("encode", request.prompt) for request in batch)
        return [Embedding(request=request, 
                          prompt={"video": text_of(request.prompt), "audio": text_of(request.prompt).bfloat16()},
                          negative={"video": text_of(request.negative_prompt), "audio": torch.zeros(0, 8)})
                for request in batch]


@dataclass
class Sampler(Actor):
    fail_on: int | None = None

    def __call__(self, batch):
        RUNS.extend(("sample", embedding.request.seed) for embedding in batch)
        return [self.sample(embedding) for embedding in batch]

    def sample(self, embedding):
        if embedding.request.seed == self.fail_on:
            return Failure(request=embedding.request, stage="sample", error_type="ValueError", error="by request")
        noise = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(embedding.request.seed))
        return Latent(request=embedding.request, fallbacks=("attention=dense", "steps=ü"),
                      determinism=("a cpu", "a gpu"),
                      streams={"video": noise + embedding.prompt["video"].mean(), "audio": noise[0].half()})


class Writer:
    def __call__(self, batch):
        return [Clip(request=latent.request, uri="", sha256=str(latent.streams["video"].sum().item()), num_bytes=1,
                     duration_s=1.0, fallbacks=latent.fallbacks) for latent in batch]


def same_streams(mine, theirs):
    """To the last bit, whatever their order."""
    return set(mine) == set(theirs) and all(
        stream.dtype == theirs[name].dtype and torch.equal(stream, theirs[name]) for name, stream in mine.items())


def text_of(prompt):
    return torch.tensor([list(prompt.encode()[:8].ljust(8))], dtype=torch.float32)


def request(seed, prompt="a red circle"):
    return Request(clip_id=f"{seed:064x}", model="demo", weights_fingerprint="w", prompt=prompt,
                   negative_prompt="blurred", seed=seed, shape=VideoShape(frames=5, height=32, width=32), fps=24.0,
                   num_steps=2, guidance=1.0, precision="fp32", attention="dense")


def stages(store, sampler=None, kept=True):
    sampler = Step(actor=Sampler, args=sampler or {})
    if not kept:
        return [Stage(name="encode", steps=(Step(actor=Encoder),)), Stage(name="sample", steps=(sampler,)),
                Stage(name="publish", steps=(Step(actor=Writer),))]
    fetch = Step(actor=Restore, args={"store": store})
    encode = Step(actor=Persist, args=dict(step=Step(actor=Encoder), store=store, folder=EMBEDDINGS))
    sample = Step(actor=Persist, args=dict(step=sampler, store=store, folder=LATENTS))
    return [Stage(name="encode", steps=(encode,)), Stage(name="sample", steps=(fetch, sample)),
            Stage(name="publish", steps=(fetch, Step(actor=Writer)))]


def render(*args, **kwargs):
    RUNS.clear()
    return [outcome.value for outcome in run_local(*args, **kwargs)]


def damage(store, key, how):
    data = store.get(key)
    store.put(key, {"truncated": data[:-5], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "empty": b"",
                    "noise": b"\xff" * 100, "header": data.replace(b"attention=dense", b"attention=spars")}[how])


@pytest.fixture
def store(store_uri):
    return open_store(store_uri)


def test_clips_are_the_same_with_and_without_the_shelf(store):
    requests = [request(seed) for seed in range(3)]
    assert render(stages(store), requests) == render(stages(None, kept=False), requests)


def test_a_second_run_finds_everything_and_works_for_nothing(store):
    requests = [request(seed) for seed in range(3)]
    first = render(stages(store), requests)
    assert RUNS == [("encode", "a red circle"), ("sample", 0), ("sample", 1), ("sample", 2)]
    assert render(stages(store), requests) == first
    assert RUNS == []


def test_only_a_small_reference_crosses_and_values_come_back_bit_for_bit(store):
    keep, fetch = Persist(Step(actor=Encoder), store, EMBEDDINGS), Restore(store)
    value, = Encoder()([request(7)])
    persisted, = keep([request(7)])
    assert len(pickle.dumps(persisted)) < 2000
    found, = fetch([persisted])
    for mine, theirs in ((value.prompt, found.prompt), (value.negative, found.negative)):
        assert same_streams(mine, theirs)

    latent = Sampler().sample(value)
    found, = fetch(Persist(Step(actor=Sampler), store, LATENTS)([value]))
    assert found.fallbacks == latent.fallbacks == ("attention=dense", "steps=ü")
    assert found.determinism == latent.determinism == ("a cpu", "a gpu")
    assert same_streams(latent.streams, found.streams)


def test_requests_that_share_an_embedding_each_get_it_as_their_own(store):
    keep, fetch = Persist(Step(actor=Encoder), store, EMBEDDINGS), Restore(store)
    persisted, = keep([request(1)])
    assert fetch([replace(persisted, request=request(2))])[0].request == request(2)
    RUNS.clear()
    assert [value.request.seed for value in keep([request(3), request(4)])] == [3, 4]
    assert RUNS == []


@pytest.mark.parametrize("folder", [EMBEDDINGS, LATENTS, SAVED_STEPS])
def test_an_object_larger_than_its_request_allows_is_not_read(folder, tmp_path):
    store, asked, fits = open_store(tmp_path), request(1), Fitting(CATALOG["demo"])
    path = tmp_path / key_of_request(folder, asked)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(2**28)                            # holes, that take no disk
    with pytest.raises(Damaged, match="too large"):
        with read_object(store, key_of_request(folder, asked), asked, fits):
            pass


@pytest.mark.parametrize("card", CATALOG.values(), ids=lambda card: card.name)
def test_what_a_model_makes_at_its_largest_is_within_what_is_read(card):
    height, width = max(card.resolutions.values(), key=math.prod)
    shown = FirstFrame(sha256="a" * 64, uri="first.png") if card.takes_image else None
    asked = replace(request(1), shape=card.shape_for((width, height), card.max_duration_s)[0], image=shown)
    fits = Fitting(card)
    shapes = card.stream_shapes(asked.shape)
    latent = Latent(request=asked, streams={name: torch.zeros(shape) for name, shape in shapes.items()})
    text = {name: torch.zeros(getattr(card, "text_rows", 512), width) for name, width in card.text_widths.items()}
    image = (torch.zeros(20, *card.image_grid(asked.shape)), torch.zeros(257, 1280)) if card.takes_image else ()
    embedding = Embedding(request=asked, prompt=text, negative=text, image=image)
    for value, folder in ((embedding, EMBEDDINGS), (latent, LATENTS)):
        key = key_of_request(folder, asked)
        assert fits(value) is None
        assert len(packed(value, key, Seal())) < most_object_bytes(key, asked, fits) < 2**28
    four = 4 * sum(4 * math.prod(shape) for shape in shapes.values())       # as UniPC carries
    most = 2**30 if "audio" in shapes else 2**29        # those with sound make 20 s at 1088p
    assert four + 2**20 < most_object_bytes(key_of_request(SAVED_STEPS, asked), asked, fits) < most


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "noise", "header"])
def test_what_is_damaged_is_made_again(store, how):
    first = render(stages(store), [request(1)])
    damage(store, key_of_request(LATENTS, request(1)), how)
    if how != "header":                                 # an embedding has no fallbacks to change
        damage(store, key_of_request(EMBEDDINGS, request(1)), how)
    assert render(stages(store), [request(1)]) == first
    assert ("sample", 1) in RUNS and (how == "header" or ("encode", "a red circle") in RUNS)
    assert render(stages(store), [request(1)]) == first and RUNS == []


def test_a_latent_under_anothers_name_is_not_taken(store):
    render(stages(store), [request(1)])
    store.put(key_of_request(LATENTS, request(2)), store.get(key_of_request(LATENTS, request(1))))
    render(stages(store), [request(2)])
    assert ("sample", 2) in RUNS


def test_what_is_lost_between_two_stages_is_said_to_be_lost(store):
    persisted, = Persist(Step(actor=Encoder), store, EMBEDDINGS)([request(1)])
    damage(store, persisted.key, "flipped")
    with pytest.raises(NotFound):
        Restore(store)([persisted])
    assert store.head(persisted.key) is None              # so that the first stage does not find it


def test_failures_pass_untouched_and_are_not_kept(store):
    sampler = {"fail_on": 2}
    values = render(stages(store, sampler), [request(seed) for seed in range(1, 4)])
    assert [type(value) for value in values] == [Clip, Failure, Clip]
    assert store.head(key_of_request(LATENTS, request(2))) is None
    failure = values[1]
    assert Restore(store)([failure]) == [failure] and Discard(store)([failure]) == [failure]
    assert Persist(Step(actor=Encoder), store, EMBEDDINGS)([failure, request(1)])[0] is failure


def test_latents_go_when_their_clips_are_published_and_the_rest_at_the_end(store):
    clips = render(stages(store), [request(1), request(2)])
    drop = Discard(store)
    assert drop(clips[:1]) == clips[:1]
    assert store.head(key_of_request(LATENTS, request(1))) is not None       # its answer may not have been heard yet
    assert drop(clips[1:]) == clips[1:]
    assert [info.key for info in store.list(f"{LATENTS}/")] == [key_of_request(LATENTS, request(2))]
    for folder in (EMBEDDINGS, LATENTS):
        clear(store, (info.key for info in store.list(f"{folder}/")))
    assert list(store.list()) == []


def test_while_a_latent_is_saved_the_next_is_sampled_and_its_answer_waits_for_it(tmp_path):
    """Were saving in the sampler's way, the second clip would never begin and the first never be saved."""
    store, began, answers = open_store(str(tmp_path)), {1: threading.Event(), 2: threading.Event()}, []
    put = store.put

    def slow_put(key, data):
        if key == key_of_request(LATENTS, request(1)):
            assert began[2].wait(60) and not answers
        put(key, data)

    class Turns(Sampler):
        def __call__(self, batch):
            with self.lock:
                began[batch[0].request.seed].set()
                return super().__call__(batch)

    store.put = slow_put
    keep = Persist(SimpleNamespace(make=Turns), store, LATENTS)
    keep.lock = DeviceLock()
    embeddings = Encoder()([request(1), request(2)])
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(keep, embeddings[:1])
        assert began[1].wait(60)
        second = threads.submit(keep, embeddings[1:])
        answers += first.result()
        assert store.get(answers[0].key) and second.result()[0].key == key_of_request(LATENTS, request(2))


def test_keep_tells_the_device_of_its_step(store):
    assert Persist(Step(actor=Encoder), store, EMBEDDINGS).device == "cpu"
    assert Persist(Step(actor=Sampler), store, LATENTS).device == ""
