"""What a pipeline means, without a cluster."""

import subprocess
import sys
from dataclasses import replace

import pytest
from fake_stages import calls, fake_stages

from actors.messages import Clip, Embedding, Failure, Latent
from jobs.bench_pipeline import pretend_request, pretend_stages
from pipeline.stages import Stage, Step, Worker, readdress, run_local
from pipeline.store import StoreError


class Twice:
    def __call__(self, batch):
        return [2 * value for value in batch]


class Odd:
    """Raises for a batch with an even number."""

    def __call__(self, batch):
        for value in batch:
            if value.seed % 2 == 0:
                raise ValueError(f"{value.seed} is even")
        return list(batch)


class OnGPU:
    device = "cpu"

    def __call__(self, batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def worker(*actors, stage: str = "sample") -> Worker:
    return Worker(stage, [Step(actor=actor) for actor in actors], threads=1)


def test_run_local_chains_the_stages_in_order():
    outcomes = list(run_local(pretend_stages(), map(pretend_request, range(3))))
    assert [outcome.value.request.seed for outcome in outcomes] == [0, 1, 2]
    assert all(isinstance(outcome.value, Clip) and outcome.attempts == 1 for outcome in outcomes)
    assert outcomes[0].seconds.keys() == {"encode", "sample", "publish"}
    assert outcomes[0].worker == "local" and outcomes[0].device == "cpu" and outcomes[0].peak_memory_bytes > 2**20


def test_run_local_takes_requests_as_it_goes():
    taken = []

    def requests():
        for number in range(10):
            taken.append(number)
            yield pretend_request(number)

    outcomes = run_local(pretend_stages(), requests())
    next(outcomes)
    assert taken == [0]


def test_neighbours_with_one_key_share_the_work(tmp_path):
    requests = [pretend_request(number, prompt="ab"[number // 2]) for number in range(4)]
    outcomes = list(run_local(fake_stages(tmp_path), requests))
    assert [call["seeds"] for call in calls(tmp_path, "encode")] == [[0], [2]]
    assert [outcome.value.request for outcome in outcomes] == requests
    assert ["encode" in outcome.seconds for outcome in outcomes] == [True, False, True, False]


def test_a_bad_row_costs_one_row_of_its_batch():
    requests = [pretend_request(number) for number in range(1, 5)]
    values, report = worker(Odd)(requests)
    assert [isinstance(value, Failure) for value in values] == [False, True, False, True]
    assert values[1] == Failure(request=requests[1], stage="sample", error_type="ValueError", error="2 is even",
                                stack=values[1].stack, worker="local", device="cpu")
    assert values[1].stack == values[3].stack and "at test_stages.py:" in values[1].stack
    assert not report.broken


def test_a_failure_passes_later_steps_and_stages_untouched():
    failure = Failure(request=pretend_request(1), stage="encode", error_type="ValueError", error="no")
    values, _ = worker(Twice, Twice)([3, failure])
    assert values == [12, failure]


def test_a_step_that_returns_too_few_values_fails_its_rows():
    (value,), _ = worker(lambda: lambda batch: [])([pretend_request(1)])
    assert value.error_type == "ValueError" and "a value for each" in value.error


def test_an_unusable_store_is_not_the_rows_fault(tmp_path):
    stages = fake_stages(tmp_path, faults={"publish": {1: "store"}})
    with pytest.raises(StoreError, match="access denied"):
        list(run_local(stages, map(pretend_request, range(3))))


def test_seconds_are_counted_by_step():
    steps = [Step(actor=Twice, name="decode"), Step(actor=Twice), Step(actor=Twice)]
    _, report = Worker("publish", steps, threads=1)([1, 2])
    assert report.seconds.keys() == {"decode", "publish"}


def test_a_lost_gpu_context_is_reported():
    (value,), report = worker(OnGPU)([pretend_request(1)])
    assert value.error_type == "RuntimeError" and report.broken


def test_a_shared_value_is_readdressed():
    one, other = pretend_request(1), pretend_request(2)
    embedding = Embedding(request=one, prompt=(), negative=())
    assert readdress(embedding, one) is embedding
    assert readdress(embedding, other) == replace(embedding, request=other)
    assert readdress(one, one) is one
    assert readdress(Latent(request=one, streams=()), other).request is other


def test_threads_belong_to_the_stage_and_not_to_the_machine():
    assert [Stage(name="s", steps=(), cpus=cpus).threads for cpus in (0, 0.25, 1, 3.9, 4)] == [1, 1, 1, 3, 4]
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        seen = []
        look = Step(actor=lambda: lambda batch: seen.append(torch.get_num_threads()) or batch)
        threaded = Worker("sample", [look], threads=2)
        torch.set_num_threads(1)
        threaded([1])
        assert seen == [2]
    finally:
        torch.set_num_threads(before)


def test_a_share_of_several_gpus_is_refused():
    with pytest.raises(ValueError, match="a share of one GPU or a whole number; got 1.5"):
        Stage(name="sample", steps=(), gpus=1.5)


def test_run_local_needs_no_ray():
    script = ("import sys\nfrom jobs.bench_pipeline import *\nfrom pipeline.stages import run_local\n"
              "assert len(list(run_local(pretend_stages(), [pretend_request(1)]))) == 1\n"
              "assert 'ray' not in sys.modules")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
