"""A Ray cluster of several machines on this one: each is a `ray start`, and is lost when all its processes are."""

import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.losses import MACHINE

START_S = 180.0                         # on a machine that is busy with other things
STORE_BYTES = 80 * 2**20                # of a machine's object store; only references cross it
# niceness: as Ray's, 15, workers starve beside any other work of a small machine
SETTINGS = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
PR_SET_PDEATHSIG = 1


class CannotStart(RuntimeError):
    """A machine of the cluster did not start; the message says why."""


@dataclass(eq=False)
class Machine:
    name: str
    process: subprocess.Popen
    log: Path
    temporary: Path                     # its processes' folder for temporary files

    @property
    def is_up(self) -> bool:
        """Raises CannotStart where it has ended."""
        said = self.log.read_text(errors="replace")
        if self.process.poll() is not None:
            raise CannotStart(f"ray start ended with {self.process.returncode}: {said[-500:]}")
        return "This command will now block" in said    # the last that it says, after the address

    def lose(self) -> None:
        """All that runs there, at once and without a word."""
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid)
            for each in (started, *started.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):    # psutil looks whether it is still the same process
                    each.send_signal(signal.SIGKILL)
        self.process.wait()


class Machines:
    """A head, which no work runs on and which is never lost, and `count` others with `cpus` each.

    Their processes inherit this one's environment, and end with it, even if it is killed.
    """

    def __init__(self, folder: Path, count: int, cpus: float):
        """folder: for what they say.  Raises CannotStart."""
        self.folder, self.cpus, self.started = folder, cpus, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ |= {"RAY_AUTH_TOKEN": secrets.token_hex(16)} | SETTINGS
        self.others: list[Machine] = []
        self.head = self.start("--head", "--port=0", "--num-cpus=0", "--include-dashboard=false")
        try:
            self.wait_for(self.head)
            self.address = re.search(r"--address='([^']+)'", self.head.log.read_text())[1]
            for _ in range(count):                      # one by one: two at once choose the same names for their files
                self.add()
                self.wait_for(self.others[-1])
        except BaseException:
            self.end()
            raise

    def start(self, *options: str) -> Machine:
        self.started += 1
        name = f"machine-{self.started}"
        log, temporary = self.folder / f"{name}.log", self.folder / f"{name}.tmp"
        temporary.mkdir()
        # Ray's own sockets need a short path
        environment = os.environ | {MACHINE: name, "TMPDIR": str(temporary), "RAY_TMPDIR": tempfile.gettempdir()}
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options, "--disable-usage-stats",
                   f"--object-store-memory={STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0",
                   "--dashboard-agent-listen-port=0", "--include-log-monitor=false"]
        with open(log, "wb") as said:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment,
                                       preexec_fn=end_with_parent)
        return Machine(name, process, log, temporary)

    def add(self) -> None:
        """Takes seconds; it is not waited for."""
        self.others.append(self.start(f"--address={self.address}", f"--num-cpus={self.cpus:g}"))

    def wait_for(self, machine: Machine) -> None:
        ends = time.monotonic() + START_S
        while not machine.is_up:
            if time.monotonic() > ends:
                raise CannotStart(f"ray start takes more than {START_S:.0f} s: {machine.log.read_text()[-500:]}")
            time.sleep(0.1)

    def lose(self, machine: Machine) -> None:
        self.others.remove(machine)
        machine.lose()

    def end(self) -> None:
        for machine in [*self.others, self.head]:
            machine.lose()
        self.others = []


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
