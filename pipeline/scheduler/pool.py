"""Processes beside a worker that do the last of its work on CPUs: H.264 is made while the GPU decodes the next clip.

They are children of the worker's process, so frames stay on its machine (handover.py) and end with it. The worker's
threads each bring a value, wait for a process that is free, and take its answer; more values than there are threads,
or more bytes of frames than FRAMES_BYTES, are never on their way.

    worker's process   fetch - decode ----+---- fetch - decode ----+----
    first child                           +-- gate - encode - check - publish
    second child                                                   +-- gate - encode - check - publish

A child that dies costs the value that it had, which fails as if its worker had died, and another is started.
"""

import os
import pickle
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from dailies.actors import handover
from dailies.actors.messages import Failure, Request
from dailies.pipeline.scheduler.faults import OUT_OF_MEMORY, WorkerUnfit, killed_for_memory, machine_fault
from dailies.pipeline.stages import Report, Step, Worker, request_of
from dailies.pipeline.store import StoreError
from dailies.pipeline.store.base import PATIENCE

FRAMES_BYTES = 2 * 2**30                # of clips between their decoding and their answer; one clip may be larger
NICER = 4                               # the thread that feeds the GPU goes first
_LOAD_S = 300.0                          # within which a child must have made its steps, also on a busy machine
TICK_S = 1.0                            # between two words of a child that waits for the store


class ChildFailed(RuntimeError):
    """A child could not make its steps."""


class Pool:
    """Called by several threads side by side: a list of values in, what the steps make of them out."""

    def __init__(self, stage: str, steps: Sequence[Step], processes: int, *, name: str, device: str):
        """name, device: of the worker, for the ledger.  Raises ChildFailed."""
        self.said: dict[str, Any] = dict(stage=stage, steps=tuple(steps), name=name, device=device)
        self.stage, self.processes = stage, processes
        self.free: queue.SimpleQueue[Child] = queue.SimpleQueue()
        self.waited_s, self.bytes, self.changed = 0.0, 0, threading.Condition()
        self.children: list[Child] = []
        try:
            self.children += [Child(self) for _ in range(processes)]    # side by side: each imports for seconds
            for child in self.children:
                child.wait_until_ready()
                self.free.put(child)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def reserve(self, requests: Sequence[Request]) -> Iterator[None]:
        """For the frames of these clips, from before they are decoded until their answer is there."""
        wanted = sum(frame_bytes(request) for request in requests)
        with self.changed:
            while self.bytes and self.bytes + wanted > FRAMES_BYTES:
                self.changed.wait()
            self.bytes += wanted
        try:
            yield
        finally:
            with self.changed:
                self.bytes -= wanted
                self.changed.notify_all()

    def kept_waiting_s(self) -> float:
        """By the store, in all; of children that wait side by side the sum."""
        return self.waited_s

    def __call__(self, values: list, safe: bool) -> tuple[list, Report]:
        """A Failure passes untouched.  Raises what is no value's fault: StoreError, NotFound, WorkerUnfit."""
        seconds: dict[str, float] = {}
        made, peak = list(values), 0
        for place, value in enumerate(values):
            if not isinstance(value, Failure):
                made[place], report = self.work(value, safe)
                for name, spent in report.seconds.items():
                    seconds[name] = seconds.get(name, 0.0) + spent / len(values)
                peak = max(peak, report.peak_memory_bytes)
        pace_s = sum(seconds.values()) / self.processes
        return made, Report(seconds=seconds, worker=self.said["name"], device=self.said["device"], pace_s=pace_s,
                            peak_memory_bytes=peak)

    def work(self, value: Any, safe: bool) -> tuple[Any, Report]:
        child, began = self.free.get(), time.perf_counter()
        try:
            if child.process.poll() is not None:        # while it had nothing to do: no clip's doing
                child = self.replace(child)
            answer = child.ask((value, safe))
        except handover.Closed:
            code = child.end()
            answer = f"its process ended at work: {ended(code)}"
            if killed_for_memory() > child.killed_before or code == -signal.SIGBUS:     # memory that both see is gone
                answer = WorkerUnfit(f"stage {self.stage}: {OUT_OF_MEMORY}", sure=False)
            child = self.replace(child)
        except (OSError, MemoryError) as error:         # no memory, no descriptor: the worker's, and not the clip's
            raise unfit(f"frames of stage {self.stage} could not be handed over", error) from error
        finally:
            self.free.put(child)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, str):
            failure = Failure(request=request_of(value), stage=self.stage, error_type="WorkerDied", error=answer,
                              worker=self.said["name"], device=self.said["device"])
            return failure, Report(seconds={self.stage: time.perf_counter() - began}, worker=self.said["name"],
                                   device=self.said["device"], peak_memory_bytes=0)
        (made,), report = answer
        return made, report

    def replace(self, child: "Child") -> "Child":
        """Raises WorkerUnfit where none can be started."""
        place = self.children.index(child)
        try:
            replacement = Child(self)
            try:
                replacement.wait_until_ready()
            except BaseException:                       # the dead one keeps its place, and is replaced another time
                replacement.end()
                raise
            self.children[place] = replacement
        except StoreError:
            raise
        except Exception as error:                      # steps that were made before cannot be made now
            raise unfit(f"a process of stage {self.stage} ended, and no other could start", error) from error
        return replacement

    def close(self) -> None:
        for child in self.children:
            child.end()


class Child:
    """One process of a pool, seen from the worker's."""

    def __init__(self, pool: Pool):
        self.pool, self.store_waits_s, self.killed_before = pool, 0.0, killed_for_memory()
        self.connection, theirs = socket.socketpair()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                                    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        log = os.dup(2)                                 # where it speaks once it is there; until then it is listened to
        try:
            with theirs:
                command = [sys.executable, "-P", "-c",
                           f"from dailies.pipeline.scheduler.pool import serve; serve({theirs.fileno()}, {log})"]
                self.said = file_in_memory()
                self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno(), log],
                                                stdin=subprocess.DEVNULL, stderr=self.said)
        finally:
            os.close(log)

    def wait_until_ready(self) -> None:
        self.connection.settimeout(_LOAD_S)
        try:
            answer = self.ask(self.pool.said)
        except (handover.Closed, TimeoutError) as error:
            raise ChildFailed(f"a process of stage {self.pool.stage} did not start: {self.last_words()}") from error
        self.connection.settimeout(None)
        if isinstance(answer, BaseException):
            self.end()
            raise answer

    def last_words(self) -> str:
        """What it said in the end, before it could speak for itself: the last line of its error."""
        code = ended(self.end())
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").split("\n")
        return next((f"{line.strip()} ({code})" for line in reversed(lines) if line.strip()), code)

    def ask(self, said: Any) -> Any:
        """Raises Closed."""
        handover.send(self.connection, said)
        while isinstance(answer := handover.receive(self.connection), StoreWaits):
            self.pool.waited_s += max(0.0, answer.seconds - self.store_waits_s)
            self.store_waits_s = answer.seconds
        return answer

    def end(self) -> int:
        """Its exit code, negative for a signal."""
        self.connection.close()                         # it ends by itself, but maybe not at once
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(0.5)
        self.process.kill()
        return self.process.wait()


def unfit(what: str, error: Exception) -> WorkerUnfit:
    found = machine_fault(error)
    return WorkerUnfit(f"{what}: {found or error}", lasting=found is not None and found.lasting)


class StoreWaits:
    """A child's word that it waits for the store; `seconds` in all."""

    def __init__(self, seconds: float):
        self.seconds = seconds


def ended(code: int) -> str:
    with suppress(ValueError):
        return f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"signal {-code}"


def frame_bytes(request: Request) -> int:
    shape = request.shape
    return shape.frames * shape.height * shape.width * 3


def file_in_memory() -> BinaryIO:
    return open(os.memfd_create("dailies-said", os.MFD_CLOEXEC), "w+b", buffering=0)


def serve(descriptor: int, log: int) -> None:
    """A child, until the worker's process ends.  log: what it writes to from here on."""
    os.dup2(log, 2)
    os.close(log)
    for number in (signal.SIGINT, signal.SIGTERM):      # it is the worker that is told, and decides
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICER)
    connection, speaks = socket.socket(fileno=descriptor), threading.Lock()
    threading.Thread(target=watch, args=(connection, speaks), daemon=True).start()

    def tell(answer: Any) -> None:
        with speaks:
            handover.send(connection, answer)

    try:
        said = handover.receive(connection)
        try:
            worker = Worker(said["stage"], said["steps"], threads=1, name=said["name"])
            worker.device = said["device"]              # for the ledger: what the clip was decoded on
            tell("ready")
        except Exception as error:
            tell(portable(error))
            return
        while True:
            try:
                value, safe = handover.receive(connection)
            except (OSError, MemoryError) as error:
                if isinstance(error, handover.Closed):
                    return
                tell(portable(error))                   # no room for it; where the next begins is not known
                return
            try:
                answer: Any = worker([value], safe)
            except Exception as error:
                answer = portable(error)
            del value                                   # its memory, before the next one comes
            tell(answer)
    except handover.Closed:
        return


def watch(connection: socket.socket, speaks: threading.Lock) -> None:
    """End at once when the worker's process has; say so while the store keeps this one waiting."""
    closed = select.poll()
    closed.register(connection, select.POLLHUP | select.POLLERR)
    while not closed.poll(1000 * TICK_S):
        if PATIENCE.since:
            with speaks, suppress(handover.Closed):
                handover.send(connection, StoreWaits(PATIENCE.in_all_s()))
    os._exit(1)


def portable(error: Exception) -> Exception:
    """The error itself where it can travel; what it says where it cannot. What is wrong with the machine is found here,
    since what it was raised from does not travel.
    """
    error = machine_fault(error) or error
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
