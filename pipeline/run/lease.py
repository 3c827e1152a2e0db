"""One driver per run folder: lease.json says who it is, and it is renewed for as long as that driver lives.

Taken by a conditional create, renewed and taken over by compare-and-swap, so that of two drivers one always learns that
it is not the one. A store without compare-and-swap gets a weaker lease: two that begin within SETTLE_S are still told
apart, two that take over a silent driver's run in the very same moment might not be. Clips are safe even then, because
publishing one is a conditional create of its own; work may be done twice.

No clock is compared with another machine's: a lease has expired when it was watched for LEASE_S and did not change.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from dailies.model.errors import DailiesError
from dailies.pipeline.manifest.validation import shown
from dailies.pipeline.run.layout import LEASE
from dailies.pipeline.store import NotFound, Store, StoreError, TooLarge
from dailies.pipeline.store.folder import TEMPORARY_FOLDER

MAX_LEASE_BYTES = 2**16


class LeaseError(DailiesError, RuntimeError):
    """Another driver has the run folder; the message says who."""

    exit_code = 5                       # the command is right, and continues the run once the folder is free


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A lease as it stands in the run folder."""

    id: str = ""
    host: str = "?"
    pid: int = 0
    machine: str = ""                   # this start of the machine, this space of process ids; "" where nobody can tell
    process_start: str = ""             # another process may get the same pid later
    renewed_at: datetime | None = None
    expires_at: datetime | None = None
    released: bool = False

    @classmethod
    def read(cls, data: bytes) -> Self:
        """What is no lease is one of nobody, which expires as any other."""
        try:
            said = json.loads(data)
            return cls(id=str(said["id"]), host=str(said["host"]), machine=str(said["machine"]), pid=int(said["pid"]),
                       process_start=str(said["process_start"]), released=said["released"] is True,
                       renewed_at=datetime.fromisoformat(said["renewed_at"]),
                       expires_at=datetime.fromisoformat(said["expires_at"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return cls()

    @property
    def is_silent(self) -> bool:
        """By this machine's clock, it should have renewed its lease by now."""
        try:
            return self.expires_at is None or self.expires_at < datetime.now(UTC)
        except TypeError:                               # a time without a zone: not one of ours
            return True

    @property
    def is_dead(self) -> bool:
        """It ran on this machine, and this machine knows that it has ended."""
        return self.machine != "" and self.machine == this_machine() and not is_alive(self.pid, self.process_start)

    def __str__(self) -> str:
        if not self.id:
            return "a driver that nobody knows"
        return f"pid {self.pid} on {shown(self.host)}"


class Lease:
    """This driver's hold on a run folder, renewed by a thread until the block ends.

    `check` raises LeaseError once another driver has it; `on_lost` is called at that moment, from the thread.
    """

    LEASE_S = 60.0
    RENEW_S = 20.0
    POLL_S = 2.0                        # between two looks at a lease that is being watched
    SETTLE_S = 2.0                      # without compare-and-swap: after which the last writer is the one

    def __init__(self, store: Store, *, atomic: bool):
        self.store, self.atomic, self.id = store, atomic, secrets.token_hex(8)
        self.renewals, self.renewed = 0, time.monotonic()
        self.lost: str | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self.lock, self.over = threading.Lock(), threading.Event()

    @classmethod
    def take(cls, store: Store, *, wait: bool = False, queue: bool = False,
             tell: Callable[[str], None] = lambda text: None) -> Self:
        """The lease of a run folder that no driver works on, or whose driver has ended or been silent for LEASE_S.

        wait: where the driver was heard of lately, see whether it stays silent.  queue: where one works, wait until
        it has ended, however long that is.  tell: what a person should know.
        Raises LeaseError where another driver works on it, StoreError.
        """
        lease = cls(store, atomic=store.can_swap())
        if not lease.atomic:
            tell(f"{store.uri}: this store has no compare-and-swap (If-Match), so two drivers that take over this run "
                 "in the same moment may both go on. No clip would be published twice; work might be done twice")
        watched, since, waits_for = None, 0.0, ""
        while True:
            mine = lease.written()
            try:
                found = look(store)
            except NotFound:
                if store.create(LEASE, mine):
                    break
                continue
            holder = Holder.read(found)
            if not holder.released and holder.is_dead:
                tell(f"{store.uri}: the last command here, {holder}, has ended unawares, as when it is killed; this "
                     "one goes on in its place")
            elif not holder.released:
                if found != watched and queue:
                    if holder.id != waits_for:
                        tell(f"{store.uri}: {holder} works on this run; waiting until it has ended")
                    watched, since, waits_for = found, time.monotonic(), holder.id
                if found != watched:
                    if watched is not None or not (wait or holder.is_silent):
                        raise LeaseError(held(store, holder))
                    tell(f"{store.uri}: {holder} has this run folder and has ended or is silent; watching it for "
                         f"{cls.LEASE_S:.0f} s")
                    watched, since = found, time.monotonic()
                if time.monotonic() - since < cls.LEASE_S:
                    time.sleep(cls.POLL_S)
                    continue
            if store.swap(LEASE, found, mine, atomic=lease.atomic):
                break
        if not lease.atomic:
            time.sleep(cls.SETTLE_S)
            if (now := look(store)) != mine:
                raise LeaseError(held(store, Holder.read(now)))
        lease.renewed = time.monotonic()
        return lease

    def __enter__(self) -> Self:
        threading.Thread(target=self.keep, name="lease", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the folder back, also where a run broke off; if the store is away, the lease expires by itself."""
        self.over.set()
        with suppress(StoreError), self.lock:
            if self.lost is None:
                self.write(released=True)
                self.store.tidy(TEMPORARY_FOLDER)

    def keep(self) -> None:
        while not self.over.wait(self.RENEW_S):
            with suppress(StoreError):                  # while the store is away nobody else can take the lease either
                self.renew()

    def renew(self) -> None:
        with self.lock:
            if self.lost is None and not self.over.is_set():
                self.write()
        if self.lost is not None:
            self.on_lost()

    def write(self, released: bool = False) -> None:
        """Put our lease down anew, or learn that it is ours no more."""
        while True:
            try:
                found = look(self.store)
            except NotFound:
                self.lost = f"nobody ({LEASE} was removed)"
                return
            if (holder := Holder.read(found)).id != self.id:
                self.lost = str(holder)
                return
            self.renewals += 1
            if self.store.swap(LEASE, found, self.written(released), atomic=self.atomic):
                self.renewed = time.monotonic()
                return

    def check(self) -> None:
        """Raises LeaseError if the run is another driver's by now, also after this machine has slept; StoreError."""
        if self.lost is None and time.monotonic() - self.renewed > self.LEASE_S:
            self.renew()
        if self.lost is not None:
            raise LeaseError(f"{self.store.uri}: the run folder is no longer this driver's: it belongs to {self.lost}. "
                             "This driver has stopped; the same command continues when no other one is at work")

    def written(self, released: bool = False) -> bytes:
        """lease.json as it is now; never the same twice."""
        now = datetime.now(UTC)
        said: dict[str, Any] = {
            "host": socket.gethostname(), "pid": os.getpid(), "id": self.id, "renewals": self.renewals,
            "renewed_at": now.isoformat(), "expires_at": (now + timedelta(seconds=self.LEASE_S)).isoformat(),
            "released": released, "machine": this_machine(), "process_start": process_start(os.getpid()) or ""}
        return json.dumps(said, indent=2).encode() + b"\n"


def look(store: Store) -> bytes:
    """lease.json as it stands.  Raises NotFound, StoreError."""
    try:
        return store.get(LEASE, at_most=MAX_LEASE_BYTES)
    except TooLarge as error:
        raise StoreError(f"{store.uri_of(LEASE)} is larger than any lease ({error}). Move it away") from None


def held(store: Store, holder: Holder) -> str:
    heard = "" if holder.renewed_at is None else f", last heard of at {holder.renewed_at:%H:%M:%S} UTC"
    return (f"{store.uri}: another driver works on this run: {holder}{heard}. A run folder has one driver at a time: "
            f"wait for it (--wait), or stop it; `dailies status` shows how far it is. If its machine is gone, "
            f"--take-over goes on in its place after {Lease.LEASE_S:.0f} s of silence")


def this_machine() -> str:
    """Equal for two processes of which one can see whether the other lives; "" where the system does not say."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def is_alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return process_start(pid) in (started, None)


def process_start(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; "" if it has ended, None where that cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else fields[19]
