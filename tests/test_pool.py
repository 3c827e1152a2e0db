"""Processes beside a worker: frames in memory that both see, deaths that cost one value, nothing left behind."""

import ctypes
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dailies.actors import handover
from dailies.actors.actor import Actor
from dailies.actors.messages import Clip, Failure, Frames, Latent
from dailies.jobs.bench.pretend import pretend_request
from dailies.model.shapes import VideoShape
from dailies.pipeline.run.lease import process_start
from dailies.pipeline.scheduler import pool as pools
from dailies.pipeline.scheduler.pool import ChildFailed, Pool
from dailies.pipeline.stages import Stage, Step, Worker, WorkerUnfit, request_of, run_local
from dailies.pipeline.store import NotFound, StoreError

ROOT, HERE = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent


@dataclass
class Decode:
    """Frames whose pixels say which clip they are of."""

    def __call__(self, batch):
        return [Frames(request=request, rgb=torch.full((9, 64, 64, 3), request.seed, dtype=torch.uint8))
                for request in map(request_of, batch)]


@dataclass
class Write(Actor):
    """A clip that says what was in its frames and who wrote it; by seed, what goes wrong."""

    folder: Path
    safe: bool = False

    def __call__(self, batch):
        return [self.write(frames) for frames in batch]

    def write(self, frames):
        seed = frames.request.seed
        (self.folder / f"{seed}-{os.getpid()}").touch()
        match seed:
            case 101:
                raise ValueError("nobody can write this")
            case 102:
                os.kill(os.getpid(), signal.SIGKILL)
            case 103:
                ctypes.string_at(0)
            case 104:
                raise StoreError("access denied")
            case 105:
                raise NotFound("it is gone")
            case 106:
                time.sleep(3600)
            case 107:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/dailies-x.mp4")
            case 108:
                bytearray(2**62)
            case 109:
                raise ValueError("not written") from ImportError("libx264.so: cannot open shared object file")
        assert frames.rgb.eq(seed).all() and frames.rgb.shape == (9, 64, 64, 3)
        return Clip(request=frames.request, uri="", sha256=str(os.getpid()), num_bytes=frames.rgb.nbytes,
                    duration_s=1.0, fallbacks=("safe",) if self.safe else ())


class Broken:
    def __init__(self):
        raise ValueError("x264 is missing")


def latent(seed: int) -> Latent:
    return Latent(request=pretend_request(seed), streams={})


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """As ray_executor.Process has it, with two processes, which outlive a test."""
    written = tmp_path_factory.mktemp("written")
    pool = Pool("publish", [Step(actor=Write, args={"folder": written})], 2, name="publish-1@here", device="a GPU")
    yield Worker("publish", [Step(actor=Decode, name="decode")], threads=1, name="publish-1@here", pool=pool,
                 concurrency=4)
    pool.close()


def test_values_pass_whole_and_large_tensors_in_memory_without_a_name():
    mine, theirs = socket.socketpair()
    value = {"large": torch.randn(3, 200, 200), "bf16": torch.randn(70_000).bfloat16(), "small": torch.arange(5),
             "strided": torch.randn(400, 300).T, "words": ["a"]}
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(1) as other:
        got = other.submit(handover.receive, theirs)
        handover.send(mine, value)
        got = got.result()
    assert got.keys() == value.keys() and got["words"] == ["a"]
    for name in ("large", "bf16", "small", "strided"):
        assert got[name].dtype == value[name].dtype and torch.equal(got[name], value[name])
    assert any("memfd:dailies" in line for line in Path("/proc/self/maps").read_text().splitlines())
    del got
    assert len(os.listdir("/proc/self/fd")) == before
    assert not any("memfd:dailies" in line for line in Path("/proc/self/maps").read_text().splitlines())
    mine.close()
    with pytest.raises(handover.Closed):
        handover.receive(theirs)


def test_what_is_made_beside_the_worker_is_what_run_local_makes(worker, tmp_path):
    (tmp_path / "local").mkdir()
    stage = Stage(name="publish", steps=(Step(actor=Decode, name="decode"),), processes=2, concurrency=4,
                  then=(Step(actor=Write, args={"folder": tmp_path / "local"}),))
    requests = [pretend_request(seed) for seed in range(8)]
    wanted = {outcome.value.request.seed: outcome for outcome in run_local([stage], requests)}
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda request: worker([latent(request.seed)]), requests))
    for (clip,), report in answers:
        assert replace(clip, sha256="") == replace(wanted[clip.request.seed].value, sha256="")
        assert report.seconds.keys() == wanted[clip.request.seed].seconds.keys() == {"decode", "publish"}
        assert report.pace_s >= max(report.seconds["publish"] / 2, sum(report.seconds.values()) / 4)
    writers = {clip.sha256 for (clip,), _ in answers}
    assert len(writers) == 2 and str(os.getpid()) not in writers and worker.pool.bytes == 0


@pytest.mark.parametrize("seed, error_type, said", [
    (101, "ValueError", "nobody can write this"), (102, "WorkerDied", "signal 9, SIGKILL"),
    (103, "WorkerDied", "signal 11, SIGSEGV")])
def test_a_bad_clip_costs_one_clip_and_its_process_is_replaced(seed, error_type, said, worker):
    (failure,), report = worker([latent(seed)])
    assert isinstance(failure, Failure) and failure.error_type == error_type and said in failure.error
    assert (failure.stage, failure.worker, failure.device) == ("publish", "publish-1@here", "a GPU")
    assert not report.broken
    for number in range(4):
        (clip,), _ = worker([latent(number)])
        assert isinstance(clip, Clip)
    assert all(child.process.poll() is None for child in worker.pool.children)


def test_a_process_that_dies_while_it_has_nothing_to_do_costs_no_clip(worker):
    for child in worker.pool.children:
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.wait()
    assert all(isinstance(worker([latent(number)])[0][0], Clip) for number in range(4))


def test_where_no_process_can_be_started_the_worker_is_unfit_and_the_clip_not_to_blame(worker, monkeypatch):
    def no_memory(pool):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pools, "Child", no_memory)
    for child in worker.pool.children:
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.wait()
    with pytest.raises(WorkerUnfit, match="no other could start: .*Cannot allocate memory"):
        worker([latent(1)])


def test_a_process_that_could_not_be_replaced_is_replaced_when_the_store_is_there_again(worker, monkeypatch):
    def no_store(child):
        raise StoreError("the store is away")

    for child in worker.pool.children:
        child.process.kill()                            # or dead already, by the test before
        child.process.wait()
    with monkeypatch.context() as patch:
        patch.setattr(pools.Child, "wait_until_ready", no_store)
        for number in range(3):
            with pytest.raises(StoreError, match="is away"):
                worker([latent(number)])
    assert all(isinstance(worker([latent(number)])[0][0], Clip) for number in range(4))
    assert len(worker.pool.children) == 2 and all(child.process.poll() is None for child in worker.pool.children)


def test_a_sender_that_dies_in_the_middle_leaves_no_frames_behind():
    mine, theirs = socket.socketpair()
    before = len(os.listdir("/proc/self/fd"))
    file = os.memfd_create("frames")
    socket.send_fds(mine, [handover.HEAD.pack(100, 1)], [file])
    os.close(file)
    mine.close()
    with pytest.raises(handover.Closed):
        handover.receive(theirs)
    assert len(os.listdir("/proc/self/fd")) == before - 1
    theirs.close()


def test_frames_that_were_made_before_the_gpu_was_lost_are_still_published(worker):
    worker.broken = True                                # by another thread, meanwhile
    (clip,), report = worker([latent(3)])
    assert isinstance(clip, Clip) and report.broken


@pytest.mark.parametrize("seed, error, said", [(104, StoreError, "access denied"), (105, NotFound, "it is gone")])
def test_trouble_that_is_no_clips_fault_passes_through(seed, error, said, worker):
    with pytest.raises(error, match=said):
        worker([latent(seed)])
    assert isinstance(worker([latent(1)])[0][0], Clip)


@pytest.mark.parametrize("seed, said, sure, lasting", [
    (107, r"\[Errno 28\] No space left on device: '/tmp/dailies-x.mp4'. Free some of that disk", True, False),
    (108, "MemoryError. Free memory there", False, False), (109, "ImportError: libx264.so: .*Install it", True, True)])
def test_what_is_wrong_with_the_machine_is_told_by_the_process_that_met_it(seed, said, sure, lasting, worker):
    with pytest.raises(WorkerUnfit, match=said) as raised:
        worker([latent(seed)])
    assert (raised.value.sure, raised.value.lasting) == (sure, lasting)
    assert isinstance(worker([latent(1)])[0][0], Clip)


def test_a_process_that_has_no_descriptor_left_for_frames_blames_no_clip(worker):
    for child in worker.pool.children:
        files = {int(name) for name in os.listdir(f"/proc/{child.process.pid}/fd")}
        free = next(number for number in range(1000) if number not in files)
        before = resource.prlimit(child.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(child.process.pid, resource.RLIMIT_NOFILE, (free, before[1]))
    with pytest.raises(WorkerUnfit, match="Too many open files. Raise the limit of open files"):
        worker([latent(1)])
    while all(child.process.poll() is None for child in worker.pool.children):      # the one that met it leaves
        time.sleep(0.05)
    for child in worker.pool.children:
        with suppress(ProcessLookupError):
            resource.prlimit(child.process.pid, resource.RLIMIT_NOFILE, before)


def test_a_process_that_the_system_killed_for_want_of_memory_blames_no_clip(worker):
    for child in worker.pool.children:
        child.killed_before -= 1
    with pytest.raises(WorkerUnfit, match="for want of memory. Free memory there") as raised:
        worker([latent(102)])
    assert not raised.value.sure and isinstance(worker([latent(1)])[0][0], Clip)


def test_the_safe_profile_reaches_the_pool_and_failures_pass_it_untouched(worker):
    failure = Failure(request=pretend_request(5), stage="sample", error_type="ValueError", error="no")
    values, _ = worker([failure, latent(1)], safe=True)
    assert values[0] is failure and values[1].fallbacks == ("safe",)
    assert worker([latent(1)])[0][0].fallbacks == ()


def test_steps_that_cannot_be_made_are_said_while_loading(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="x264 is missing"):
        Pool("publish", [Step(actor=Broken)], 1, name="publish-1", device="cpu")
    (tmp_path / "dailies.py").write_text("raise ImportError('no codec here')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ChildFailed, match=r"did not start: ImportError: no codec here \(exit code 1\)"):
        Pool("publish", [], 1, name="publish-1", device="cpu")
    monkeypatch.undo()
    with pytest.raises(ChildFailed, match="did not start: exit code 3"):
        Pool("publish", [Step(actor=os._exit, args={"status": 3})], 1, name="publish-1", device="cpu")


def test_no_more_bytes_of_frames_are_on_their_way_than_there_may_be(monkeypatch):
    pool = object.__new__(Pool)
    pool.bytes, pool.changed, most = 0, threading.Condition(), []
    shape = VideoShape(frames=9, height=64, width=64)
    requests = [replace(pretend_request(seed), shape=shape) for seed in range(12)]
    monkeypatch.setattr(pools, "FRAMES_BYTES", 2.5 * pools.frame_bytes(requests[0]))

    def carry(request):
        with pool.reserve([request]):
            most.append(pool.bytes)
            time.sleep(0.01)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(carry, requests))
        monkeypatch.setattr(pools, "FRAMES_BYTES", 1)
        list(threads.map(carry, requests))              # larger than all there is: one at a time
    assert max(most[:12]) == 2 * pools.frame_bytes(requests[0]) and max(most[12:]) == pools.frame_bytes(requests[0])
    assert pool.bytes == 0


def test_a_killed_worker_leaves_no_process_and_no_frames(tmp_path):
    """Its children hang in the middle of a clip."""
    script = ("import os, sys\nfrom pathlib import Path\nfrom test_pool import *\n"
              "step = Step(actor=Write, args={'folder': Path(sys.argv[1])})\n"
              "pool = Pool('publish', [step], 1, name='p', device='')\n"
              "print(pool.children[0].process.pid, flush=True)\n"
              "Worker('publish', [Step(actor=Decode)], threads=1, pool=pool)([latent(106)])\n")
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])})
    child = int(parent.stdout.readline())
    while not list(tmp_path.glob("106-*")):
        time.sleep(0.05)
    assert "memfd:dailies" in Path(f"/proc/{child}/maps").read_text()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while process_start(child):                         # "" of a zombie, None of one that is gone
        assert time.monotonic() < deadline, "a child outlived its worker"
        time.sleep(0.05)
