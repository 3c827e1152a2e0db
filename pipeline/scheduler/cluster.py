"""The pipeline on many machines, and on this one: Ray starts the processes, driver.py decides what they do.

    with cluster.connect("local"):
        for outcome in cluster.run(stages, requests):
            ...

Every death is answered by the driver and none by Ray (max_restarts=0), so that each has a cause and a count. With a
shelf in the pipeline only small references cross Ray; they live in the driver, and no lost machine takes them along.
Without one, embeddings and latents lie in Ray's object store, and what is lost with a machine is made again.
"""

import ipaddress
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import exceptions as rex
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dailies.actors.cores import usable_cores
from dailies.actors.device_lock import Halted
from dailies.actors.messages import Failure, Request
from dailies.model.private import at_home
from dailies.pipeline.scheduler import local_ray, ray_private
from dailies.pipeline.scheduler.budget import Budget
from dailies.pipeline.scheduler.driver import Driver
from dailies.pipeline.scheduler.executor import Alive, Answer, Broken, Call, ClusterError, Done, Hello, Replica
from dailies.pipeline.scheduler.faults import (
    OUT_OF_MEMORY,
    WorkerUnfit,
    killed_for_memory,
    machine_fault,
    store_trouble,
)
from dailies.pipeline.scheduler.intake import Stop
from dailies.pipeline.scheduler.placement import Node
from dailies.pipeline.scheduler.pool import Pool
from dailies.pipeline.scheduler.progress import Progress
from dailies.pipeline.stages import Outcome, Stage, Worker, readdress
from dailies.pipeline.store import NotFound, StoreError
from dailies.pipeline.store.base import PATIENCE

__all__ = ["ClusterError", "Progress", "Stop", "connect", "nodes", "run"]

BESIDE_S = 5.0                      # within which a process answers beside its work
MAKING_IT = "error raised in its creation task"         # Ray's words for an actor that could not be made
TERMINAL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")         # colours, which Ray puts into its errors
OBJECT_STORE_BYTES = 512 * 2**20    # of a local cluster; what does not fit goes to its disk


def run(stages: Sequence[Stage], requests: Iterable[Request], *, max_attempts: int = 3,
        task_timeout_s: float | None = 4 * 3600.0, on_progress: Callable[[Progress], None] | None = None,
        progress_every_s: float = 0.5, stop: Stop | None = None, budget: Budget | None = None) -> Iterator[Outcome]:
    """What `run_local` yields, in any order, from all machines of the connected cluster.

    requests: taken as the first stage has room, so there may be any number.  task_timeout_s: of one clip in one stage.
    budget: what does not fit in it is not begun, and has no outcome.
    All processes are ended when the iterator is exhausted or closed.
    Raises ClusterError when the machines cannot run the stages, StoreError when the store cannot be used.
    """
    if not ray.is_initialized():
        raise ClusterError("no cluster is connected; use `with cluster.connect(address):` around cluster.run")
    driver = Driver(RayExecutor(), stages, requests, max_attempts=max_attempts, task_timeout_s=task_timeout_s,
                    on_progress=on_progress, progress_every_s=progress_every_s, stop=stop, budget=budget)
    return on_this_machine(driver.outcomes())


def on_this_machine(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """The same; what is wrong with the driver's own machine is a ClusterError that says what to do."""
    try:
        yield from outcomes
    except (OSError, MemoryError) as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        raise ClusterError(f"this machine, which directs the work, cannot go on: {fault}. The same command continues"
                           ) from error


@contextmanager
def connect(address: str = "local", *, cpus: int | None = None, gpus: int | None = None,
            note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """A cluster for the time of the block: "local" starts one on this machine, "auto" finds the one around this process
    (RAY_ADDRESS, or `ray start` on this machine), HOST:PORT names one that this machine belongs to.

    cpus, gpus: what a local one says it has; None: the cores that this process may use, and the GPUs of the machine.
    note: is told when a local one has to be started again, which costs half a minute, and of a Ray that was never
    tried with.
    A local one listens on loopback only, asks for a token that is made for it, and keeps its files in a folder that
    only this user can enter (local_ray.py). It ends with this process, even when that is killed: raylet, GCS and
    workers within seconds, Ray's two agents, which keep its standard output open, after a minute or two. Call it in the
    main thread: they end with the thread that started them.
    Any other listens on every network interface, and whoever gets in runs programs there: without token authentication
    only a cluster on loopback is used.
    Raises ClusterError with the next step when there is no such cluster, or it is open to everybody.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if warning := ray_private.unknown_version():
        note(warning)
    ray_private.quiet_workers()
    with own_cluster(cpus, gpus, note) if address == "local" else another_cluster(address):
        yield


OPTIONS: dict[str, Any] = dict(namespace="dailies", log_to_driver=False, logging_level=logging.CRITICAL)


@contextmanager
def own_cluster(cpus: int | None, gpus: int | None, note: Callable[[str], None]) -> Iterator[None]:
    refuse_without_token("local")
    with local_ray.session_folder() as folder:
        local_ray.stand_somewhere(folder)
        try:
            with local_ray.changed(local_ray.environment(folder)), ray_private.on_loopback():
                ray_private.forget_token()
                start(folder, note, address="local", include_dashboard=False, num_cpus=cpus or usable_cores(),
                      num_gpus=gpus, object_store_memory=OBJECT_STORE_BYTES, _temp_dir=str(folder / local_ray.SESSION))
            yield
        finally:
            ray.shutdown()
            ray_private.forget_token()


def start(folder: Path, note: Callable[[str], None], **options: Any) -> None:
    """Raises ClusterError with what to do about it."""
    for last in (False, False, True):                   # on a busy machine Ray may not come up within its own 30 s
        try:
            ray.init(job_config=ray_private.Job(), **options, **OPTIONS)
            return
        except Exception as error:                      # Ray raises bare Exceptions too
            next_step = local_ray.advice(error, folder)
            ray.shutdown()
            if last or next_step != local_ray.BUSY:
                raise ClusterError(f"Ray does not start on this machine: {one_line(error)}. {next_step}") from error
            note(f"Ray did not come up in time: {one_line(error)}; starting it again")


@contextmanager
def another_cluster(address: str) -> Iterator[None]:
    named = f"{address!r}"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        named = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}, which the environment sets and --ray auto obeys"
    token = guard_token()
    address = reachable(address, named)
    ray_private.use_token()
    refuse_without_token(address, named)
    try:
        context = ray.init(address=address, job_config=ray_private.Job(), **OPTIONS)
    except Exception as error:                          # Ray raises bare Exceptions too
        ray.shutdown()
        raise ClusterError(f"Ray at {named} cannot be used: {one_line(error)}. It needs Ray {ray.__version__}, as "
                           f"here, and the cluster's token in {token}") from error
    try:
        if context.dashboard_url and answers_anyone(f"http://{context.dashboard_url}"):
            raise ClusterError(open_to_everybody(context.dashboard_url))
        yield
    finally:
        ray.shutdown()


def refuse_without_token(address: str, named: str = "'local'") -> None:
    """Unset, it is Ray that makes a local cluster one with tokens.  Raises ClusterError."""
    mode = os.environ.get("RAY_AUTH_MODE", "token" if address == "local" else "disabled").lower()
    if mode == "disabled" and (address == "local" or not is_loopback(address.rpartition(":")[0])):
        raise ClusterError(f"Ray at {named}: RAY_AUTH_MODE is {mode!r}, so whoever reaches this port could run "
                           "programs here. Set RAY_AUTH_MODE=token, and start the cluster with it")


def guard_token() -> Path:
    """Ray writes its token readable for everyone; here it is kept for its owner only. Where it is looked for."""
    path = at_home(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")
    with suppress(OSError):                             # not there, or not ours
        if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
    return path


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that host, by name or number."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None)}
        return all(ipaddress.ip_address(number).is_loopback for number in found)
    except (OSError, ValueError):
        return False


def answers_anyone(url: str) -> bool:
    """Whether a head's dashboard that is not on loopback lists its jobs, and so takes them, without a token."""
    if is_loopback(urlsplit(url).hostname or ""):
        return False
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/jobs/", timeout=10) as answer:
            return answer.status == 200
    except (OSError, ValueError, HTTPException):        # refused for want of a token, or not to be reached from here
        return False


def open_to_everybody(address: str) -> str:
    return (f"the Ray head at {address} asks for no token, so whoever reaches it runs programs there. Start it with "
            "RAY_AUTH_MODE=token and a token (infra/rayjob.yaml does), or with --dashboard-host 127.0.0.1")


def reachable(address: str, named: str) -> str:
    """The cluster's HOST:PORT, once something answers there: Ray itself would try for minutes.

    named: what the person said, for messages.  Raises ClusterError.
    """
    said = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if said.startswith("ray://"):
        raise ClusterError(f"{named}: a Ray Client address cannot carry a render; use `dailies submit` with the "
                           "cluster's http://HEAD:8265, or run on a machine of the cluster with --ray auto")
    try:
        found = ray_private.full_address(around_here() if said in ("", "auto") else said)
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        unset = "unset RAY_ADDRESS or " if named.startswith("RAY_ADDRESS") else ""
        raise ClusterError(f"no Ray cluster answers at {named}: {error}. Start one with `ray start --head`, "
                           f"{unset}name another with --ray HOST:6379, or use --ray local") from None
    return found


def around_here() -> str:
    """The address of the cluster that this machine belongs to.  Raises ConnectionError with what there is instead.

    Ray's own search goes by what any process of any user says in its command line, and by a file in /tmp/ray, which is
    open for all to write to; where that leads gets the token, and what it answers is unpickled.
    """
    there = own_raylets()
    latest = ray_private.latest_address()               # several: that of the last `ray start`, where it is one of them
    if len(there) > 1 and latest in there:
        return latest
    if len(there) != 1:
        raise ConnectionError(f"{len(there)} clusters have a raylet of this user's or of root's on this machine"
                              + "".join(f", {address}" for address in sorted(there)))
    return there.pop()


def own_raylets() -> set[str]:
    """HOST:PORT of each cluster that a raylet on this machine belongs to; those of other users do not count."""
    found, trusted = set(), {0, os.getuid()}
    for process in ray_private.processes():
        said, uids = process.info["cmdline"], process.info["uids"]
        if said and uids and {uids.real, uids.effective} <= trusted and "raylet" in os.path.basename(said[0]):
            found |= {each.partition("=")[2] for each in said if each.startswith("--gcs-address=")}
    return found - {"", "None"}


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
            if self.is_recalled():
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
