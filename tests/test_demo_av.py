"""The world of the demo with sound: what it shows and rings is seen and heard again, and what is wrong of it is too."""

import random

import pytest
import torch

from dailies.jobs.demo.ear import color_heard, onset_s, turn_s
from dailies.jobs.demo.evaluate_av import TOLERANCE_S, evaluated
from dailies.jobs.demo.world import COLORS, SPEEDS
from dailies.jobs.demo.world_av import AUDIO_RATE, PITCHES, Bounce, tone, unseen_bounces


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
