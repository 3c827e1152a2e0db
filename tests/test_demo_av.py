"""The world of the demo with sound: what it shows and rings is seen and heard again, and what is wrong of it is too."""

import random
from dataclasses import replace

import pytest
import torch

from dailies.jobs.demo import codecs_av, release_av, train_av
from dailies.jobs.demo.ear import color_heard, onset_s, turn_s
from dailies.jobs.demo.evaluate import render_prompts
from dailies.jobs.demo.evaluate_av import TOLERANCE_S, evaluate_sound, evaluated, through_codecs
from dailies.jobs.demo.world import COLORS, SPEEDS
from dailies.jobs.demo.world_av import AUDIO_RATE, PITCHES, Bounce, tone, unseen_bounces
from dailies.model.ltx2.audio_vae import load_audio_vae
from dailies.model.ltx2.card import DEMO_AV
from dailies.model.ltx2.header import read_ltx_header
from dailies.model.ltx2.text import LtxTextEncoder
from dailies.model.ltx2.video_vae import load_video_vae
from dailies.model.ltx2.vocoder import load_vocoder


def shown(scene):
    """uint8 [frames, 64, 64, 3]"""
    return ((scene.pictures()[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def cases(*, late_s=0.0, color_of=None, count=16):
    for scene, _ in unseen_bounces(count):
        pitch = PITCHES[(color_of or (lambda color: color))(scene.color)]
        loud = scene.sound(scene.samples(AUDIO_RATE), AUDIO_RATE).abs().max().item()
        yield scene, shown(scene), tone(pitch, loud, scene.touch_s + late_s, scene.samples(AUDIO_RATE), AUDIO_RATE).T


def test_a_shape_touches_the_border_once_and_stays_in_the_picture():
    rng = random.Random(4)
    for _ in range(50):
        scene = Bounce.draw(rng, held_out=None)
        _, cover = scene.pictures()
        assert 0.4 < scene.touch_s < 1.45 and scene.touch_s < scene.samples(AUDIO_RATE) / AUDIO_RATE - 0.5
        inside = cover.flatten(1).sum(1)
        assert inside.min() > 0.93 * inside.max(), "no part of it leaves the picture"
        assert abs(turn_s(scene.centres(), scene.direction) - scene.touch_s) < 0.005


def test_what_the_world_does_is_right_in_all_that_is_judged():
    said = evaluated(cases(), AUDIO_RATE)
    assert said["silent"] == 0 and said["onset"] == said["pitch"] == said["loudness"] == said["color"] == 1
    assert max(map(abs, said["late_s_quartiles"])) < 0.02


@pytest.mark.parametrize("late_s, right", [(0.04, 1), (-0.04, 1), (0.09, 0), (-0.09, 0)])
def test_a_tone_that_comes_too_early_or_too_late_is_heard(late_s, right):
    assert TOLERANCE_S == 0.06 and evaluated(cases(late_s=late_s, count=8), AUDIO_RATE)["onset"] == right


def test_a_wrong_pitch_and_silence_are_heard():
    wrong = dict(zip(COLORS, [*COLORS][1:] + [*COLORS][:1], strict=True))
    assert evaluated(cases(color_of=wrong.get, count=8), AUDIO_RATE)["pitch"] == 0
    scene, rgb, _ = next(iter(cases(count=1)))
    for silence in (None, torch.zeros(49_000, 2)):
        said = evaluated([(scene, rgb, silence)], AUDIO_RATE)
        assert said["silent"] == 1 and said["onset"] == said["pitch"] == 0
    assert onset_s(torch.zeros(0, 2), AUDIO_RATE) is None and color_heard(torch.zeros(90, 2), AUDIO_RATE) is None


def test_a_turn_is_found_between_frames():
    frames = torch.arange(49)
    for at in (12.0, 20.3, 33.7):
        centres = torch.stack((50 - 0.8 * (frames - at).abs(), torch.full((49,), 30.0)), dim=1)
        assert abs(turn_s(centres, "right") - at / 24) < 0.003
    assert SPEEDS.keys() == {"slow", "fast"}


@pytest.fixture
def in_a_step(monkeypatch):
    """Every phase is one step of little."""
    for module, name in ((codecs_av, "VIDEO_PHASE"), (codecs_av, "AUDIO_PHASE"), (codecs_av, "VOCODER_PHASE"),
                         (train_av, "GEMMA_PHASE"), (train_av, "AV_PHASE")):
        monkeypatch.setattr(module, name, replace(getattr(module, name), steps=1))
    for module, name in ((codecs_av, "LATENTS_MEASURED"), (codecs_av, "AUDIO_BATCH"), (codecs_av, "VOCODER_BATCH"),
                         (train_av, "GEMMA_BATCH"), (train_av, "AV_CLIPS"), (train_av, "AV_BATCH")):
        monkeypatch.setattr(module, name, 2)
    monkeypatch.setattr(codecs_av, "WINDOWS", dict.fromkeys(codecs_av.WINDOWS, 1))


def test_what_is_trained_is_written_as_a_release_that_loads_by_its_header(in_a_step, tmp_path):
    with pytest.raises(FileNotFoundError, match="audio.pt with all its 1 steps: python -m"):
        next(through_codecs(tmp_path, [], "cpu"))
    audio = codecs_av.train_audio_vae(tmp_path, "cpu")
    vocoder, video = codecs_av.train_vocoder(tmp_path, "cpu", audio), codecs_av.train_video_vae(tmp_path, "cpu")
    said = evaluated(through_codecs(tmp_path, [scene for scene, _ in unseen_bounces(1)], "cpu"), AUDIO_RATE)
    assert said["clips"] == 1 and said.keys() >= {"onset", "pitch", "loudness", "shape"}
    tokenizer = train_av.gemma_tokenizer(tmp_path / "gemma")
    texts = train_av.train_texts(tmp_path, "cpu", tokenizer)
    dit = train_av.train_av(tmp_path, "cpu", video, audio, texts, tokenizer)
    release_av.write_release(tmp_path / "model", dit=dit, video=video, audio=audio, vocoder=vocoder, gemma=texts.gemma,
                             connectors=texts.connectors, tokenizer=tmp_path / "gemma")
    file = tmp_path / "model" / release_av.RELEASE_FILE
    header = read_ltx_header(file, "demo-av")
    assert header.transformer() == release_av.SMALL_TRANSFORMER and header.version == (2, 3, 0)
    assert header.connectors(release_av.SMALL_GEMMA.width) == release_av.SMALL_CONNECTORS
    assert sum(path.stat().st_size for path in (tmp_path / "model").rglob("*.*")) < 10e6
    read = dict(name="demo-av", device="cpu")
    latents = torch.randn(1, 32, 2, 2, 2), torch.randn(1, 2, 3, 16)
    mel = load_audio_vae(file, **read).decode(latents[1])
    for got, want in ((load_video_vae(file, **read, precision="fp32").decode(latents[0]), video.decode(latents[0])),
                      (mel, audio.decode(latents[1])), (load_vocoder(file, **read)(mel), vocoder(mel))):
        got, want = got.detach(), want.detach()
        assert torch.allclose(got, want, atol=0.03 * want.abs().max().item())          # it is stored in bf16
    (made,) = render_prompts(["a small red circle moves left"], DEMO_AV, tmp_path / "model", "cpu",
                              num_steps=2)
    assert list(made.rgb.shape) == [49, 64, 64, 3] and list(made.audio.shape) == [201 * 240, 2]
    reader = LtxTextEncoder(tmp_path / "model" / "gemma", file, length=release_av.CONTEXT_ROWS, precision="fp32",
                            **read)
    said = reader.encode("A small red circle moves left quickly on a gray background")
    assert {name: list(rows.shape) for name, rows in said.items()} == {"video": [40, 128], "audio": [40, 64]}
    picture, _ = texts.contexts([tokenizer.ids("A small red circle moves left quickly on a gray background")])
    assert torch.allclose(said["video"], picture[0].detach(), atol=0.05)


# The model that is shipped.

def test_of_a_few_unseen_prompts_the_touch_is_heard_in_its_pitch():
    """evaluate_av asks 100; a few here keep a broken model or sampler from passing: by chance a pitch is 1 of 6."""
    said = evaluate_sound(6)
    assert said["silent"] == 0 and said["pitch"] >= 0.6 and said["onset"] >= 0.6, said


@pytest.mark.slow
def test_of_a_hundred_unseen_prompts_as_many_are_right_as_docs_say():
    said = evaluate_sound(100)
    assert said["onset"] >= 0.8 and said["pitch"] >= 0.9 and said["loudness"] >= 0.95, said
