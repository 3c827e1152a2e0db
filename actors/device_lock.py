"""Whose turn it is on a device: the threads of one process, and the processes that share one GPU.

A process keeps its GPU busy by having the next value fetched, and the last one saved, by other threads meanwhile; so
one thread computes at a time, in the order in which they came. Sampler and decoder that share a GPU are processes: they
take turns too, the sampler between two steps. CUDA would slice the time by itself, but then nobody could say how long a
stage takes: seconds measured here are seconds of one GPU, and may be added. (An encoder has too little to do to wait
for a sampler's step. It gets its slices from CUDA.)

Between processes it is two locks of files in a folder of this user's: the device, and before it a turnstile, so that
who gives way does not get the device back before who waits for it. A process that ends, however, holds no lock.
"""

import fcntl
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from dailies.model.private import lock_folder

log = logging.getLogger(__name__)

PID_BYTES = 20
POLL_S = 0.1                                            # between two looks whether one who waits is told to stop


class Halted(Exception):
    """Stopped before work was begun, or between two steps of it; what was done is saved."""


class DeviceLock:
    """`with lock:` around what computes on the device."""

    def __init__(self, device: str | None = None, halted: Callable[[], bool] = lambda: False, *,
                 entered: Callable[[], None] = lambda: None, leaving: Callable[[], None] = lambda: None):
        """device: a name that all processes on this machine have for it; None: no other process uses it.
        halted: asked while a thread waits for those before it: is it not to begin?  entered, leaving: called within.
        """
        self.halted, self.entered, self.leaving = halted, entered, leaving
        self.changed = threading.Condition()
        self.queue: deque[object] = deque()             # whose turn it is, then who waits; threads of this process
        self.mine = threading.local()
        self.turnstile, self.device = lock_files(device) if device else (None, None)
        self.kept_s = 0.0                               # by other processes
        self.kept_since: float | None = None

    @property
    def waited_s(self) -> float:
        """By this thread, in all."""
        return getattr(self.mine, "waited_s", 0.0)

    @property
    def held_s(self) -> float:
        """By this thread, in all."""
        return getattr(self.mine, "held_s", 0.0)

    def kept_waiting_s(self) -> float:
        """By other processes, in all; may be asked by any thread."""
        since = self.kept_since
        return self.kept_s + (time.monotonic() - since if since else 0.0)

    def waits_for(self) -> tuple[str, float] | None:
        """The process that has the device now, and since when it is waited for, in seconds; any thread may ask."""
        since = self.kept_since
        return None if since is None or self.device is None else (holder(self.device), time.monotonic() - since)

    def __enter__(self) -> Self:
        """Raises Halted."""
        began, me = time.perf_counter(), object()
        with self.changed:
            self.queue.append(me)
            while self.queue[0] is not me:
                self.changed.wait(POLL_S)
                if self.queue[0] is not me and self.halted():
                    self.queue.remove(me)
                    raise Halted("not begun")
        try:
            self.take()
            self.mine.waited_s = self.waited_s + time.perf_counter() - began
            self.mine.since = time.perf_counter()
            self.entered()
        except BaseException:                           # or all others would wait for ever
            self.leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.leaving()
        finally:
            self.mine.held_s = self.held_s + time.perf_counter() - self.mine.since
            self.leave()

    def leave(self) -> None:
        self.release()
        with self.changed:
            self.queue.popleft()
            self.changed.notify_all()

    def is_wanted(self) -> bool:
        """Whether another process waits for the device that this thread has."""
        if self.turnstile is None:
            return False
        try:
            fcntl.flock(self.turnstile, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(self.turnstile, fcntl.LOCK_UN)
        return False

    def give_way(self) -> None:
        """Let the other process have the device, and get it back; what was begun on it must have ended."""
        began = time.perf_counter()
        self.release()
        self.take()
        away_s = time.perf_counter() - began
        self.mine.waited_s = self.waited_s + away_s
        self.mine.since += away_s

    def take(self) -> None:
        if self.turnstile is None:
            return
        self.kept_since = time.monotonic()
        try:
            fcntl.flock(self.turnstile, fcntl.LOCK_EX)
            fcntl.flock(self.device, fcntl.LOCK_EX)
            fcntl.flock(self.turnstile, fcntl.LOCK_UN)
            with suppress(OSError):                     # a full disk: then nobody is told who has it
                os.pwrite(self.device, f"{os.getpid():<{PID_BYTES}}".encode(), 0)
        finally:
            self.kept_s, self.kept_since = self.kept_waiting_s(), None

    def release(self) -> None:
        for file in (self.device, self.turnstile):      # the second only where taking the first has failed
            if file is not None:
                fcntl.flock(file, fcntl.LOCK_UN)

    def __del__(self) -> None:
        for file in (self.turnstile, self.device):
            if file is not None:
                with suppress(OSError):
                    os.close(file)


NO_LOCK = DeviceLock()                                  # of an actor that is used alone


def holder(device: int) -> str:
    """Who has, or last had, a device: its number and name.  device: its lock's file."""
    try:
        pid = int(os.pread(device, PID_BYTES, 0))
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()    # no arguments: they may be secret
    except (OSError, ValueError):                       # ended, of another container, or nothing was written
        return "another process"
    return f"process {pid} ({name})"


def lock_files(device: str) -> tuple[int, int] | tuple[None, None]:
    """Turnstile and device, open; None where there is no folder that only this user can write to: then the processes
    share the GPU as CUDA has it.
    """
    name = "".join(char if char.isalnum() or char == "-" else "_" for char in device)
    try:
        folder = lock_folder()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        turnstile, held = (os.open(folder / f"{kind}-{name}", flags, 0o600) for kind in ("turnstile", "device"))
        return turnstile, held
    except OSError as error:
        log.warning("processes on one GPU do not take turns, and seconds of stages count those of others: %s", error)
        return None, None
