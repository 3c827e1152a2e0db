"""What a pipeline means, without a cluster."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from fake_stages import calls, fake_stages

from dailies.actors.actor import Actor
from dailies.actors.device_lock import NO_LOCK
from dailies.actors.messages import Clip, Embedding, Failure, Latent
from dailies.jobs.bench.pretend import pretend_request, pretend_stages
from dailies.pipeline.stages import Stage, Step, Worker, lost_context, readdress, run_local
from dailies.pipeline.store import StoreError


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


LOST = [
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: device-side assert triggered",
    "CUDA error: unspecified launch failure",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb, m, n, k)`",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDA driver error: unknown error",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "Triton Error [CUDA]: unspecified launch failure",
    "backend='inductor' raised:\nRuntimeError: Triton Error [CUDA]: misaligned address",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION",
    "CUDNN_STATUS_MAPPING_ERROR",
    "cuFFT error: CUFFT_EXEC_FAILED",
    "NCCL Error 1: unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "NCCL error in: NCCLUtils.cpp:77, unhandled system error\nncclSystemError: System call (e.g. socket) failed",
    "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.",
    "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.",
    "uncorrectable ECC error encountered", "driver shutting down", "context is destroyed",
    "cudaErrorIllegalAddress", "CUDA_ERROR_LAUNCH_FAILED",
]
KEPT = [
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDNN_STATUS_ALLOC_FAILED", "CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation",
    "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes or `num_stages` "
    "may help.",
    "CUDA error: too many resources requested for launch",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    "cuDNN error: CUDNN_STATUS_BAD_PARAM",
    "Triton Error [CUDA]: invalid argument",
    "GET was unable to find an engine to execute this computation",
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", "the prompt is of an excluded Xidian", "",
]


@pytest.mark.parametrize("said", LOST)
def test_a_lost_context_is_recognised_whoever_words_it(said):
    assert lost_context(RuntimeError(said))
    wrapped = ValueError("the block could not be run")
    wrapped.__cause__ = RuntimeError(said)
    assert lost_context(wrapped)


@pytest.mark.parametrize("said", KEPT)
def test_an_error_after_which_the_device_goes_on_is_no_lost_context(said):
    assert not lost_context(RuntimeError(said))


def test_torchs_own_kinds_of_error_are_told_apart():
    torch = pytest.importorskip("torch")
    assert lost_context(torch.AcceleratorError("whatever it says"))
    assert not lost_context(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def test_a_rows_text_is_no_lost_context():
    assert not lost_context(ValueError("prompt: a screen that shows CUDA error: an illegal memory access"))


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
    embedding = Embedding(request=one, prompt={}, negative={})
    assert readdress(embedding, one) is embedding
    assert readdress(embedding, other) == replace(embedding, request=other)
    assert readdress(one, one) is one
    assert readdress(Latent(request=one, streams={}), other).request is other


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


def test_processes_beside_a_stage_need_a_thread_each_and_one_more():
    with pytest.raises(ValueError, match="2 processes need a concurrency of 3 or more.*got 2"):
        Stage(name="publish", steps=(), processes=2, concurrency=2)


def test_run_local_makes_what_comes_after_in_the_same_process():
    stage = Stage(name="publish", steps=(Step(actor=Twice),), then=(Step(actor=Twice),), processes=1, concurrency=2)
    sums = Worker("publish", (*stage.steps, *stage.then), threads=1)
    assert sums([1, 2])[0] == [4, 8]


class Locked(Actor):
    """Has the device for a while, and nothing on a CPU for as long."""

    def __call__(self, batch):
        time.sleep(0.05)
        with self.lock:
            time.sleep(0.05)
        return batch


def test_threads_take_turns_on_a_device_and_what_they_wait_is_not_their_work():
    locked = worker(Locked)
    with ThreadPoolExecutor(4) as threads:
        reports = [report for _, report in threads.map(lambda seed: locked([pretend_request(seed)]), range(8))]
    assert locked.lock is not NO_LOCK and max(locked.lock.held_s, locked.lock.waited_s) == 0     # of this thread
    assert all(report.seconds["sample"] >= 0.1 and report.pace_s >= 0.1 for report in reports)
    assert all(report.held_s == 0.0 for report in reports)              # it names no GPU


def test_a_share_of_several_gpus_is_refused():
    with pytest.raises(ValueError, match="a share of one GPU or a whole number; got 1.5"):
        Stage(name="sample", steps=(), gpus=1.5)


def test_run_local_needs_no_ray():
    script = (f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\nfrom dailies.jobs.bench.pretend import *\n"
              "from dailies.pipeline.stages import run_local\n"
              "assert len(list(run_local(pretend_stages(), [pretend_request(1)]))) == 1\n"
              "assert 'ray' not in sys.modules")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
