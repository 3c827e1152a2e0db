"""Ray as the driver's executor: a Worker in a Ray actor, its calls, and what each of Ray's errors means.

Every death is answered by the driver and none by Ray (max_restarts=0), so that each has a cause and a count. With
intermediates in the pipeline only small references cross Ray; they live in the driver, and no lost machine takes them
along. Without, embeddings and latents lie in Ray's object store, and what is lost with a machine is made again.
"""

import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import exceptions as rex
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dailies.actors.device_lock import Halted
from dailies.actors.messages import Failure, Request
from dailies.pipeline.scheduler.executor import Alive, Answer, Broken, Call, Done, Hello, Replica
from dailies.pipeline.scheduler.faults import (
    OUT_OF_MEMORY,
    WorkerUnfit,
    killed_for_memory,
    machine_fault,
    store_trouble,
)
from dailies.pipeline.scheduler.placement import Node
from dailies.pipeline.scheduler.pool import Pool
from dailies.pipeline.stages import Stage, Worker, readdress
from dailies.pipeline.store import NotFound, StoreError
from dailies.pipeline.store.base import PATIENCE

BESIDE_S = 5.0                      # within which a process answers beside its work
MAKING_IT = "error raised in its creation task"         # Ray's words for an actor that could not be made
TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")         # colours, which Ray puts into its errors


def nodes() -> list[Node]:
    """The machines of the connected cluster that are alive."""
    return [Node(id=node["NodeID"], host=node["NodeManagerHostname"], cpus=node["Resources"].get("CPU", 0.0),
                 gpus=node["Resources"].get("GPU", 0.0), gpu=gpu_of(node["Resources"]))
            for node in ray.nodes() if node["Alive"]]


def gpu_of(resources: dict[str, float]) -> str:
    """The kind of a node's GPUs; Ray says it as a resource of that name. Empty: none, or Ray does not know it."""
    kind = "accelerator_type:"
    return next((name.removeprefix(kind) for name in resources if name.startswith(kind)), "")


class Process:
    """One stage's Worker in a process of its own. Making it is quick, so that a broken model speaks up in load.

    Calls of `work` come in threads, as many at a time as the stage's concurrency.
    """

    def __init__(self, threads: int):
        os.environ["OMP_NUM_THREADS"] = str(threads)    # before the steps arrive, and torch with them
        self.worker: Worker | None = None
        self.at_work: dict[int, tuple[int, float]] = {}     # serials of calls -> thread; what it had waited by then
        self.recalled: set[int] = set()                 # calls that are not to begin
        self.stopped: set[int] = set()                  # calls that are to stop where they can
        self.mine = threading.local()                   # of each thread: its call's serial
        self.leaving = False
        signal.signal(signal.SIGTERM, self.leave)       # Ray's handler would end it in the middle of the work

    def hello(self) -> Hello:
        return Hello(devices=tuple(ray.get_runtime_context().get_accelerator_ids().get("GPU", ())),
                     killed_for_memory=killed_for_memory())

    def load(self, stage: Stage, name: str) -> Broken | None:
        """What kept it from being made, if something did."""
        try:
            self.make(stage, name)
        except Exception as error:
            return load_failed(error)
        return None

    def make(self, stage: Stage, name: str) -> None:
        name, steps = f"{name}@{socket.gethostname()}", stage.steps
        if not stage.processes:
            steps += stage.then
        worker = Worker(stage.name, steps, stage.threads, name=name, halted=self.is_halted, recalled=self.is_recalled,
                        concurrency=stage.concurrency)
        if stage.processes:
            worker.pool = Pool(stage.name, stage.then, stage.processes, name=name, device=worker.device)
        self.worker = worker

    def leave(self, number: int, frame: Any) -> None:
        """The machine is wanted back: finish or save what is being done, and take nothing new."""
        self.leaving = True
        if not self.at_work:
            sys.exit(1)

    def is_halted(self) -> bool:
        return self.leaving or self.mine.serial in self.stopped

    def is_recalled(self) -> bool:
        return self.is_halted() or self.mine.serial in self.recalled

    def ping(self) -> None:
        pass

    @ray.method(concurrency_group="beside")             # answers while `work` runs
    def stop(self, serial: int, at_work: bool) -> None:
        """That call is not to begin; at_work: if it has, it is to stop where it can."""
        (self.stopped if at_work else self.recalled).add(serial)

    @ray.method(concurrency_group="beside")
    def kept_waiting_s(self) -> float:
        """Of the call that is at work longest: by the store, and by others on its GPU."""
        at_work = dict(self.at_work)
        if not at_work:
            return 0.0
        thread, before_s = at_work[min(at_work)]
        return self.waited_s(thread) - before_s

    @ray.method(concurrency_group="beside")
    def waits_for(self) -> tuple[str, float] | None:
        return self.worker.lock.waits_for() if self.worker else None

    def waited_s(self, thread: int) -> float:
        return PATIENCE.seconds(thread) + (self.worker.kept_waiting_s() if self.worker else 0.0)

    def work(self, serial: int, requests: list[Request], safe: bool, last: bool, *values: Any) -> Any:
        """An answer, and unless `last` a value per request, to be left in the object store."""
        if values:
            given = [readdress(value, request) for value, request in zip(values, requests, strict=True)]
        else:
            given = requests
        made: list = [None] * len(requests)
        self.mine.serial = serial
        thread = threading.get_ident()
        self.at_work[serial] = thread, self.waited_s(thread)
        try:
            if self.worker is None or self.is_recalled():
                raise Halted("not begun")
            made, report = self.worker(given, safe)
            told = made if last else [value if isinstance(value, Failure) else None for value in made]
            answer: Answer = Done(made=told, report=report)
        except StoreError as error:
            answer = Broken(how="store", reason=str(error))
        except NotFound as error:
            answer = Broken(how="input", reason=str(error))
        except Halted as error:
            answer = Broken(how="node" if self.leaving else "cancelled", reason=f"told to end: {error}")
        except Exception as error:                      # the worker's own, or of what is around it
            if (unfit := machine_fault(error)) is None:
                raise
            answer = broken_by(unfit)
        finally:
            del self.at_work[serial]
            self.stopped.discard(serial)
            self.recalled.discard(serial)
        return answer if last else [answer, *made]


def broken_by(unfit: WorkerUnfit) -> Broken:
    return Broken(how="unfit", reason=str(unfit), sure=unfit.sure, lasting=unfit.lasting and unfit.sure)


def load_failed(error: Exception) -> Broken:
    """Steps that cannot be made on this machine, in the error's own words."""
    if trouble := store_trouble(error):
        return Broken(how="load", reason=str(trouble))
    if unfit := machine_fault(error):
        return Broken(how="unfit", reason=str(unfit), lasting=unfit.lasting)
    return Broken(how="load", reason=f"{type(error).__name__}: {error}")


class RayExecutor:
    """Ray actors as the driver's executor."""

    def __init__(self) -> None:
        self.nodes_now: dict[str, Node] = {}
        self.pending: dict[ray.ObjectRef, Call] = {}
        self.killed_before: dict[Replica, int] = {}        # on its machine, for want of memory, when it was started
        # once: exporting a class takes Ray long
        self.process = ray.remote(concurrency_groups={"beside": 1})(Process)

    def now(self) -> float:
        return time.monotonic()

    def nodes(self) -> list[Node]:
        self.nodes_now = {node.id: node for node in nodes()}
        return list(self.nodes_now.values())

    def start(self, replica: Replica) -> None:
        placement = replica.placement
        cpu_share = self.nodes_now[placement.node].cpu_share
        cpus = math.floor(placement.cpus * cpu_share * 1e4) / 1e4           # Ray's unit is 0.0001
        replica.handle = self.process.options(
            num_cpus=cpus, num_gpus=placement.gpus, max_restarts=0, max_task_retries=0,
            max_concurrency=replica.stage.concurrency, scheduling_strategy=NodeAffinitySchedulingStrategy(
                placement.node, soft=False)).remote(replica.stage.threads)

    def end(self, replica: Replica) -> None:
        for call in replica.calls:
            self.pending.pop(call.handle, None)
        self.killed_before.pop(replica, None)
        ray.kill(replica.handle)

    def submit(self, call: Call) -> None:
        actor, stage = call.replica.handle, call.replica.stage
        if call.kind == "work":
            method = actor.work.options(num_returns=1 if call.last else 1 + len(call.tasks))
            values = [task.value for task in call.tasks] if call.replica.stage_index else []
            returned = method.remote(call.serial, [task.request for task in call.tasks], call.safe, call.last, *values)
            call.handle, *call.values = [returned] if call.last else returned
        elif call.kind == "load":
            call.handle = actor.load.remote(stage, call.replica.name)
        else:
            call.handle = getattr(actor, call.kind).remote()
        self.pending[call.handle] = call

    def cancel(self, call: Call) -> None:
        call.replica.handle.stop.remote(call.serial, at_work=True)

    def recall(self, call: Call) -> None:
        call.replica.handle.stop.remote(call.serial, at_work=False)
        before = list(call.replica.calls)[:call.replica.stage.concurrency]
        if call in before or ray.wait([other.handle for other in before], timeout=0)[0]:
            return                                      # it has begun, or does so now that another is done
        ray.cancel(call.handle)                         # what only waits there need not wait for its answer

    def kept_waiting_s(self, replica: Replica) -> float:
        return beside(replica.handle.kept_waiting_s) or 0.0

    def waits_for(self, replica: Replica) -> tuple[str, float] | None:
        return beside(replica.handle.waits_for)

    def wait(self, timeout_s: float) -> Iterator[tuple[Call, Answer]]:
        if not self.pending:
            time.sleep(timeout_s)
            return
        refs = list(self.pending)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ready and len(refs) > 1:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for call in sorted((self.pending[ref] for ref in ready), key=lambda call: call.serial):
            if self.pending.pop(call.handle, None) is None:
                continue                                # its process has been ended since
            answer = self.answer(call)
            if isinstance(answer, Broken) and answer.how in ("died", "node"):
                yield from self.before(call)
            yield call, answer

    def before(self, call: Call) -> Iterator[tuple[Call, Answer]]:
        """A death answers all calls at once; one that was done before it must be told first, or it is blamed."""
        for earlier in [other for other in call.replica.calls if other.serial < call.serial]:
            ready, _ = ray.wait([earlier.handle], timeout=5)
            if ready and self.pending.pop(earlier.handle, None):
                yield earlier, self.answer(earlier)

    def answer(self, call: Call) -> Answer:
        try:
            answer = ray.get(call.handle)
        except rex.ActorUnavailableError as error:
            return Broken(how="node", reason=one_line(error))
        except rex.ActorDiedError as error:
            if MAKING_IT in str(error):                 # its modules cannot be imported there, or the like
                return Broken(how="load", reason=last_line(error))
            if self.machine_lost(call.replica, error):
                return Broken(how="node", reason=one_line(error))
            if self.was_killed_for_memory(call.replica):
                return Broken(how="unfit", reason=OUT_OF_MEMORY, sure=False)
            return Broken(how="died", reason=one_line(error))
        except (rex.ActorUnschedulableError, rex.TaskUnschedulableError, rex.NodeDiedError) as error:
            return Broken(how="node", reason=one_line(error))
        except rex.OutOfMemoryError:
            return Broken(how="unfit", sure=False, reason="its machine has run out of memory, and Ray's memory monitor "
                          "ended it. Free memory there, or let fewer processes share it (--samplers)")
        except (rex.OutOfDiskError, rex.ObjectStoreFullError) as error:
            return Broken(how="unfit", reason=f"{last_line(error)} Free some of the disk of Ray's temporary folder "
                          "there (RAY_TMPDIR, TMPDIR or /tmp)")
        except rex.RuntimeEnvSetupError as error:
            return Broken(how="load", reason=last_line(error))
        except rex.TaskCancelledError:
            return Broken(how="cancelled", reason="it had not begun")
        except rex.ObjectLostError:
            return Broken(how="input", reason="Ray has lost the object")
        except rex.RayTaskError as error:
            if isinstance(error.cause, rex.ObjectLostError):
                return Broken(how="input", reason="Ray has lost the object")
            if call.kind != "work":                     # what it was to be made of cannot be read there
                return Broken(how="load", reason=last_line(error))
            unfit = machine_fault(error.cause)
            if unfit is None:
                raise
            return broken_by(unfit)
        if isinstance(answer, Hello):
            self.killed_before[call.replica] = answer.killed_for_memory
        return Alive() if answer is None else answer

    def was_killed_for_memory(self, replica: Replica) -> bool:
        """Whether some process was on this machine since the replica was started; whether this one, nobody says."""
        before = self.killed_before.get(replica)
        if before is None:
            return False
        ask = ray.remote(killed_for_memory).options(num_cpus=0, max_retries=0, scheduling_strategy=(
            NodeAffinitySchedulingStrategy(replica.placement.node, soft=False)))
        return (beside(ask) or 0) > before

    def machine_lost(self, replica: Replica, error: rex.ActorDiedError) -> bool:
        return (error.preempted or "node has died" in str(error)
                or replica.placement.node not in {node.id for node in nodes()})


def beside(method: Any) -> Any:
    """A process's answer beside its work; None where there is none: it hangs, or is dead."""
    try:
        return ray.get(method.remote(), timeout=BESIDE_S)
    except rex.RayError:
        return None


def last_line(error: BaseException) -> str:
    """Of Ray's page with another process's traceback: what that said in the end, as a terminal may show it."""
    lines = [line.strip() for line in TERMINAL.sub("", str(error)).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)[:500]


def one_line(error: BaseException) -> str:
    """The cause, of Ray's page-long messages: without the list of ids, and without what else it might have been."""
    lines = [line for line in str(error).splitlines() if not line.startswith("\t")]
    said = " ".join(TERMINAL.sub("", " ".join(lines)).removeprefix(rex.ActorDiedError.BASE_ERROR_MSG).split())
    return said.partition(" Some common causes")[0][:300].rstrip(". ")
