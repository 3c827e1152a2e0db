"""dailies bench clip: each stage of one clip, of shipped models and of random weights in published layouts."""

from dataclasses import replace

import pytest

from jobs import bench_clip
from jobs.cli import main
from model.catalog import CATALOG, DEMO
from turbo_tiny import TURBO_TINY
from wan_tiny import WAN_TINY, WAN_TINY_I2V


@pytest.mark.parametrize("card", [
    replace(WAN_TINY, text_encoder_fields=WAN_TINY.text_encoder_fields | dict(vocab_size=400)),
    replace(TURBO_TINY, text_encoder_fields=TURBO_TINY.text_encoder_fields | dict(vocab_size=400)),
    replace(DEMO, name="linum-tiny", folder=None, dit_file="dit/tiny.safetensors", num_steps=2)], ids=lambda c: c.name)
def test_random_weights_load_and_every_stage_is_timed(card, monkeypatch):
    monkeypatch.setitem(CATALOG, card.name, card)
    monkeypatch.setitem(bench_clip.T5_XXL, "num_layers", 1)
    monkeypatch.setattr(bench_clip, "CLIPS", 1)
    found = list(bench_clip.rows(card.name, random_weights=True))
    assert [name.split(", ")[3] for name, _ in found] == ["fp32", "int8"]
    for name, figures in found:
        assert name.startswith(card.name) and figures["clips an hour"] > 0
        assert all(figures[f"{stage} s"] > 0 for stage in ("encode", "sample", "decode", "mp4"))


@pytest.mark.parametrize("arguments, said", [
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
