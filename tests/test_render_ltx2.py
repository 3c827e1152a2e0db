"""Manifests rendered by tiny LTX-2 models in the published single-file layout: clips with sound, of text and images."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from gemma_tiny import gemma_folder
from golden import Golden
from image_files import png
from ltx2_tiny import CARDS, LTX_SMALL, LTX_TINY, LTX_TINY_DISTILLED, LTX_TINY_TWO_STAGE, write_small, write_weights
from one_process import main

from dailies.actors.denoiser import Denoiser
from dailies.actors.device_lock import Halted
from dailies.actors.image_encoder import ImageTextEncoder
from dailies.model import checkpoint
from dailies.model.catalog import CATALOG
from dailies.model.family import family_of
from dailies.model.ltx2.refine import SecondStage
from dailies.model.weights import fingerprint, weights_files
from dailies.pipeline.manifest.manifest import Manifest
from dailies.pipeline.plan import Plan
from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import SAVED_STEPS, clip_key
from dailies.pipeline.stages import Worker
from dailies.pipeline.store import open_store
from dailies.pipeline.text_to_video import text_to_video

torch.set_num_threads(1)
ROWS = [{"id": "text", "prompt": "a red fox", "frames": 9},
        {"id": "image", "prompt": "it moves", "frames": 9, "image": "a.png"},
        {"id": "silent", "prompt": "a red fox", "frames": 9, "audio": False},
        {"id": "longer", "prompt": "a red fox", "frames": 17, "stg": 0, "audio_guidance": 1, "modality_guidance": 1}]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders with weights, by the model's name."""
    made = {card.name: tmp_path_factory.mktemp(card.name) for card in CARDS}
    for card in CARDS:
        write_weights(made[card.name], card)
    return made


@pytest.fixture(autouse=True)
def in_catalogue(monkeypatch):
    for card in CARDS:
        monkeypatch.setitem(CATALOG, card.name, card)


def manifest(folder, rows):
    path = folder / "night.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.png").write_bytes(png())
    return path


def command(path, out, name, weights, *options):
    return ["render", str(path), "--out", str(out), "--model", name, "--weights", str(weights), "--device", "cpu",
            *options]


def rows_of(out):
    return {row["id"]: row for row in ledger.read(open_store(str(out))).to_pylist()}


def test_text_and_images_become_clips_with_sound_and_a_row_may_want_none(weights, tmp_path, capsys):
    path = manifest(tmp_path, ROWS)
    assert main(command(path, tmp_path / "out", "ltx-tiny", weights["ltx-tiny"], "--json")) == 0, capsys.readouterr()
    rows = rows_of(tmp_path / "out")
    assert {row["status"] for row in rows.values()} == {"done"}
    assert len({row["sha256"] for row in rows.values()}) == 4
    for name, row in rows.items():
        assert row["has_audio"] is (name != "silent") and row["audio"] is (name != "silent")
        assert (row["guidance"], row["video_guidance"], row["fps"]) == (3.0, 3.0, 24.0)
        with av.open(io.BytesIO((tmp_path / "out" / clip_key(row["clip_id"])).read_bytes())) as clip:
            assert (clip.streams.video[0].width, clip.streams.video[0].height) == (64, 32)
            if name == "silent":
                assert not clip.streams.audio
            else:                                       # as loud as random weights are, and no silence
                sound = np.concatenate([frame.to_ndarray() for frame in clip.decode(audio=0)], axis=1)
                assert clip.streams.audio[0].rate == 48_000 and np.abs(sound).max() > 0.01
    assert (rows["longer"]["stg"], rows["longer"]["audio_guidance"], rows["text"]["modality_guidance"]) == (0, 1, 3)
    assert main(command(path, tmp_path / "out", "ltx-tiny", weights["ltx-tiny"], "--json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rendered"] == 0


def test_a_run_of_silent_rows_loads_nothing_of_sound_and_makes_the_same_clip(weights, tmp_path, capsys):
    alone, mixed = (manifest(tmp_path, rows) for rows in (ROWS[2:3], ROWS[1:3]))
    path = manifest(tmp_path, ROWS[2:3])
    assert main(command(path, tmp_path / "alone", "ltx-tiny", weights["ltx-tiny"])) == 0, capsys.readouterr()
    path = manifest(tmp_path, ROWS[1:3])
    assert main(command(path, tmp_path / "mixed", "ltx-tiny", weights["ltx-tiny"])) == 0
    one, other = (rows_of(tmp_path / out)["silent"] for out in ("alone", "mixed"))
    assert (one["clip_id"], one["sha256"]) == (other["clip_id"], other["sha256"]) and alone == mixed
    card = LTX_TINY.without_sound()
    sampler = family_of(card).load_sampler(card, weights["ltx-tiny"], card.runtime())
    assert not [name for name, _ in sampler.dit.named_parameters() if "audio" in name]


def test_four_processes_make_the_bytes_that_one_makes_of_text_and_of_images_with_their_sound(weights, tmp_path, capsys):
    """`dailies render` on Ray: no process holds more than two clips, so of eight each of the four makes two."""
    rows = [{"id": str(n), "prompt": ("a red fox", "it moves")[n % 2], "frames": 9, "seed": n,
             **({"image": "a.png"} if n % 2 else {})} for n in range(8)]
    path, outs = manifest(tmp_path, rows), [tmp_path / name for name in ("one", "four")]
    shutil.copytree(weights["ltx-tiny"], folder := tmp_path / "weights")
    one, four = (command(path, out, "ltx-tiny", folder, "--steps", "1") for out in outs)
    assert main(one) == 0, capsys.readouterr()
    done = subprocess.run([sys.executable, Path(__file__).parent / "ltx2_tiny.py", "--four", *four],
                          capture_output=True, text=True, timeout=400,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})     # this dailies
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(list((folder / "at-work").iterdir())) == 4
    one, four = ({row["id"]: (row["clip_id"], row["sha256"], row["has_audio"]) for row in rows_of(out).values()}
                 for out in outs)
    assert one == four and len(set(one.values())) == 8 and all(sound for *_, sound in one.values())
    for row in rows_of(outs[1]).values():
        assert (hashlib.sha256((outs[1] / clip_key(row["clip_id"])).read_bytes()).hexdigest() == row["sha256"])


def plan_of(card, folder, rows, weights):
    return Plan.make(Manifest.read(str(manifest(folder, rows))), card, precision="fp32",
                     weights_fingerprint=fingerprint(weights_files(card, weights)))


def embedded(card, folder, rows, weights):
    read = ImageTextEncoder(card, weights, read=lambda uri: (folder / "a.png").read_bytes())
    return read(list(plan_of(card, folder, rows, weights).requests()))


@pytest.mark.parametrize("card", [LTX_TINY, LTX_TINY_TWO_STAGE], ids=lambda card: card.name)
def test_a_clip_is_the_same_to_the_last_bit_alone_and_in_a_batch_from_one_worker_or_from_four(card, weights, tmp_path):
    rows = [{"id": str(n), "prompt": ("a red fox", "snow")[n % 2], "frames": 9, "seed": n,
             **({"image": "a.png"} if n == 3 else {})} for n in range(4)]
    clips = embedded(card, tmp_path, rows, weights[card.name])
    together = Denoiser(card, weights[card.name])(clips)
    for clip, want in zip(clips, together, strict=True):
        alone, = Denoiser(card, weights[card.name])([clip])
        for stream, x in want.streams.items():
            assert torch.equal(alone.streams[stream], x)
    assert len({float(latent.streams["audio"].sum()) for latent in together}) == 4


OF_DISTILLED = ("distilled", "num_steps", "min_steps", "max_steps", "guidance", "max_guidance", "settings")
DISTILLED_TWO_STAGE = replace(LTX_TINY_TWO_STAGE, lora=None,
                              **{name: getattr(LTX_TINY_DISTILLED, name) for name in OF_DISTILLED})


@pytest.mark.parametrize("card", [LTX_TINY, LTX_TINY_DISTILLED, LTX_TINY_TWO_STAGE, DISTILLED_TWO_STAGE,
                                  replace(LTX_TINY_DISTILLED, solver="ancestral"), replace(LTX_TINY, solver="res_2s")],
                         ids=lambda card: f"{card.name}-{card.solver}{'-distilled' * card.distilled}")
def test_a_clip_that_is_halted_after_any_step_goes_on_to_the_same_bytes_of_both_streams(card, weights, tmp_path):
    """Of two stages after steps of the second too, and between them."""
    folder, steps = weights[card.name], card.num_steps + card.further_steps
    plan = plan_of(card, tmp_path, ROWS[1:2], folder)
    first, = plan.requests()

    def stages(name):
        return text_to_video(card, str(folder), open_store(str(tmp_path / name)), card.runtime(), keep_latents=True)
    straight, halted = (open_store(str(tmp_path / name)) for name in ("straight", "halted"))
    for name in ("straight", "halted"):
        values, _ = Worker("encode", stages(name)[0].steps, 1)([first])
        if name == "straight":
            Worker("sample", stages(name)[1].steps, 1)(values)
    done = 0
    for step in range(1, steps) if card.num_steps < 5 else sorted({1, card.num_steps - 1, steps - 1}):
        asked, halts_at = count(), step - done          # each is begun where the one before was saved
        with pytest.raises(Halted, match=f"stopped after step {step} of {steps}"):
            Worker("sample", stages("halted")[1].steps, 1,
                   halted=lambda asked=asked, halts_at=halts_at: next(asked) == halts_at)(values)
        (saved,), done = halted.list(f"{SAVED_STEPS}/"), step
        beside = {"1.audio"} if step > card.num_steps and not card.distilled else set()     # of the first stage
        assert set(checkpoint.unpack(halted.get(saved.key))[0]) == {"0.video", "0.audio"} | beside
    made, _ = Worker("sample", stages("halted")[1].steps, 1)(values)
    assert not hasattr(made[0], "error"), made[0].error
    want, got = ({info.key: store.get(info.key) for info in store.list("latents/")} for store in (straight, halted))
    assert want == got and len(want) == 1


def test_the_second_stage_leaves_the_weights_as_they_were_to_the_last_bit(weights):
    card = LTX_TINY_TWO_STAGE
    sampler = family_of(card).load_sampler(card, weights[card.name], card.runtime())
    refining = sampler.refiner.refining
    assert isinstance(refining, SecondStage) and refining.layers
    before = {name: weight.clone() for name, weight in sampler.dit.named_parameters()}
    with refining():
        changed = [name for name, weight in sampler.dit.named_parameters() if not torch.equal(weight, before[name])]
    assert sorted(changed) == sorted(f"{place}.weight" for place in refining.layers)
    assert all(torch.equal(weight, before[name]) for name, weight in sampler.dit.named_parameters())


@pytest.mark.parametrize("precision, attention", [("int8", "sage"), ("bf16", "sparse")])
def test_what_makes_other_models_fast_is_chosen_by_the_same_options(precision, attention, tmp_path, monkeypatch,
                                                                    capsys):
    monkeypatch.setitem(CATALOG, LTX_SMALL.name, LTX_SMALL)
    write_small(tmp_path / "weights")
    path, out = manifest(tmp_path, ROWS[:1]), tmp_path / "out"
    options = ("--precision", precision, "--attention", attention)
    assert main(command(path, out, LTX_SMALL.name, tmp_path / "weights", *options)) == 0, rows_of(out)
    row, = rows_of(out).values()
    assert (row["status"], row["precision"], row["attention"], row["has_audio"]) == ("done", precision, attention, True)


def refused(arguments, out, capsys):
    """What is said, of a command that ends with 2 and writes nothing; and of the plan of it."""
    heard = []
    for what in ("plan", "render"):
        assert main([what, *arguments[1:]]) == 2
        heard.append(capsys.readouterr().err)
        assert not out.exists() and "Traceback" not in heard[-1]
    assert heard[0] == heard[1]
    return heard[1]


def test_a_vocoder_of_another_rate_than_is_planned_is_told_of_before_anything_is_sampled(weights, tmp_path, monkeypatch,
                                                                                         capsys):
    monkeypatch.setitem(CATALOG, LTX_TINY.name, replace(LTX_TINY, audio_rate=24_000))
    path, out = manifest(tmp_path, ROWS[:1]), tmp_path / "out"
    assert ("makes sound of 48,000 samples per second, where 24,000 are planned"
            in refused(command(path, out, LTX_TINY.name, weights[LTX_TINY.name]), out, capsys))


def test_what_cannot_be_rendered_is_one_message_and_nothing_is_written(weights, tmp_path, capsys):
    path, out = manifest(tmp_path, ROWS[:1]), tmp_path / "out"

    def say(name, folder, *options, at=path):
        return refused(command(at, out, name, folder, *options), out, capsys)

    def copied(name, model="ltx-tiny"):
        shutil.copytree(weights[model], tmp_path / name)
        return tmp_path / name
    lora = copied("lora", "ltx-tiny-distilled")
    shutil.copy(weights["ltx-tiny-two-stage"] / LTX_TINY_TWO_STAGE.lora, lora)
    assert "which is for the dev weights" in say("ltx-tiny-distilled", lora)
    assert "precision fp8 computes in FP8, which takes a GPU" in say("ltx-tiny", weights["ltx-tiny"], "--precision",
                                                                     "fp8")
    no_gemma = copied("no-gemma")
    shutil.rmtree(no_gemma / LTX_TINY.text_folder)
    said = say("ltx-tiny", no_gemma)
    assert f"lacks {LTX_TINY.text_folder}/config.json" in said
    wide = copied("wide")
    shutil.rmtree(wide / LTX_TINY.text_folder)
    gemma_folder(Golden("ltx2_i2v_a"), wide / LTX_TINY.text_folder, hidden_size=32)
    assert "not the hidden states of a text encoder of width 32" in say("ltx-tiny", wide)
    other = copied("other-lora", "ltx-tiny-two-stage")
    tensors, _ = checkpoint.unpack((other / LTX_TINY_TWO_STAGE.lora).read_bytes())
    checkpoint.save(other / LTX_TINY_TWO_STAGE.lora, {name.replace("blocks.0.", "blocks.7."): tensor
                                                      for name, tensor in tensors.items()})
    assert "of its" in (said := say("ltx-tiny-two-stage", other)) and "Is it a LoRA of another model" in said
    uneven = manifest(tmp_path, [ROWS[0] | {"frames": 10}])
    assert "allowed: 8n + 1 for ltx-tiny (nearest: 9 or 17)" in say("ltx-tiny", weights["ltx-tiny"], at=uneven)
    loud = manifest(tmp_path, [ROWS[0] | {"audio": True, "frames": 25}])
    said = refused(["render", str(loud), "--out", str(out)], out, capsys)
    assert "audio: got True; allowed: nothing or false: demo makes no sound" in said
    steps = manifest(tmp_path, [ROWS[0] | {"steps": 4}])
    assert "at least 8 for ltx-tiny-distilled" in say("ltx-tiny-distilled", weights["ltx-tiny-distilled"], at=steps)
