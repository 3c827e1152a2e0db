"""GPUs that are never idle: the real driver and placement, on pretended GPUs in simulated time, and a little in Ray."""

import pytest

from dailies.jobs.bench import gpu_shapes
from dailies.jobs.bench.gpu_shapes import BOXES, CLIPS_PER_GPU, SHAPES, box, in_ray, pipeline, simulate
from dailies.pipeline.scheduler.forecast import forecast
from dailies.pipeline.scheduler.placement import InsufficientCapacity, Node, Placement, most_per_s, scale_up
from dailies.pipeline.stages import Stage


@pytest.mark.parametrize("gpus", BOXES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_samplers_and_decoders_keep_every_gpu_busy_and_the_forecast_says_when_they_are_done(shape, gpus):
    """In simulated time: shares and seconds are decisions, not timings."""
    found = simulate(shape, gpus, CLIPS_PER_GPU[shape.name] * gpus)
    assert found["busy"] >= 0.95, found
    assert found["foretold_seconds"] == pytest.approx(found["seconds"], rel=0.05), found
    assert found["foretold_clips_per_hour"] == pytest.approx(found["clips_per_hour"], rel=0.05), found


def test_one_gpu_has_one_process_at_a_time_in_ray_and_every_clip_is_made():
    """Real processes, locks and pools; 'in_ray' raises where two had a GPU at once."""
    short, clips = SHAPES[0].scaled(0.1), set()
    found = in_ray(short, 1, 12, lambda outcome: clips.add(outcome.value.request.seed))
    assert clips == set(range(12)) and found["clips"] == 12


@pytest.mark.parametrize("gpus", BOXES)
def test_measured_seconds_never_give_a_gpu_two_decoders_or_a_decoder_a_samplers_place(gpus):
    for pace in ({"sample": 0.8, "publish": 2.2}, {"sample": 13.0, "publish": 2.6}, {"sample": 0.1, "publish": 9.0}):
        limits = {"encode": 0, "sample": 10**9, "publish": 10**9}
        placements = scale_up(pipeline(), box(gpus), [], limits=limits, seconds=pace)
        assert sorted(placement.stage for placement in placements) == ["publish"] * gpus + ["sample"] * gpus


def placement(stage: str, *devices: int) -> Placement:
    return Placement(stage=stage, node="a", gpus=0.5, cpus=1, devices=tuple(map(str, devices)))


@pytest.mark.parametrize("placements, most", [
    ([placement("sample", 0), placement("decode", 0)], 1 / 3),                # one GPU's time is shared
    ([placement("sample", 0), placement("decode", 1)], 1 / 2),                # two GPUs, and the slower one decides
    ([placement("sample", 0), placement("sample", 1), placement("decode", 1)], 2 / 3),    # both are busy all the time
    # the second leaves it to sample
    ([placement("sample", 0), placement("decode", 0), placement("decode", 1)], 1 / 2),
    ([placement("sample", 0), placement("sample", 1), placement("sample", 2), placement("decode", 0)], 1.0)])
def test_replicas_make_what_the_gpus_they_are_on_have_time_for(placements, most):
    stages = [Stage(name="sample", steps=()), Stage(name="decode", steps=())]
    held_s = {"sample": 2.0, "decode": 1.0}
    assert most_per_s(stages, placements, held_s=held_s, pace_s={}) == pytest.approx(most)
    assert most_per_s(stages, placements, held_s=held_s, pace_s={"decode": 10.0}) == pytest.approx(
        sum(placement.stage == "decode" for placement in placements) / 10)


def test_a_forecast_of_machines_that_are_too_small_says_so():
    with pytest.raises(InsufficientCapacity, match="fits on no machine"):
        forecast(pipeline(), [Node(id="a", cpus=8)], SHAPES[0].costs, clips=10)


def test_the_bench_has_a_row_for_each_shape_and_box(monkeypatch):
    monkeypatch.setattr(gpu_shapes, "CLIPS_PER_GPU", dict.fromkeys(CLIPS_PER_GPU, 2))
    monkeypatch.setattr(gpu_shapes, "in_ray", lambda *_: {})
    assert len(list(gpu_shapes.rows())) == len(SHAPES) * len(BOXES) + 2
