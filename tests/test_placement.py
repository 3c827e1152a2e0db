"""Which replicas start where."""

from collections import Counter
from operator import attrgetter

import pytest

from dailies.pipeline.scheduler.placement import (
    Capacity,
    InsufficientCapacity,
    Node,
    Placement,
    check,
    free_capacity,
    scale_up,
)
from dailies.pipeline.stages import Stage

MANY = 10**9


def stages(encode=0.0, sample=0.0, publish=0.0, *, cpus=(1.0, 1.0, 1.0), replicas=None) -> list[Stage]:
    return [Stage(name="encode", steps=(), gpus=encode, cpus=cpus[0], key=attrgetter("embedding_key"), window=64),
            Stage(name="sample", steps=(), gpus=sample, cpus=cpus[1], replicas=replicas),
            Stage(name="publish", steps=(), gpus=publish, cpus=cpus[2])]


def scaled(pipeline, nodes, placements=(), *, closed=(), limits=None, seconds=None, held=None) -> Counter:
    limits = {stage.name: 0 if stage.name in closed else MANY for stage in pipeline} | (limits or {})
    new = scale_up(pipeline, nodes, placements, limits=limits, seconds=seconds or {}, held=held)
    return Counter(placement.stage for placement in new)


def placements(nodes, pipeline, counts) -> list[Placement]:
    capacity, made = Capacity(nodes, []), []
    for stage in pipeline:
        for _ in range(counts.get(stage.name, 0)):
            made.append(capacity.placement(stage, capacity.node_for(stage)))
            capacity.take(made[-1])
    return made


ONE_GPU, FOUR_GPUS = [Node(id="a", cpus=8, gpus=1)], [Node(id="a", cpus=8, gpus=4)]


def test_shares_of_a_gpu_live_together():
    pipeline = stages(0.25, 0.75, 0.25)
    assert scaled(pipeline, FOUR_GPUS) == {"encode": 1, "sample": 4, "publish": 1}


def test_the_encoder_holds_a_gpu_and_a_sampler_gets_it():
    pipeline = stages(1, 1, 0)
    first = scaled(pipeline, FOUR_GPUS)
    assert first == {"encode": 1, "sample": 3, "publish": 1}
    staying = placements(FOUR_GPUS, pipeline, {"sample": 3, "publish": 1})
    assert scaled(pipeline, FOUR_GPUS, staying, closed=["encode"]) == {"sample": 1}


def test_on_one_gpu_encoder_and_sampler_take_turns():
    pipeline = stages(1, 1, 0)
    assert scaled(pipeline, ONE_GPU) == {"encode": 1, "publish": 1}
    assert scaled(pipeline, ONE_GPU, closed=["encode"]) == {"sample": 1, "publish": 1}


def test_nobody_takes_the_place_that_the_encoder_waits_for():
    pipeline = stages(1, 1, 0)
    staying = placements(FOUR_GPUS, pipeline, {"sample": 4, "publish": 1})
    assert scaled(pipeline, [*FOUR_GPUS, Node(id="b", cpus=0.2, gpus=4)], staying) == {}
    leaving = free_capacity(pipeline[0], FOUR_GPUS, staying)
    assert [placement.stage for placement in leaving] == ["sample"]


def test_room_is_made_where_the_fewest_leave():
    pipeline = stages(1, 0.5, 0)
    nodes = [Node(id="a", cpus=8, gpus=1), Node(id="b", cpus=8, gpus=2)]
    staying = [Placement(stage="sample", node=node, gpus=0.5, cpus=1, devices=(device,))
               for node, device in (("a", "0"), ("a", "0"), ("b", "0"), ("b", "1"))]
    assert free_capacity(pipeline[0], nodes, staying) == [staying[2]]


def test_room_is_made_on_cores_too():
    pipeline, nodes = stages(cpus=(1, 1, 0.25)), [Node(id="a", cpus=2)]
    staying = placements(nodes, pipeline, {"sample": 2, "publish": 1})
    assert [placement.stage for placement in free_capacity(pipeline[0], nodes, staying)] == ["sample"]


def test_two_cores_run_two_samplers_and_the_publisher():
    pipeline, nodes = stages(cpus=(1, 1, 0.25)), [Node(id="a", cpus=2)]
    assert scaled(pipeline, nodes) == {"encode": 1, "sample": 1, "publish": 1}
    staying = placements(nodes, pipeline, {"sample": 1, "publish": 1})
    assert scaled(pipeline, nodes, staying, closed=["encode"]) == {"sample": 1}
    asked = (nodes[0].cpu_share * (2 + 0.25))
    assert asked <= 2


def test_no_more_replicas_than_there_is_work_for():
    pipeline = stages(0, 1, 0)
    limits = {"encode": 1, "sample": 2, "publish": 2}
    assert scaled(pipeline, FOUR_GPUS, limits=limits) == {"encode": 1, "sample": 2, "publish": 1}


def test_the_next_replica_goes_to_the_stage_that_holds_the_others_back():
    pipeline = stages(0, 1, 0)
    slow_publisher = {"encode": 0.01, "sample": 1.0, "publish": 0.6}
    found = scaled(pipeline, [Node(id="a", cpus=32, gpus=4)], seconds=slow_publisher)
    assert found == {"encode": 1, "sample": 4, "publish": 3}


def test_who_takes_a_gpus_time_is_beside_every_sampler_and_who_lies_in_its_memory_alone_is_not():
    pipeline, paces = stages(0.25, 0.75, 0.25), {"sample": 0.5, "publish": 0.1}
    running = placements(FOUR_GPUS, pipeline, {"sample": 4, "publish": 1})
    assert scaled(pipeline, FOUR_GPUS, running, closed=["encode"], seconds=paces) == {"publish": 3}
    assert not scaled(pipeline, FOUR_GPUS, running, closed=["encode"], seconds=paces, held=["sample"])
    slow = paces | {"publish": 0.2}                     # too slow for the samplers: then it is needed itself
    assert scaled(pipeline, FOUR_GPUS, running, closed=["encode"], seconds=slow, held=["sample"]) == {"publish": 1}


def test_a_fixed_number_of_replicas_is_kept():
    assert scaled(stages(0, 1, 0, replicas=2), FOUR_GPUS)["sample"] == 2


def test_a_gpu_share_is_not_put_together_from_two_gpus():
    pipeline = stages(0.5, 0.75, 0)
    nodes = [Node(id="a", cpus=8, gpus=2)]
    taken = [Placement(stage="sample", node="a", gpus=0.75, cpus=1, devices=(device,)) for device in ("3", "7")]
    assert Capacity(nodes, taken).node_for(pipeline[0]) is None


def test_lost_machines_hold_nothing():
    pipeline = stages(0, 1, 0)
    gone = [Placement(stage="sample", node="gone", gpus=1, cpus=1)]
    assert scaled(pipeline, ONE_GPU, gone)["publish"] == 1


@pytest.mark.parametrize("pipeline, nodes, word", [
    (stages(1, 1, 0), [], "nothing"),
    (stages(1, 1, 0), [Node(id="a", cpus=4)], "fits on no machine"),
    (stages(0, 2, 0), FOUR_GPUS[:0] + [Node(id="a", cpus=4, gpus=1, host="box")], "box 1 GPU 4 CPU"),
    (stages(0, 1, 0.5), ONE_GPU, "publish"),
], ids=["no machines", "no GPU", "two GPUs", "side by side"])
def test_what_can_never_run_is_said_at_once(pipeline, nodes, word):
    with pytest.raises(InsufficientCapacity, match=word):
        check(pipeline, nodes)


def test_what_takes_turns_need_not_fit_side_by_side():
    check(stages(1, 0.75, 0.25), ONE_GPU)
