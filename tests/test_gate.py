"""The gate: what nobody would want to look at is refused, what somebody may have asked for passes."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from dailies.actors.clip_writer import BadEncoding, check_encoding, write_mp4
from dailies.actors.gate import Gate
from dailies.actors.messages import Failure, Frames
from dailies.jobs.bench.pretend import pretend_request
from dailies.model.shapes import VideoShape

COUNT, HEIGHT, WIDTH = 13, 48, 64


def frames(rgb, audio=None, count=COUNT):
    request = replace(pretend_request(7), shape=VideoShape(frames=count, height=HEIGHT, width=WIDTH))
    return Frames(request=request, rgb=torch.from_numpy(np.ascontiguousarray(rgb)),
                  audio=None if audio is None else torch.from_numpy(np.float32(audio)))


def scene(seed=1, *, level=128, spread=40, jitter=1):
    """A still picture as a model gives it: soft shapes that never move, each frame rounded a little differently."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.normal(level, spread, (1, 3, 6, 8)))
    still = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(still + rng.normal(0, jitter, (COUNT, HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)


def with_stars(dark):
    dark[:, 5:45:10, 5:60:10] = 120
    return dark


def flash(picture, places):
    picture = picture.astype(np.int16)
    picture[places] += 90
    return picture.clip(0, 255).astype(np.uint8)


def cut(picture):
    return np.concatenate((picture[:6], scene(9, level=40)[6:]))


def faded(picture):
    return (picture * np.linspace(0, 1, COUNT)[:, None, None, None]).astype(np.uint8)


@pytest.mark.parametrize("rgb", [
    scene(), scene(jitter=0.3), scene(level=30, spread=8), scene(level=245, spread=4),
    with_stars(scene(level=3, spread=1)), cut(scene()), faded(scene()), flash(scene(), [6]), flash(scene(), [3, 7, 11]),
    scene(spread=3)],
    ids=["still", "very still", "dark", "bright", "stars in the night", "a cut", "a fade from black", "one flash",
         "lightning", "fog"])
def test_what_may_have_been_asked_for_passes(rgb):
    (passed,) = Gate()([frames(rgb)])
    assert isinstance(passed, Frames) and passed.quality["verdict"] == "ok"
    assert passed.rgb is not None and passed.quality["contrast"] > 1


@pytest.mark.parametrize("rgb, verdict, why", [
    (np.zeros((COUNT, HEIGHT, WIDTH, 3), np.uint8), "black", "every frame is black"),
    (scene(level=4, spread=1), "black", "at most 16 of 255"),
    (np.full((COUNT, HEIGHT, WIDTH, 3), (90, 127, 10), np.uint8), "flat", r"one colour, \[90, 127, 10\]"),
    (np.repeat(scene()[:1], COUNT, 0), "frozen", "all 13 frames are equal in every pixel"),
    (flash(scene(), np.arange(0, COUNT, 2)), "flicker", "half of the frames differ from both neighbours by 8"),
    (scene()[:-1], "size", r"frames must be \[13, 48, 64, 3\], as the request says; got \[12, 48, 64, 3\]"),
    (scene()[:, :-8], "size", r"got \[13, 40, 64, 3\]"),
])
def test_what_nobody_wants_to_look_at_is_refused(rgb, verdict, why):
    (failure,) = Gate()([frames(rgb)])
    assert isinstance(failure, Failure) and failure.error_type == "Rejected" and failure.quality["verdict"] == verdict
    assert failure.error.startswith(f"{verdict}: ")
    assert re.search(why, failure.error)


def test_two_colours_of_one_brightness_are_not_flat():
    rgb = np.zeros((COUNT, HEIGHT, WIDTH, 3), np.uint8)
    rgb[:, :, :32], rgb[:, :, 32:] = (200, 30, 30), (30, 80, 30)
    rgb[1:, 0, 0] += 1
    assert Gate()([frames(rgb)])[0].quality["verdict"] == "ok"


def test_a_single_frame_is_neither_frozen_nor_flickering():
    assert Gate()([frames(scene()[:1], count=1)])[0].quality["verdict"] == "ok"


TONE = np.sin(np.linspace(0, 900, 24_000))[:, None] * [1, 1]


@pytest.mark.parametrize("audio, verdict", [
    (0.3 * TONE, "ok"), (0.001 * TONE, "ok"), (TONE, "ok"),
    (0 * TONE, "silent"), (1e-5 * TONE, "silent"), (np.clip(3 * TONE, -1, 1), "clipped"), (TONE * np.nan, "nan")])
def test_sound_is_neither_silent_nor_clipped(audio, verdict):
    (value,) = Gate()([frames(scene(), audio)])
    assert value.quality["verdict"] == verdict
    assert isinstance(value, Frames) == (verdict == "ok")


# What was encoded is decoded again.

def moving():
    rgb = scene()
    for place in range(COUNT):
        rgb[place, 10:30, 4 * place:4 * place + 16] = (250, 240, 20)
    return rgb


def test_an_encoded_clip_shows_the_frames_it_was_made_from(tmp_path):
    clip = frames(moving())
    write_mp4(tmp_path / "clip.mp4", clip, 48_000)
    assert check_encoding(tmp_path / "clip.mp4", clip) > 30
    noise = frames(np.random.default_rng(1).integers(0, 256, (COUNT, HEIGHT, WIDTH, 3), np.uint8))
    write_mp4(tmp_path / "noise.mp4", noise, 48_000)
    assert check_encoding(tmp_path / "noise.mp4", noise) > 22


@pytest.mark.parametrize("spoil, message", [
    (lambda rgb: np.roll(rgb, 1, axis=0), "the worst has"), (lambda rgb: rgb[::-1], "the worst has"),
    (lambda rgb: rgb[:, ::-1], "the worst has"), (lambda rgb: rgb[:12], "must have 12 frames; decoded again it has 13"),
    (lambda rgb: np.concatenate((rgb, rgb)), "must have 26 frames"),
])
def test_an_encoded_clip_that_shows_something_else_is_found_out(spoil, message, tmp_path):
    write_mp4(tmp_path / "clip.mp4", frames(moving()), 48_000)
    with pytest.raises(BadEncoding, match=message):
        check_encoding(tmp_path / "clip.mp4", frames(spoil(moving())))


def test_a_damaged_file_is_found_out(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, frames(moving()), 48_000)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(BadEncoding):
        check_encoding(path, frames(moving()))
