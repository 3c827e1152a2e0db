"""The plan: what each row resolves to, what shares a clip, what comes first, and a million rows of it."""

import hashlib
import json
import runpy
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import BROKEN, jpeg, png

from dailies.actors.messages import FirstFrame
from dailies.jobs.machines import variant_of
from dailies.jobs.settings import RenderJob
from dailies.model.catalog import CATALOG
from dailies.pipeline.manifest.images import ALLOWED_IMAGE
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.manifest.validation import ManifestError
from dailies.pipeline.plan import Defaults, Plan, clip_id_for, with_another_seed
from dailies.pipeline.resolved import first_uses, num_distinct, ranked

DEMO = replace(CATALOG["demo"], num_steps=20, guidance=3.0)     # whatever its tuning is: the clip_id below is for these
I2V = CATALOG["wan2.1-i2v-14b"]
ROOT = Path(__file__).resolve().parent.parent


def plan_of(path: Path, *, card=DEMO, defaults=Defaults(), skip_invalid=False, weights_fingerprint="w" * 64,
            **columns) -> Plan:
    pq.write_table(pa.table(columns), path / "m.parquet")
    return Plan.make(Manifest.read(str(path / "m.parquet")), card, defaults, weights_fingerprint=weights_fingerprint,
                     precision="fp32", skip_invalid=skip_invalid)


def test_a_bare_prompt_gets_everything_from_the_card(tmp_path):
    [request] = plan_of(tmp_path, prompt=["a red circle"]).requests()
    assert (str(request.shape), request.fps, request.num_steps, request.guidance) == ("64x64x49", 24.0, 20, 3.0)
    assert (request.model, request.negative_prompt) == ("demo", "")
    assert (request.precision, request.attention) == ("fp32", "dense")
    name = hashlib.sha256(b"prompt 12 a red circle").hexdigest()[:16]      # of a row that was given none
    assert request.seed == int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 2**31


def test_the_row_decides_before_the_command_line_and_that_before_the_card(tmp_path):
    defaults = Defaults(resolution="96x32", frames=9, steps=7, negative_prompt="blurry")
    plan = plan_of(tmp_path, defaults=defaults, prompt=["a", "b"], resolution=[None, "32x64"], duration_s=[None, 1.0],
                   steps=[None, 3], guidance=[None, 0.0], negative_prompt=[None, ""])
    said = {request.prompt: (str(request.shape), request.num_steps, request.guidance, request.negative_prompt)
            for request in plan.requests()}
    assert said == {"a": ("96x32x9", 7, 3.0, "blurry"), "b": ("32x64x25", 3, 0.0, "")}
    assert plan.summary()["settings"] == dict(resolution="96x32", duration_s=None, frames=9, steps=7, guidance=3.0,
                                              negative_prompt="blurry", fps=24.0, precision="fp32", attention="dense")


def test_rows_with_guidance_of_their_own_are_told_what_it_means_for_two_experts(tmp_path):
    columns = dict(prompt=["a", "b", "c"], guidance=[6.0, None, 4.0])
    plan = plan_of(tmp_path, card=CATALOG["wan2.2-t2v-a14b"], **columns)
    assert plan.summary()["notes"] == [{"note": plan.card.guidance_note, "rows": 1}]
    assert plan.roundings == []                         # nothing was changed, so --strict does not mind
    assert plan_of(tmp_path, card=CATALOG["wan2.1-t2v-14b"], **columns).summary()["notes"] == []


@pytest.mark.parametrize("defaults", [dict(resolution="7x7"), dict(duration_s=0.5), dict(steps=2000),
                                      dict(guidance=1e6)])
def test_defaults_that_the_model_cannot_render_are_refused(tmp_path, defaults):
    with pytest.raises(ValueError, match=f"(width|{next(iter(defaults))}) must be"):
        plan_of(tmp_path, defaults=Defaults(**defaults), prompt=["a"])


def test_a_length_is_given_once():
    with pytest.raises(ValueError, match="not both"):
        Defaults(duration_s=2, frames=49)


def test_what_the_model_cannot_render_joins_the_manifests_complaints(tmp_path):
    with pytest.raises(ManifestError) as caught:
        plan_of(tmp_path, prompt=["a", None, "c", "d", "e", "f"], steps=[0, 1000, 1, 1, 1, 1],
                resolution=["7x7", None, "480p", None, None, "8000x8000"],
                duration_s=[-1.0, None, 0.5, None, 60.0, None], guidance=[1.0, 1, 1, 1, 500, 1],
                image=[None, None, None, "first.png", None, None])
    found = [(error.row, error.column) for error in caught.value.errors]
    assert sorted(found) == [(0, "duration_s"), (0, "resolution"), (0, "steps"), (1, "prompt"), (2, "duration_s"),
                             (2, "resolution"), (3, "image"), (4, "duration_s"), (4, "guidance"), (5, "resolution")]
    said = str(caught.value)
    assert "row 0, resolution: got '7x7'; allowed: width must be a multiple of 8 and at least 32 for demo" in said
    assert "row 2, resolution: got '480p'; allowed: 64p or WIDTHxHEIGHT for demo" in said
    assert "row 4, duration_s: got 60.0; allowed: 1 to 5 for demo" in said
    assert "row 3, image: got 'first.png'; allowed: nothing: demo makes video from text alone" in said


def test_bad_rows_can_be_set_aside(tmp_path):
    columns = dict(prompt=["a", None, "c"], id=["x", "y", "z"], steps=[5, 5, 0], tag=[1, 2, 3])
    plan = plan_of(tmp_path, skip_invalid=True, **columns)
    assert [request.prompt for request in plan.requests()] == ["a"]
    assert [(row.row, row.id, row.prompt) for row in plan.invalid_rows()] == [(1, "y", None), (2, "z", "c")]
    assert plan.user_columns([2]).to_pydict() == {"user.tag": [3]}
    summary = plan.summary()
    assert (summary["rows"], summary["invalid_rows"], summary["clips"], summary["complaints"]["count"]) == (3, 2, 1, 2)

    nothing = plan_of(tmp_path, skip_invalid=True, prompt=["a"], steps=[0])
    assert list(nothing.requests()) == [] and nothing.keys().num_rows == 0
    assert nothing.summary()["buckets"] == []


def test_a_rounded_length_is_noted_with_its_rows(tmp_path):
    plan = plan_of(tmp_path, prompt=list("abcd"), duration_s=[2.9, 2.9, None, 3.0], frames=[None, None, 8, None])
    assert sorted(plan.roundings) == [("2.9 s rounded down to 2 s (49 frames)", 2), ("8 frames rounded down to 5", 1)]
    assert [request.shape.frames for request in plan.requests()] == [49, 49, 5, 73]


def test_samples_are_rows_with_seeds_that_count_up(tmp_path):
    plan = plan_of(tmp_path, prompt=["a", "b"], id=["x", "y"], seed=[2**62, 5], samples=[1, 3])
    assert plan.keys().drop_columns("clip_id").to_pylist() == [
        {"id": "x", "seed": 2**62, "row": 0}, *({"id": "y", "seed": seed, "row": 1} for seed in (5, 6, 7))]
    assert [request.seed for request in plan.requests()] == [2**62, 5, 6, 7]


def test_more_clips_than_a_run_can_hold_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="20,000,000 clips in all; allowed: at most 10,000,000"):
        plan_of(tmp_path, prompt=["a"] * 2000, samples=[10_000] * 2000)


def test_a_seed_that_was_not_given_stays_with_its_id(tmp_path):
    def seeds(ids: list[str]) -> dict[str, int]:
        rows = plan_of(tmp_path, prompt=["a"] * len(ids), id=ids).keys().to_pylist()
        return {row["id"]: row["seed"] for row in rows}

    before, after = seeds(["x", "y"]), seeds(["new", "y", "x"])
    assert before["x"] == after["x"] and before["y"] == after["y"] and len(set(after.values())) == 3
    assert all(0 <= seed < 2**31 for seed in after.values())


def test_rows_that_ask_for_the_same_clip_share_it(tmp_path):
    plan = plan_of(tmp_path, prompt=["a", "b", "a"], id=["x", "y", "z"], seed=[1, 1, 1], duration_s=[2.0, 2.0, 2.5])
    requests = list(plan.requests())
    assert [request.prompt for request in requests] == ["a", "b"]
    assert [(row.id, row.row, row.seed) for row in plan.planned_rows(requests[0].clip_id)] == [("x", 0, 1), ("z", 2, 1)]
    assert [row.id for row in plan.planned_rows(requests[1].clip_id)] == ["y"]
    assert plan.summary()["duplicates"] == 1
    with pytest.raises(KeyError):
        plan.planned_rows("0" * 64)


@pytest.mark.parametrize("change", [
    dict(prompt=["b"]), dict(negative_prompt=["x"]), dict(seed=[2]), dict(duration_s=[3.0]), dict(resolution=["64x32"]),
    dict(steps=[3]), dict(guidance=[2.0]), dict(card=CATALOG["linum-v2-360p"]), dict(weights_fingerprint="v" * 64)])
def test_whatever_decides_pixels_changes_the_clip_id(tmp_path, change):
    [one] = plan_of(tmp_path, prompt=["a"], seed=[1]).requests()
    [other] = plan_of(tmp_path, **(dict(prompt=["a"], seed=[1]) | change)).requests()
    assert one.clip_id != other.clip_id


@pytest.mark.parametrize("change", [dict(id=["x"]), dict(priority=[9]), dict(tag=["x"]), dict(negative_prompt=[""]),
                                    dict(guidance=[3.0]), dict(resolution=["64x64"]), dict(frames=[49])])
def test_what_decides_no_pixels_leaves_the_clip_id(tmp_path, change):
    [one] = plan_of(tmp_path, prompt=["a"], seed=[1]).requests()
    [other] = plan_of(tmp_path, prompt=["a"], seed=[1], **change).requests()
    assert one.clip_id == other.clip_id


def test_the_image_is_part_of_the_clip_by_its_content_and_not_by_its_name(tmp_path):
    for name, data in (("a.png", png()), ("twin.png", png()), ("b.png", png(44, 60))):
        (tmp_path / name).write_bytes(data)
    plan = plan_of(tmp_path, card=I2V, prompt=["x"] * 4, seed=[1] * 4, image=["a.png", "b.png", "twin.png", "./a.png"])
    first, other = plan.requests()
    assert [row.row for row in plan.planned_rows(first.clip_id)] == [0, 2, 3]
    assert [row.row for row in plan.planned_rows(other.clip_id)] == [1]
    assert first.image == FirstFrame(sha256=hashlib.sha256(png()).hexdigest(), uri=str(tmp_path / "a.png"))
    for request in (first, other):
        shape = request.shape
        assert request.clip_id == clip_id_for(
            prompt="x", negative_prompt=I2V.negative_prompt, seed=1, model=I2V.name, frames=shape.frames,
            height=shape.height, width=shape.width,
            num_steps=40, guidance=5.0, precision="fp32", attention="dense", weights_fingerprint="w" * 64,
            image=request.image.sha256)
    (tmp_path / "a.png").write_bytes(png(41, 60))
    changed = plan_of(tmp_path, card=I2V, prompt=["x"], seed=[1], image=["a.png"])
    assert next(changed.requests()).clip_id != first.clip_id
    before = plan_of(tmp_path, card=I2V, prompt=["x"], seed=[1], image=["twin.png"])
    assert changed.images_digest != before.images_digest


def test_a_clip_without_an_image_has_the_name_it_always_had(tmp_path):
    [request] = plan_of(tmp_path, prompt=["a"], seed=[1], frames=[49]).requests()
    assert request.image is None
    assert request.clip_id == "807b94bd41a26926acecb96ef6af0894cd3da9064289c7f441e3c2ce9f7ad1c1"


@pytest.mark.parametrize("size, resolution, shape", [
    ((480, 832), None, "832x480x81"), ((1080, 1920), None, "832x464x81"), ((1920, 1080), "480p", "464x832x81"),
    ((900, 900), "720p", "960x960x81"), ((900, 900), "832x480", "832x480x81"), ((600, 1400), "480p", "960x400x81")])
def test_a_named_resolution_is_an_area_in_the_images_aspect_and_a_size_is_a_size(tmp_path, size, resolution, shape):
    (tmp_path / "a.png").write_bytes(png(*size))
    plan = plan_of(tmp_path, card=I2V, prompt=["x"], image=["a.png"], resolution=pa.array([resolution], pa.string()))
    [request] = plan.requests()
    assert str(request.shape) == shape
    bucket = plan.summary()["buckets"][0]
    assert (bucket["width"], bucket["height"]) == (request.shape.width, request.shape.height)


def test_the_plan_holds_an_image_upright(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(480, 832, orientation=6))
    [request] = plan_of(tmp_path, card=I2V, prompt=["x"], image=["a.jpg"]).requests()
    assert str(request.shape) == "480x832x81"


def test_every_trouble_with_an_image_joins_the_complaints_and_the_rest_is_planned(tmp_path):
    for name, (_, data) in BROKEN.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "long.png").write_bytes(png(32, 900))
    images = [*BROKEN, "good.png", None, "../x.png", "gone.png", "long.png", "long.png", "\x1b[31m.png"]
    resolutions = [None] * (len(images) - 2) + ["832x480", None]
    columns = dict(prompt=["x"] * len(images), image=pa.array(images, pa.string()),
                   resolution=pa.array(resolutions, pa.string()))
    with pytest.raises(ManifestError) as caught:
        plan_of(tmp_path, card=I2V, **columns)
    found = {error.row: error for error in caught.value.errors}
    n = len(BROKEN)
    assert sorted(found) == [*range(n), n + 1, n + 2, n + 3, n + 4, n + 6]
    assert {error.column for error in found.values()} == {"image"}
    for row, (name, (said, _)) in enumerate(BROKEN.items()):
        assert found[row].given.startswith(f"'{name}': {said}") and found[row].allowed == ALLOWED_IMAGE
    assert found[n + 1].given == "nothing" and found[n + 1].allowed.endswith("wan2.1-i2v-14b makes video from an image")
    assert [found[row].given for row in (n + 2, n + 3)] == \
        ["'../x.png': outside the manifest's folder", "'gone.png': no such file"]
    assert found[n + 4].given == "900x32 pixels"
    assert "sides must be at least 128 for wan2.1-i2v-14b" in found[n + 4].allowed
    assert found[n + 6].given == r"'\x1b[31m.png': no such file"
    plan = plan_of(tmp_path, card=I2V, skip_invalid=True, **columns)
    assert [request.image.uri for request in plan.requests()] == \
        [str(tmp_path / "good.png"), str(tmp_path / "long.png")]
    assert (plan.num_invalid_rows, plan.summary()["images"]) == (len(found), 2)


def test_paths_begin_at_the_folder_of_their_own_file(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(png(40 if folder == "one" else 44))
        pq.write_table(pa.table(dict(prompt=["x", "y"], image=["a.png", "a.png"], id=[f"{folder}-1", f"{folder}-2"])),
                       tmp_path / folder / "m.parquet")
    manifest = Manifest.read(str(tmp_path / "*/m.parquet"))
    plan = Plan.make(manifest, I2V, weights_fingerprint="w" * 64, precision="fp32")
    uris = {plan.planned_rows(request.clip_id)[0].id: request.image.uri for request in plan.requests()}
    assert uris == {f"{folder}-{n}": str(tmp_path / folder / "a.png") for folder in ("one", "two") for n in (1, 2)}


def test_an_images_clips_come_together_and_it_is_read_once(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(40 if name == "a.png" else 41, 60))
    read = []
    monkeypatch.setattr("dailies.pipeline.manifest.images.read_image", lambda uri, _: read.append(uri)
                        or Path(uri).read_bytes())
    plan = plan_of(tmp_path, card=I2V, prompt=["x", "x", "y", "y"] * 25, image=["a.png", "b.png"] * 50,
                   resolution=["480x480"] * 100)
    order = [(Path(request.image.uri).name, request.prompt) for request in plan.requests()]
    assert order == sorted(order) and len(read) == 2


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(prompt=ANY_TEXT, negative=st.sampled_from(['","prompt":0,"seed":0', "", "é\\"]) | ANY_TEXT,
       seed=st.integers(0, 2**63 - 1), guidance=st.floats(0, 100))
def test_a_clip_id_is_the_hash_of_canonical_json(prompt, negative, seed, guidance):
    said = dict(attention="dense", frames=49, guidance=guidance, height=64, model="demo", negative_prompt=negative,
                num_steps=20, precision="fp32", prompt=prompt, seed=seed, weights_fingerprint="w", width=64)
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    assert clip_id_for(**said) == hashlib.sha256(canonical).hexdigest()


def test_the_precision_of_decoding_names_other_clips_only_where_it_is_not_the_models_own(tmp_path):
    """DEMO in fp32 decodes in fp32."""
    pq.write_table(pa.table({"prompt": ["a"], "seed": [1]}), tmp_path / "m.parquet")
    said, requests = {}, {}
    for decode in (None, "fp32", "bf16"):
        plan = Plan.make(Manifest.read(str(tmp_path / "m.parquet")), DEMO, weights_fingerprint="w", precision="fp32",
                         decode_precision=decode)
        [requests[decode]] = plan.requests()
        said[decode] = plan.summary()["settings"].get("decode_precision")
    assert said == {None: None, "fp32": None, "bf16": "bf16"} and requests[None] == requests["fp32"]
    assert requests["bf16"].decode_precision == "bf16" and requests["bf16"].clip_id != requests[None].clip_id
    assert requests["bf16"].embedding_key == requests[None].embedding_key
    again = with_another_seed(requests["bf16"])
    assert again.decode_precision == "bf16"
    assert again.clip_id != with_another_seed(replace(requests["bf16"], decode_precision=None)).clip_id


def test_what_moves_bits_on_request_names_other_clips_and_the_defaults_name_todays(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "seed": [1]}), tmp_path / "m.parquet")
    ids = {}
    for variant in (None, "compiled", "2 threads", "compiled, 2 threads"):
        plan = Plan.make(Manifest.read(str(tmp_path / "m.parquet")), DEMO, weights_fingerprint="w", precision="fp32",
                         variant=variant)
        [request] = plan.requests()
        ids[variant] = request.clip_id
        assert request.variant == variant == plan.summary()["settings"].get("variant")
        again = with_another_seed(request)
        assert again.variant == variant and again.clip_id != with_another_seed(replace(request, variant="x")).clip_id
    assert len(set(ids.values())) == 4
    shape = request.shape
    assert ids[None] == clip_id_for(
        prompt="a", seed=1, attention="dense", frames=shape.frames, guidance=request.guidance, height=shape.height,
        width=shape.width, model="demo", negative_prompt=request.negative_prompt, num_steps=request.num_steps,
        precision="fp32", weights_fingerprint="w")


@pytest.mark.parametrize("said, device, variant", [
    ({}, "cpu", None), (dict(threads_per_sampler=1, batch=4, samplers=2), "cpu", None),
    (dict(compile=True), "cuda", "compiled"),
    (dict(threads_per_sampler=2), "cpu", "2 threads"), (dict(threads_per_sampler=2), "cuda", None),
    (dict(threads_per_sampler=3, compile=True), "cpu", "compiled, 3 threads")])
def test_what_moves_bits_on_request_is_compilation_and_the_threads_of_a_cpu(said, device, variant):
    assert variant_of(RenderJob(manifest="m", out="o", **said), device) == variant


def test_urgent_clips_come_first_then_shapes_then_buckets_then_prompts(tmp_path):
    rows = [("a", "64p", 20, 0, 1), ("b", "32x32", 20, 0, 1), ("a", "64p", 10, 0, 2), ("c", "64p", 20, 0, 1),
            ("a", "64p", 20, 0, 3), ("d", "32x32", 20, 5, 1), ("e", "64p", 20, -1, 1)]
    names = ("prompt", "resolution", "steps", "priority", "seed")
    plan = plan_of(tmp_path, **dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    order = [plan.planned_rows(request.clip_id)[0].row for request in plan.requests()]
    assert order == [5, 0, 4, 3, 2, 1, 6]


def test_a_clip_is_as_urgent_as_its_most_urgent_row(tmp_path):
    plan = plan_of(tmp_path, prompt=["a", "b", "b"], seed=[1, 1, 1], priority=[1, 0, 2])
    assert [request.prompt for request in plan.requests()] == ["b", "a"]


def test_clips_can_be_skipped(tmp_path):
    plan = plan_of(tmp_path, prompt=[f"p {number}" for number in range(10)])
    every = [request.clip_id for request in plan.requests()]
    assert [request.clip_id for request in plan.requests(skip=set(every[::2]))] == every[1::2]


def test_the_summary_is_json_and_adds_up(tmp_path):
    plan = plan_of(tmp_path, prompt=["a", "b", "a", "c"], seed=[1] * 4, steps=[5, 5, 5, 6], samples=[1, 3, 1, 1],
                   mood=["x"] * 4)
    summary = json.loads(json.dumps(plan.summary()))
    assert [summary[name] for name in ("rows", "planned_rows", "clips", "duplicates", "prompts")] == [4, 6, 5, 1, 3]
    assert summary["buckets"] == [dict(width=64, height=64, frames=49, steps=5, guidance=3.0, clips=4),
                                  dict(width=64, height=64, frames=49, steps=6, guidance=3.0, clips=1)]
    assert summary["user_columns"] == ["user.mood"] and summary["model"] == "demo"


PROMPT = st.sampled_from(["a", "b", "c"])
ROW = st.fixed_dictionaries({
    "prompt": PROMPT, "seed": st.none() | st.integers(0, 2), "samples": st.none() | st.integers(1, 3),
    "resolution": st.sampled_from([None, "64p", "64x64", "32x64"]),
    "duration_s": st.sampled_from([None, 1.0, 2.0, 2.7]),
    "steps": st.sampled_from([None, 3, 20]), "guidance": st.sampled_from([None, 0.0, -0.0, 3.0]),
    "negative_prompt": st.sampled_from([None, "", "b"]), "priority": st.none() | st.integers(-1, 1)})


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=12))
def test_every_row_finds_its_clip_and_every_clip_its_rows(tmp_path_factory, rows):
    plan = plan_of(tmp_path_factory.mktemp("plan"), **{name: [row[name] for row in rows] for name in rows[0]})
    requests = {request.clip_id: request for request in plan.requests()}
    keys = plan.keys().to_pylist()
    assert len(requests) == plan.num_clips == len({key["clip_id"] for key in keys})
    assert len(keys) == plan.num_planned_rows == sum(row["samples"] or 1 for row in rows)
    found = [(row.id, row.seed, row.clip_id, row.row) for clip_id in requests for row in plan.planned_rows(clip_id)]
    assert sorted(found) == sorted((key["id"], key["seed"], key["clip_id"], key["row"]) for key in keys)
    for key in keys:
        row, request = rows[key["row"]], requests[key["clip_id"]]
        assert (request.prompt, request.seed) == (row["prompt"], key["seed"])
        assert request.shape.frames == (49 if row["duration_s"] is None else int(row["duration_s"]) * 24 + 1)
        assert request.num_steps == (row["steps"] or 20) and request.negative_prompt == (row["negative_prompt"] or "")
        assert request.clip_id == clip_id_for(
            prompt=request.prompt, negative_prompt=request.negative_prompt, seed=request.seed, model="demo",
            frames=request.shape.frames, height=request.shape.height, width=request.shape.width, precision="fp32",
            num_steps=request.num_steps, guidance=request.guidance, attention="dense", weights_fingerprint="w" * 64)
    urgent = [max(rows[row.row]["priority"] or 0 for row in plan.planned_rows(clip_id)) for clip_id in requests]
    assert urgent == sorted(urgent, reverse=True)
    for _, group in groupby(zip(urgent, requests.values(), strict=True), key=lambda pair: pair[0]):
        buckets = [bucket for bucket, _ in groupby(request.bucket for _, request in group)]
        assert len(buckets) == len(set(buckets))       # a bucket, once left, does not come back


def test_the_example_is_24_clips_of_the_demo_models_world():
    example = ROOT / "examples" / "prompts.parquet"
    plan = Plan.make(Manifest.read(str(example)), DEMO, weights_fingerprint="w" * 64, precision="fp32")
    assert (plan.num_clips, plan.num_invalid_rows, plan.roundings) == (24, 0, [])
    made = runpy.run_path(str(example.with_name("make_prompts.py")))["manifests"]()
    for name in ("prompts", "sound"):
        assert pq.read_table(example.with_stem(name)).to_pylist() == made[name]


MILLION = """
import sys, time
start = time.perf_counter()
from dailies.model.catalog import CATALOG
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.plan import Plan
plan = Plan.make(Manifest.read(sys.argv[1]), CATALOG["demo"], weights_fingerprint="w" * 64, precision="fp32")
assert plan.summary()["buckets"]
planned_s = time.perf_counter() - start
clips = sum(1 for _ in plan.requests())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))     # since exec, unlike ru_maxrss
print(plan.manifest.table.num_rows, clips, int(peak.split()[1]) * 1024, f"{planned_s:.1f}",
      f"{time.perf_counter() - start:.1f}")
"""


@given(st.lists(st.integers(-3, 40) | st.integers(-2**40, 2**40), min_size=1, max_size=60))
def test_numbers_are_ranked_and_found_first_as_sorting_finds_them(numbers):
    distinct, first, rank = np.unique(np.array(numbers), return_index=True, return_inverse=True)
    assert np.array_equal(ranked(np.array(numbers)), rank) and np.array_equal(first_uses(rank), first)
    assert num_distinct(rank) == len(distinct)


def test_a_million_rows_are_planned_in_two_gigabytes(tmp_path, capsys):
    count, rng = 1_000_000, np.random.default_rng(7)
    words = pa.array(["a", "small", "large", "red", "green", "blue", "circle", "square", "moves", "left", "right",
                      "slowly", "on", "gray", "background"])
    drawn = [words.take(pa.array(rng.integers(0, len(words), count))) for _ in range(12)]
    prompts = pc.binary_join_element_wise(*drawn, " ")
    numbers = pa.array(np.arange(count)).cast(pa.string())
    pq.write_table(pa.table({
        "prompt": prompts, "id": pc.binary_join_element_wise("shot", numbers, "-"),
        "seed": pa.array(rng.integers(0, 2**31, count), mask=rng.random(count) < 0.5),
        "duration_s": rng.choice([2.0, 2.9, 3.0], count), "steps": rng.choice([10, 20], count),
        "priority": rng.integers(0, 3, count), "note": pc.binary_join_element_wise("s3://somewhere", numbers, "/"),
    }), tmp_path / "m.parquet")
    done = subprocess.run([sys.executable, "-c", MILLION, str(tmp_path / "m.parquet")], cwd=ROOT, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows, clips, peak_bytes, planned_s, with_requests_s = done.stdout.split()
    with capsys.disabled():
        print(f"\n1,000,000 rows: planned in {planned_s} s, every Request made in {with_requests_s} s, "
              f"{int(peak_bytes) / 1e9:.2f} GB at most")
    assert (int(rows), int(clips)) == (count, count)
    assert int(peak_bytes) <= 2e9
