"""The demo's world and its checker: what is drawn is read back, and a sentence says all that can be read."""

import random
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from dailies.jobs.demo.checker import follow, read_attributes
from dailies.jobs.demo.world import ATTRIBUTE_WORDS, ATTRIBUTES, SIDE, Scene, sentence_about
from dailies.model.catalog import CATALOG


def to_uint8(video):
    return ((video + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 3, 0)


def wrong_attributes(make, count, seed):
    """How often each attribute is misread over `count` scenes, each drawn and then changed by `make`."""
    rng, wrong = random.Random(seed), Counter()
    for _ in range(count):
        scene = Scene.draw(rng, held_out=None)
        video, _ = scene.render(49)
        seen = read_attributes(to_uint8(make(video)))
        wrong.update(name for name, value in scene.attributes.items() if seen[name] != value)
    return wrong


def test_checker_reads_every_attribute_of_drawn_clips():
    assert wrong_attributes(lambda video: video, 80, seed=1) == {}


def test_checker_reads_blurred_noisy_clips():
    def spoil(video):
        blurred = F.avg_pool2d(video.transpose(0, 1), 3, stride=1, padding=1, count_include_pad=False).transpose(0, 1)
        return blurred + 0.06 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    assert sum(wrong_attributes(spoil, 40, seed=2).values()) <= 40 * 6 * 0.02


def test_checker_is_not_fooled_by_the_answer_it_did_not_see():
    rng = random.Random(3)
    scene = Scene.draw(rng)
    video, _ = scene.render(49)
    backwards = read_attributes(to_uint8(video.flip(1)))
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    assert backwards["direction"] == opposite[scene.direction]
    assert {k: v for k, v in backwards.items() if k != "direction"} == {
        k: v for k, v in scene.attributes.items() if k != "direction"}


def test_a_drawn_shape_is_followed_in_every_frame():
    rng = random.Random(8)
    for _ in range(40):
        scene = Scene.draw(rng, held_out=None)
        track = follow(to_uint8(scene.render(49)[0]), scene.shape)
        assert track.colors == (scene.color,) * 49
        assert track.iou.min() > 0.88 and track.strayed.max() < 0.5, (scene, track.iou.min())


def test_a_shape_that_changes_on_the_way_is_seen_where_it_does():
    rng = random.Random(9)
    scene = Scene.draw(rng)
    others = dict(shape="cross" if scene.shape != "cross" else "circle",
                  color="blue" if scene.color != "blue" else "red")
    changed = Scene(**{**scene.attributes, **others}, variation=scene.variation)
    clip = torch.cat((to_uint8(scene.render(49)[0])[:37], to_uint8(changed.render(49)[0])[37:]))
    track = follow(clip, scene.shape)
    assert track.colors == (scene.color,) * 37 + (others["color"],) * 12
    assert track.iou[:37].min() > 0.88 and track.iou[37:].max() < 0.8
    nothing = clip.clone()
    nothing[20:] = nothing[0, 0, 0]
    assert follow(nothing, scene.shape).colors[20:] == ("",) * 29 and not follow(nothing, scene.shape).iou[20:].any()


@pytest.mark.parametrize("frames", [25, 49])
def test_a_shape_stays_inside_the_picture(frames):
    rng = random.Random(4)
    for _ in range(60):
        scene = Scene.draw(rng, held_out=None)
        _, coverage = scene.render(frames)
        edge = torch.cat((coverage[:, 0], coverage[:, -1], coverage[:, :, 0], coverage[:, :, -1]), dim=1)
        assert coverage.shape == (frames, SIDE, SIDE) and edge.max() < 1e-3


def test_a_part_of_a_clip_equals_the_clip():
    scene = Scene.draw(random.Random(5))
    assert torch.equal(scene.render(49)[0][:, 10:19], scene.render(9, start=10, total=49)[0])


def test_complete_sentences_name_every_attribute_and_training_never_sees_held_out_combinations():
    rng = random.Random(6)
    for _ in range(500):
        scene = Scene.draw(rng)
        assert not scene.held_out
        sentence = sentence_about(scene, rng)
        for value in scene.attributes.values():
            assert any(word in sentence for word in ATTRIBUTE_WORDS.get(value, (value,))), (value, sentence)
    assert Scene.draw(rng, held_out=True).held_out
    assert set(ATTRIBUTES) == set(scene.attributes)


def test_the_card_knows_all_words_of_the_world_and_no_others():
    rng, words = random.Random(11), set()
    for still in (False, True):
        for held_out in (False, True, None):
            for _ in range(1500):
                sentence = sentence_about(Scene.draw(rng, held_out=held_out), rng, still=still)
                words.update(re.findall(r"[^\W\d_]+", sentence.lower()))
    assert CATALOG["demo"].words == CATALOG["demo-turbo"].words == CATALOG["demo-av"].words == words
