"""What `dailies plan` foretells, by the clips of the run that are made."""

import json
from datetime import datetime, timedelta

import pytest
import tiny  # noqa: F401  adds the model to the catalogue
from one_process import main

from dailies.jobs.bench import gpu_shapes
from dailies.jobs.plan import said_of
from dailies.jobs.settings import RenderJob
from dailies.pipeline.scheduler.forecast import Cost, Forecast, forecast, measured_costs, rows_by_work
from dailies.pipeline.scheduler.placement import Node
from dailies.pipeline.stages import Stage

STAGES = gpu_shapes.pipeline()
BUCKET = dict(width=832, height=480, frames=81, steps=4)


def row(sample_s=1.0, gpu_s=1.6, steps=4, **changes):
    return BUCKET | dict(encode_s=0.1, sample_s=sample_s, decode_s=0.9, publish_s=2.0, gpu_s=gpu_s,
                         steps=steps) | changes


def test_what_clips_cost_are_the_medians_of_their_bucket_and_a_gpus_part_of_them_is_what_was_measured():
    rows = [row(), row(sample_s=9.0, gpu_s=9.6), row(), row(sample_s=None), row(steps=50)]
    costs = measured_costs(STAGES, rows_by_work(rows), BUCKET)
    assert sum(cost.held_s for cost in costs.values()) == pytest.approx(1.6)
    assert sum(cost.held_s + cost.beside_s for cost in costs.values()) == pytest.approx(0.1 + 1.0 + 0.9)
    assert costs["publish"].pool_s == 2.0


def test_a_bucket_that_was_not_seen_costs_what_the_nearest_does_by_its_work():
    costs = measured_costs(STAGES, rows_by_work([row(), row(steps=400, sample_s=500.0)]), BUCKET | {"steps": 8})
    whole = {name: cost.held_s + cost.beside_s for name, cost in costs.items()}
    assert whole == pytest.approx({"encode": 0.1, "sample": 2.0, "publish": 1.8}) and costs["publish"].pool_s == 4.0
    assert not rows_by_work([row(sample_s=None)]) and not rows_by_work([])


def test_on_cpus_all_seconds_of_a_replica_count_and_no_gpu_is_held():
    costs = measured_costs(STAGES, rows_by_work([row(gpu_s=None, encode_s=0.0)]), BUCKET)
    pipeline = [Stage(name="sample", steps=()), Stage(name="publish", steps=(), cpus=0.5)]
    found = forecast(pipeline, [Node(id="a", cpus=4)], costs, clips=100)
    assert found.gpu_hours == 0.0 and found.replicas["sample"] + 0.5 * found.replicas["publish"] <= 4.5
    rates = found.replicas["sample"] / 1.0, found.replicas["publish"] / 2.9
    assert found.clips_per_hour == pytest.approx(3600 * min(rates))


def test_nothing_left_takes_no_time():
    costs = {"sample": Cost(held_s=1.0)}
    assert forecast([Stage(name="sample", steps=())], [Node(id="a", cpus=4)], costs, clips=0).seconds == 0.0


def test_plan_says_how_long_the_rest_will_take_once_clips_are_made(tmp_path, capsys):
    manifest = tmp_path / "night.jsonl"
    manifest.write_text("".join(json.dumps({"prompt": f"a fox {number}", "frames": 5}) + "\n" for number in range(8)))
    said = [str(manifest), "--out", str(tmp_path / "out"), "--model", "tiny", "--device", "cpu"]

    def plan(*options):
        assert main(["plan", *said, *options]) == 0
        return capsys.readouterr().out

    assert json.loads(plan("--json"))["forecast"] is None
    assert "known when some of its clips are made" in plan()
    assert main(["render", *said, "--limit", "3", "--json"]) in (0, 4)
    capsys.readouterr()
    foretold = json.loads(plan("--json", "--price", "2"))["forecast"]
    assert (foretold["clips"], foretold["measured_clips"], foretold["gpus"]) == (5, 3, 0)
    assert foretold["seconds"] > 0 and foretold["gpu_hours"] == foretold["cost"] == 0
    assert "5 clips to make: " in plan() and "judged by 3 clips of this run" in plan()
    assert "8 rows, 8 clips" in plan() and "of these 3 rows done, 0 failed, 5 pending" in plan()
    limited = json.loads(plan("--json", "--limit", "3"))                # of this command; 3 are made already
    assert (limited["to_make"], limited["left_by_limit"], limited["forecast"]["clips"]) == (3, 2, 3)
    assert "3 clips to make: " in plan("--limit", "3") and "2 after it (--limit 3)" in plan("--limit", "3")
    assert json.loads(plan("--json", "--limit", "9"))["to_make"] == 5
    soon = json.loads(plan("--json", "--until", (datetime.now() + timedelta(seconds=1)).isoformat()))["forecast"]
    assert soon["clips"] == 5 and 0 <= soon["fits"] <= 5
    assert "No clip is begun that would not be done by" in plan("--until", "07:00")
    assert "1.50 GPU hours in all, 3.00 USD" in plan("--max-cost", "3", "--price", "2")
    assert main(["render", *said, "--json"]) == 0
    capsys.readouterr()
    assert "nothing is left to make" in plan() and "8 rows done, 0 failed, 0 pending" in plan("--limit", "3")


def test_plan_names_what_does_not_fit_into_the_night():
    night = [(8, Forecast(seconds=800.0, gpu_hours=0.5, clips_per_hour=36.0, replicas={}))]
    job = dict(manifest="m.csv", out="o", price=2.0)
    assert said_of(night, 3, RenderJob(**job))["fits"] == 8 and said_of(night, 3, RenderJob(**job))["cost"] == 1.0
    assert said_of(night, 3, RenderJob(**job, max_cost=0.5))["fits"] == 4
    assert said_of(night, 3, RenderJob(**job, max_gpu_hours=9.0))["fits"] == 8
    later = (datetime.now() + timedelta(seconds=450)).isoformat()
    assert said_of(night, 3, RenderJob(**job, until=later))["fits"] == 4
