"""dailies bench clip: each stage of one clip, of shipped models and of random weights."""

import json
from dataclasses import replace

import pytest
from golden import Golden
from ltx2_tiny import LTX_TINY, LTX_TINY_TWO_STAGE
from turbo_tiny import TURBO_TINY
from wan_tiny import WAN_TINY, WAN_TINY_I2V

from dailies.jobs.bench import clip as bench_clip
from dailies.jobs.bench import clip_ltx2
from dailies.jobs.cli import main
from dailies.jobs.gpu import models
from dailies.model import checkpoint
from dailies.model.catalog import CATALOG, DEMO
from dailies.model.ltx2.audio_vae import audio_vae_config
from dailies.model.ltx2.gemma import gemma_config
from dailies.model.ltx2.header import read_ltx_header
from dailies.model.ltx2.upsampler import upsampler_config
from dailies.model.ltx2.video_vae import video_vae_config
from dailies.model.ltx2.vocoder import vocoder_config


@pytest.mark.parametrize("card", [
    replace(WAN_TINY, text_encoder_fields=WAN_TINY.text_encoder_fields | dict(vocab_size=400)),
    replace(TURBO_TINY, text_encoder_fields=TURBO_TINY.text_encoder_fields | dict(vocab_size=400)),
    replace(DEMO, name="linum-tiny", folder=None, dit_file="dit/tiny.safetensors", num_steps=2)], ids=lambda c: c.name)
def test_random_weights_are_made_and_every_stage_is_timed(card, monkeypatch):
    monkeypatch.setitem(CATALOG, card.name, card)
    monkeypatch.setitem(bench_clip.T5_XXL, "num_layers", 1)
    monkeypatch.setattr(bench_clip, "_CLIPS", 1)
    found = list(bench_clip.rows(card.name, random_weights=True))
    assert [name.split(", ")[3] for name, _ in found] == ["fp32", "int8"]
    for name, figures in found:
        assert name.startswith(card.name) and figures["clips an hour"] > 0
        assert all(figures[f"{stage} s"] > 0 for stage in ("encode", "sample", "decode", "mp4"))


@pytest.mark.parametrize("card, way", [(LTX_TINY, "int8:dense"), (LTX_TINY_TWO_STAGE, "fp32:dense")],
                         ids=lambda each: getattr(each, "name", ""))
def test_of_ltx2_every_part_is_made_up_and_every_stage_is_timed_with_its_sound(card, way, monkeypatch):
    golden = Golden("ltx2_i2v_a")
    path, said = golden.folder / "weights.safetensors", golden.folder / "weights_text_encoder.safetensors"
    gemma = gemma_config(json.loads(checkpoint.unpack(said.read_bytes())[1]["config"]), "golden")
    header = read_ltx_header(path, "golden")
    upsampler = upsampler_config(Golden("ltx2_two_stage_a").folder / "weights_upsampler.safetensors", "golden")
    sizes = clip_ltx2.LtxSizes(dit=header.transformer(), connectors=header.connectors(gemma.width), gemma=gemma,
                            vae=video_vae_config(path, "golden"), audio_vae=audio_vae_config(path, "golden"),
                            vocoder=vocoder_config(path, "golden"), upsampler=upsampler)
    monkeypatch.setattr(clip_ltx2, "sizes_of", lambda card: sizes)
    monkeypatch.setitem(CATALOG, card.name, card)
    monkeypatch.setattr(bench_clip, "_CLIPS", 1)
    (name, figures), = bench_clip.rows(card.name, random_weights=True, frames=9, steps=1, ways=way)
    assert name.startswith(f"{card.name}, ") and name.endswith(f"x9, 1 steps, {way.replace(':', ', ')} attention")
    assert all(figures.get(f"{stage} s", 0) > 0 for stage in ("encode", "sample", "decode", "mp4")), figures


def test_a_model_that_no_cpu_here_has_memory_for_is_refused_before_anything_is_made(monkeypatch, capsys):
    monkeypatch.setattr(clip_ltx2, "free_memory", lambda: 16e9)
    assert main(["bench", "clip", "ltx-2-19b-distilled", "--random-weights"]) == 2
    said = capsys.readouterr().err
    assert "ltx-2-19b-distilled in fp32 takes about 127 GB, with its text encoder, and 16 are free" in said
    assert clip_ltx2.sizes_of(CATALOG["ltx-2-19b"]).vocoder.sample_rate == CATALOG["ltx-2-19b"].audio_rate
    assert clip_ltx2.sizes_of(CATALOG["ltx-2.3"]).vocoder.sample_rate == CATALOG["ltx-2.3"].audio_rate


def test_the_ways_and_the_clip_can_be_chosen(monkeypatch):
    monkeypatch.setattr(bench_clip, "_CLIPS", 1)
    chosen = dict(ways="bf16:sparse,int8:sage", steps=2, frames=9, size="64x32")
    found = list(bench_clip.rows("demo", random_weights=False, **chosen))
    assert [name for name, _ in found] == [
        "demo, 64x32x9, 2 steps, bf16, sparse attention", "demo, 64x32x9, 2 steps, int8, sage attention"]
    assert all(figures["sample s"] > 0 for _, figures in found)


def test_encoder_and_decoder_are_loaded_once_for_the_ways_of_one_precision(monkeypatch):
    made = []
    for actor in ("TextEncoder", "Decoder"):
        monkeypatch.setattr(bench_clip, actor, lambda *_, name=actor, real=getattr(bench_clip, actor), **options: (
            made.append((name, options["on"].precision)) or real(**options)))
    monkeypatch.setattr(bench_clip, "_CLIPS", 1)
    list(bench_clip.rows("demo", random_weights=True, ways="fp32:dense,bf16:dense,int8:dense", steps=1, frames=5))
    assert made == [(actor, precision) for precision in ("fp32", "bf16") for actor in ("TextEncoder", "Decoder")]


def test_a_way_that_fails_costs_its_line(monkeypatch):
    def fail(self, *_, **__):
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(bench_clip, "_CLIPS", 1)
    monkeypatch.setattr(bench_clip.RandomParts, "load_dit", lambda self, card, weights, on: (
        fail(self) if on.precision == "bf16" else models.new_dit(card, on.device, on.precision, on.attention)))
    (_, first), (_, second) = bench_clip.rows("demo", random_weights=True, ways="bf16:dense,int8:dense", steps=1)
    assert first == {"failed": "RuntimeError: no room\nfor it"} and second["sample s"] > 0


@pytest.mark.parametrize("arguments, said", [
    (["clip", "demo-av", "--random-weights"], "weights of its own: leave --random-weights out"),
    (["clip", "demo", "--ways", "int8"], "PRECISION:ATTENTION or PRECISION:ATTENTION:compiled"),
    (["clip", "demo", "--ways", "fp8:dense"], "of bf16, fp32, int8 and dense, sage, sparse; got 'fp8:dense'"),
    (["clip", "demo", "--frames", "1000"], "frames must be 1 to"),
    (["clip", "demo", "--size", "63x64"], "width must be a multiple of"),
    (["clip", "demo-turbo", "--steps", "5"], "1 to 4 steps; got 5"),
    (["clip", "--steps", "5"], "--steps is of a clip of a model: dailies bench clip NAME"),
    (["model", "wan2.1-t2v-1.3b", "--random-weights", "--ways", "int8:dense"], "--ways is of a clip of a model"),
    (["clip", "wan2.1-t2v-1.3b"], "say --random-weights"),
    (["clip", "--random-weights"], "dailies bench clip NAME --random-weights"),
    (["clip", "nothing"], "no model is called 'nothing'"),
    (["pipeline", "demo"], "a model is named for: model, clip"),
    (["model", "wan2.1-t2v-1.3b"], "dailies bench model NAME --random-weights")])
def test_what_cannot_be_timed_is_refused(arguments, said, capsys):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_model_that_needs_an_image_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(CATALOG, WAN_TINY_I2V.name, WAN_TINY_I2V)
    assert main(["bench", "clip", WAN_TINY_I2V.name, "--random-weights"]) == 2
    assert "needs an image" in capsys.readouterr().err
