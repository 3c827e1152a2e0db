"""Promise 2: what is wrong with a machine is never charged to a row, and what is wrong with a row is."""

import errno
import os
import pickle
import subprocess
from collections import Counter
from itertools import count

import pytest
from test_driver import SHARED, SLEEPS_S, WHOLE, SimulatedExecutor, box, drive, poisoned, requests

from dailies.actors.image_parts import ImageError
from dailies.actors.messages import Clip, Failure
from dailies.jobs.bench.pretend import pretend_request, pretend_stages
from dailies.pipeline.scheduler.cluster import on_this_machine
from dailies.pipeline.scheduler.driver import ClusterError, Driver
from dailies.pipeline.scheduler.executor import Broken
from dailies.pipeline.scheduler.faults import WorkerUnfit, killed_for_memory, machine_fault
from dailies.pipeline.scheduler.placement import Node
from dailies.pipeline.scheduler.pool import portable
from dailies.pipeline.scheduler.ray_executor import last_line, load_failed
from dailies.pipeline.stages import Step, Worker
from dailies.pipeline.store import StoreError

FULL = "OSError: [Errno 28] No space left on device: '/tmp/dailies-x.mp4'. Free some of that disk"


def of(number: int, name: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), name)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class UnknownCodecError(ValueError):
    """As PyAV's."""


class SafetensorError(Exception):
    """As safetensors'."""


class OutOfMemoryError(RuntimeError):
    """As torch's."""


OF_THE_MACHINE = [
    *map(of, (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS, errno.EIO,
              errno.ESTALE, errno.EAGAIN, errno.ENOTCONN, errno.ENODEV, errno.ENXIO, errno.EUCLEAN, errno.EBADMSG,
              errno.EREMOTEIO, errno.ENOLCK, errno.EPERM, errno.EACCES, errno.ENOENT, errno.EFBIG)),
    MemoryError(), MemoryError("Unable to allocate 1.20 MiB for an array with shape (9, 400, 400)"),
    caused(ValueError("the encoded clip does not decode"), of(errno.EIO)),
    caused(ImageError("unreadable"), of(errno.EMFILE)),
    RuntimeError("can't start new thread"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 4096000 bytes. Error code 12 (Cannot allocate memory)"),
    RuntimeError("unable to open shared memory object </torch_1_2> in read-write mode: Too many open files (24)"),
    RuntimeError("std::bad_alloc"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    SafetensorError('Error while serializing: IoError(Os { code: 122, kind: FilesystemQuotaExceeded, message: "" })'),
    ImportError("libavcodec.so.62: cannot open shared object file: No such file or directory"),
    ModuleNotFoundError("No module named 'dailies.model.catalog'; 'model' is not a package"),
    OSError("libcudart.so.13: cannot open shared object file: No such file or directory"),
    caused(RuntimeError("the tokenizer cannot be read"), ImportError("sentencepiece")),
    UnknownCodecError("libx264"),
    subprocess.CalledProcessError(1, ["gcc", "-c", "launcher.c"]),
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus."),
    RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."),
    RuntimeError("CUDA driver version is insufficient for CUDA runtime version"),
    RuntimeError("Found no NVIDIA driver on your system."), RuntimeError("No CUDA GPUs are available"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"),
    RuntimeError("Triton Error [CUDA]: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"), RuntimeError("cudaErrorDevicesUnavailable"),
]
OF_THE_ROW = [
    ValueError("prompt: a disk with no space left on device"), KeyError("too many open files"),
    caused(ImageError("unreadable: Permission denied"), of(errno.EACCES, "/night/images/1.png")),
    ImageError("no such file"), OSError("image file is truncated (3 bytes not processed)"), TimeoutError("too slow"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), ArithmeticError("NaN in frame 3"),
    OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 139.81 GiB; cannot allocate memory"),
    RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: an illegal memory access was encountered"),
    MemoryError("Unable to allocate 3.20 PiB for an array with shape (9, 4, 4)"),
    RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {2**60} bytes."),
]


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("error", OF_THE_MACHINE, ids=told)
def test_what_the_system_refuses_and_libraries_lack_is_the_machines(error):
    """And stays it when it travels between processes, with what to do."""
    step = Step(actor=lambda: lambda batch: raising(error))
    with pytest.raises(WorkerUnfit) as raised:
        Worker("publish", [step], threads=1)([pretend_request(1)])
    assert type(raised.value) is WorkerUnfit and len(str(raised.value).rpartition(". ")[2]) > 20
    there = pickle.loads(pickle.dumps(portable(error)))
    assert (str(there), there.sure, there.lasting) == (str(raised.value), raised.value.sure, raised.value.lasting)


def raising(error: Exception):
    raise error


@pytest.mark.parametrize("error", OF_THE_ROW, ids=told)
def test_what_one_row_asks_too_much_of_is_its_own(error):
    assert machine_fault(error) is None
    (failure,), _ = Worker("sample", [Step(actor=lambda: lambda batch: raising(error))],
                           threads=1)([pretend_request(1)])
    assert isinstance(failure, Failure) and failure.error_type == type(error).__name__


def test_a_folder_for_temporary_files_that_is_gone_or_closed_is_the_machines(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    for error in (of(errno.ENOENT, str(tmp_path / "gone" / "dailies-1.mp4")), of(errno.EACCES, str(tmp_path / "gone")),
                  of(errno.ENOENT, None), FileNotFoundError(2, "No usable temporary directory found in ['/x']")):
        found = machine_fault(error)
        assert found and (found.sure and "set TMPDIR" in str(found) or error.filename is None), error
    assert not machine_fault(caused(ImageError("unreadable"), of(errno.EACCES, str(tmp_path / "goner" / "1.png"))))


def test_the_stores_trouble_is_the_stores_whatever_it_was_raised_from():
    full = caused(StoreError("out: cannot write: No space left on device. Free some space"), of(errno.ENOSPC))
    for error in (full, caused(ImageError("s3://closed"), full)):
        assert machine_fault(error) is None
        with pytest.raises(StoreError, match="Free some space"):
            Worker("encode", [Step(actor=lambda error=error: lambda batch: raising(error))], threads=1)([
                pretend_request(1)])
        assert load_failed(error) == Broken(how="load", reason=str(full))


def test_of_a_batch_without_memory_each_is_tried_alone():
    def step(batch):
        return batch if len(batch) == 1 else raising(MemoryError())

    values, _ = Worker("sample", [Step(actor=lambda: step)], threads=1)([pretend_request(seed) for seed in range(3)])
    assert [value.seed for value in values] == [0, 1, 2]


def test_a_process_that_the_system_killed_for_want_of_memory_is_told_from_one_that_crashed(tmp_path):
    assert killed_for_memory(tmp_path) == 0 <= killed_for_memory()
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 7\noom_kill 3\noom_kill_disable 9\n")
    assert killed_for_memory(tmp_path) == 3
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.events").write_text("low 0\noom 4\noom_kill 2\noom_group_kill 0\n")
    assert killed_for_memory(tmp_path) == 2


def test_the_last_line_of_another_processs_page_is_what_it_said():
    page = ("The actor died because of an error raised in its creation task, \x1b[36mray::Process.__init__()\x1b[39m "
            "(pid=1, ip=192.0.2.2, repr=<dailies.pipeline.scheduler.cluster.FunctionActorManager object at 0x7fb9>)\n"
            "RuntimeError: The actor with name Process failed to import on the worker:\n\n"
            "\x1b[36mray::Process.__init__()\x1b[39m (pid=1)\n    ^^^^^\n"
            "\x1b[31mModuleNotFoundError: No module named 'dailies.model.catalog'; 'model' is not a package\x1b[0m\n\n")
    assert last_line(RuntimeError(page)) == ("ModuleNotFoundError: No module named 'dailies.model.catalog'; 'model' is "
                                             "not a package")


def test_what_is_wrong_with_the_drivers_machine_ends_the_night_with_what_to_do():
    def outcomes():
        yield 1
        raise of(errno.ENOSPC, "/tmp/ray/session")

    night = on_this_machine(outcomes())
    assert next(night) == 1
    with pytest.raises(ClusterError, match=r"directs the work, cannot go on: .*Errno 28.* Free some of that disk"):
        next(night)


# The driver, on simulated machines.

NIGHT = [Node(id=name, host=name, cpus=8, gpus=2) for name in "abc"]


def broken(how: str = "unfit", reason: str = FULL, **said) -> Broken:
    return Broken(how=how, reason=reason, **said)


def at(stage: str, answer: Broken, node: str | None = None, begins: float = 0.0, ends: float = 10**6,
       kind: str = "work"):
    """A fault of every such call of a stage, on one node or on all, in a span of simulated time."""
    def fault(call):
        now = fault.executor.clock
        here = node in (None, call.replica.placement.node)
        if here and call.kind == kind and call.replica.stage.name == stage and begins <= now < ends:
            fault.met.append(now)
            return answer
        return None

    fault.met = []
    return fault


def executor_with(fault, nodes, seconds=SLEEPS_S) -> SimulatedExecutor:
    fault.executor = SimulatedExecutor(nodes, seconds, fault=fault)
    return fault.executor


def kept(executor: SimulatedExecutor, rows, **options) -> list:
    """Outcomes until the run ends with an error, and the error."""
    outcomes, driver = [], Driver(executor, pretend_stages(**options), rows)
    with pytest.raises((ClusterError, StoreError)) as raised:
        outcomes.extend(driver.outcomes())
    assert not executor.free_at, "processes were left behind"
    return [*outcomes, raised.value]


@pytest.mark.parametrize("stage", ["encode", "sample", "publish"])
@pytest.mark.parametrize("rows", [2, 2000])
def test_where_no_machine_is_left_the_night_ends_and_charges_none(stage, rows):
    for nodes in (box(1), NIGHT):
        executor = executor_with(fault := at(stage, broken()), nodes)
        *outcomes, error = kept(executor, requests(rows), gpus=SHARED)
        assert outcomes == [] and isinstance(error, ClusterError)
        assert f"stage {stage} cannot work on any machine" in str(error) and FULL in str(error)
        assert "No clip is charged" in str(error) and executor.clock < 300
        assert len(fault.met) <= 3 * 2 * len(nodes) * 3         # three times, on every GPU that a replica is on


def test_a_disk_that_fills_up_after_a_thousand_clips_charges_none():
    *outcomes, error = kept(executor := executor_with(at("publish", broken(), begins=150.0), box(4)), requests(2000),
                            gpus=SHARED)
    assert len(outcomes) > 1000 and all(isinstance(each.value, Clip) and each.attempts == 1 for each in outcomes)
    assert FULL in str(error) and executor.clock < 250


@pytest.mark.parametrize("stage", ["encode", "sample", "publish"])
@pytest.mark.parametrize("kind, answer", [
    *((kind, broken(**said)) for kind in ("work", "load") for said in ({}, {"sure": False}, {"lasting": True})),
    ("work", broken("store", "access denied")), ("load", broken("load"))], ids=lambda each: str(each)[:80])
def test_one_bad_machine_of_three_gets_hardly_any_work_and_no_row_is_charged(stage, kind, answer):
    fault = at(stage, answer, node="a", kind=kind)
    _, outcomes = drive(executor_with(fault, NIGHT), pretend_stages(gpus=SHARED, replicas=None), requests(400))
    assert len(outcomes) == 400
    assert all(isinstance(each.value, Clip) and each.attempts == 1 for each in outcomes)
    assert len(fault.met) <= 24


def test_three_machines_with_a_fault_each_do_the_night_together():
    faults = [at("publish", broken(), node="a"), at("sample", broken(reason="MemoryError", sure=False), node="b"),
              at("encode", broken("store", "access denied"), node="c")]

    def fault(call):
        return next((answer for each in faults if (answer := each(call))), None)

    executor = executor_with(fault, NIGHT)
    for each in faults:
        each.executor = executor
    _, outcomes = drive(executor, pretend_stages(gpus=SHARED), requests(400))
    assert len(outcomes) == 400 and all(each.attempts == 1 for each in outcomes)
    assert all(isinstance(each.value, Clip) for each in outcomes)


def test_a_disk_that_has_room_again_is_used_again():
    _, outcomes = drive(executor_with(at("publish", broken(), begins=10.0, ends=25.0), box(1)),
                        pretend_stages(gpus=SHARED), requests(100))
    assert len(outcomes) == 100 and all(each.attempts == 1 for each in outcomes)


def test_a_machine_that_now_and_then_has_no_room_charges_none():
    calls = count()
    _, outcomes = drive(SimulatedExecutor(box(2), SLEEPS_S, fault=lambda call: broken() if (
        call.kind == "work" and call.replica.stage.name == "publish" and next(calls) % 2) else None),
        pretend_stages(gpus=SHARED), requests(150))
    assert len(outcomes) == 150 and all(isinstance(each.value, Clip) and each.attempts == 1 for each in outcomes)


def test_a_row_for_which_no_machine_ever_has_the_memory_is_charged_and_no_other():
    def fault(call):
        poison = 7 in {task.request.seed for task in call.tasks}
        if call.kind == "work" and call.replica.stage.name == "sample" and poison:
            return broken(reason="MemoryError", sure=False)
        return None

    _, outcomes = drive(SimulatedExecutor(NIGHT, SLEEPS_S, fault=fault), pretend_stages(gpus=SHARED), requests(3000))
    failed, = [each.value for each in outcomes if isinstance(each.value, Failure)]
    assert failed.request.seed == 7 and "MemoryError" in failed.error and len(outcomes) == 3000
    assert Counter(each.attempts for each in outcomes)[1] >= 2999


def test_a_bad_row_among_faults_of_machines_is_still_charged():
    full = at("publish", broken(), node="a")

    def fault(call):
        if call.kind == "work" and call.replica.stage.name == "sample" and call.tasks[0].request.seed == 7:
            return poisoned({7})(call)
        return full(call)

    full.executor = executor = SimulatedExecutor(NIGHT, SLEEPS_S, fault=fault)
    _, outcomes = drive(executor, pretend_stages(gpus=SHARED), requests(60))
    failed, = [each for each in outcomes if isinstance(each.value, Failure)]
    assert failed.value.request.seed == 7 and failed.attempts == 3 and len(outcomes) == 60


def test_calls_beside_the_one_that_met_the_fault_go_back_free_of_charge():
    fault = at("sample", broken(), begins=20.0, ends=21.0)
    _, outcomes = drive(executor_with(fault, box(2)), pretend_stages(gpus=SHARED, concurrency=3, batch=2),
                        requests(120))
    assert fault.met and len(outcomes) == 120 and all(each.attempts == 1 for each in outcomes)


def test_a_stage_that_lacks_a_library_everywhere_ends_at_once():
    executor = executor_with(at("publish", broken(reason="ImportError: no av", lasting=True), kind="load"), NIGHT)
    *outcomes, error = kept(executor, requests(20), gpus=WHOLE)
    assert not outcomes and "stage publish cannot start: ImportError: no av" in str(error) and executor.clock < 30


def test_credentials_that_are_refused_everywhere_end_the_night_in_the_stores_words():
    for nodes in (box(1), NIGHT):
        *outcomes, error = kept(executor := executor_with(at("publish", broken("store", "out: access denied")), nodes),
                                requests(50), gpus=SHARED)
        assert not outcomes and isinstance(error, StoreError) and str(error) == "out: access denied"
        assert executor.clock < 200


def test_credentials_that_are_refused_for_a_moment_end_no_process():
    executor = executor_with(at("publish", broken("store", "expired"), begins=20.0, ends=21.2), NIGHT)
    _, outcomes = drive(executor, pretend_stages(gpus=SHARED), requests(200))
    assert len(outcomes) == 200 and all(each.attempts == 1 for each in outcomes)
    assert Counter(replica.stage.name for replica in executor.started)["publish"] <= 6
