"""A night under fire: `dailies render` over and over, until it has ended by itself, while its processes are killed."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.chaos.fakes import Script
from tests.chaos.machines import Machines, end_with_parent
from tests.chaos.program import SCRIPT
from tests.chaos.tally import Tally
from tests.chaos.weather import Weather

ROOT = Path(__file__).resolve().parents[2]
SAMPLERS = 4

# who is killed, and what it is doing at that moment; None: whatever it is doing
ROLES = {"driver": None, "encoder": None, "sampler": None, "decoder": "decoding", "writer": "writing", "node": None}
STAGES = {"encoder": "encode", "sampler": "sample", "decoder": "publish", "writer": "publish"}
WAIT_FOR_ROLE_S = 1.5                   # then somebody else is killed
LAST_KILL = 0.85                        # of the clips: so that the run does not end before
EARLY = 0.2                             # share of the kills that wait for no progress: they meet what is just starting,
EARLY_S = 8.0                           # at most so long after the kill before
REPAIR_S = (0.5, 4.0)                   # until there is a new machine for one that was lost
ENDS_S = 600.0                          # within which a driver ends that must, also on a machine with other work


class GaveUp(RuntimeError):
    """The night did not end as it must."""


@dataclass(kw_only=True)
class Night:
    """What it went through. Kills come at random moments of its progress, and sometimes before there is any.

    Every driver that it has started ends with the block.
    """

    folder: Path                        # of this night: manifest, notes, what the drivers said
    out: str
    machines: Machines
    script: Script
    rng: random.Random
    kills: int = 0
    num_clips: int = 0                  # kills are spread over so many
    weather: Weather | None = None
    expiries: int = 0                   # times that the credentials expire
    limit_s: float = 3600.0
    killed: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    exits: list[int] = field(default_factory=list)      # of drivers that ended by themselves
    seconds: float = 0.0
    republished: set[str] = field(default_factory=set)  # clips in a folder that were seen as two different files

    def __post_init__(self) -> None:
        self.tally = Tally(Path(self.script.notes))
        self.tally.read()
        self.seen: dict[str, tuple[int, int]] = {}
        self.repair_at = 0.0                            # when a lost machine is replaced
        self.drivers: list[subprocess.Popen] = []
        self.target, self.wait_until = "", 0.0          # the role that is to be killed, and until when

    def start(self, *options: str, ray: str | None = None) -> subprocess.Popen:
        """A driver.  ray: None for the machines that this night has."""
        self.starts += 1
        command = [sys.executable, "-m", "tests.chaos.program", "render", str(self.folder / "night.jsonl"),
                   "--out", self.out, "--model", "tiny", "--device", "cpu", "--samplers", str(SAMPLERS),
                   "--ray", ray or self.machines.address, "--json", *options]
        with open(self.folder / f"driver-{self.starts}.out", "wb") as out, \
                open(self.folder / f"driver-{self.starts}.err", "wb") as err:
            self.drivers.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                                 env=os.environ | {SCRIPT: json.dumps(asdict(self.script))},
                                                 preexec_fn=end_with_parent))
        return self.drivers[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()

    def wait(self, driver: subprocess.Popen) -> int:
        """Its exit code.  Raises GaveUp where it does not end."""
        try:
            return driver.wait(ENDS_S)
        except subprocess.TimeoutExpired:
            raise GaveUp(f"a driver should have ended within {ENDS_S:.0f} s\n{self.errors()}") from None

    def said(self, number: int | None = None) -> dict[str, Any]:
        """The answer of a driver that ended by itself; the last one's."""
        text = (self.folder / f"driver-{number or self.starts}.out").read_text()
        return json.loads(text.splitlines()[-1]) if text.strip() else {}

    def errors(self) -> str:
        return (self.folder / f"driver-{self.starts}.err").read_text()[-1000:]

    def run(self, *options: str, ends_with: tuple[int, ...] = (0,)) -> Self:
        """From the start of a driver until one ends with a code of ends_with.

        One that was killed is restarted; so is one that ended with 5 because the credentials had expired, as a person
        would.  Raises GaveUp where a driver ends with another code, or after limit_s.
        """
        began = time.monotonic()
        last = max(self.kills, int(LAST_KILL * self.num_clips))
        self.kills_at = sorted(self.rng.sample(range(last), self.kills))
        self.expiries_at = sorted(self.rng.sample(range(last), self.expiries))
        self.fire_at = math.inf
        self.driver = self.start(*options)
        while not self.is_over(ends_with):
            if time.monotonic() - began > self.limit_s:
                raise GaveUp(f"not done after {self.limit_s:.0f} s: {len(self.tally.kept)} latents, "
                             f"{sum(self.killed.values())} kills\n{self.errors()}")
            if self.driver.poll() is not None:
                self.driver = self.start(*options)
            self.tally.read()
            self.repair()
            self.make_weather()
            self.strike()
            time.sleep(0.003 if self.target else 0.03)
        self.tally.read()
        self.look_at_clips()
        self.seconds = time.monotonic() - began
        return self

    def is_over(self, ends_with: tuple[int, ...]) -> bool:
        code = self.driver.poll()
        if code is None or code == -signal.SIGKILL:
            return False
        self.exits.append(code)
        if code in ends_with or code == 5 and self.weather:
            return code in ends_with
        raise GaveUp(f"driver {self.starts} ended with {code}\n{self.said()}\n{self.errors()}")

    def repair(self) -> None:
        if self.repair_at and time.monotonic() >= self.repair_at:
            self.repair_at = 0.0
            self.machines.add()

    def make_weather(self) -> None:
        if self.weather:
            if self.expiries_at and len(self.tally.kept) >= self.expiries_at[0]:
                self.expiries_at.pop(0)
                self.weather.expire()
            self.weather.blow()

    def strike(self) -> None:
        """Kill somebody, if it is time: after so many latents, or soon after the kill before."""
        now = time.monotonic()
        if not self.target:
            if not self.kills_at or len(self.tally.kept) < self.kills_at[0] and now < self.fire_at:
                return
            self.kills_at.pop(0)
        if not self.target or now >= self.wait_until:
            self.target, self.wait_until = self.rng.choice(list(ROLES)), now + WAIT_FOR_ROLE_S
        if self.kill(self.target):
            self.look_at_clips()
            self.target = ""
            self.fire_at = now + self.rng.uniform(0, EARLY_S) if self.rng.random() < EARLY else math.inf

    def kill(self, role: str) -> bool:
        """Whether there was one to be killed."""
        self.tally.read()
        if role == "driver":
            if self.driver.poll() is not None:
                return False
            self.driver.kill()
            self.driver.wait()
        elif role == "node":
            machines = self.machines.others
            if self.repair_at or not all(machine.is_up for machine in machines):
                return False                            # one at a time
            self.machines.lose(self.rng.choice(machines))
            self.repair_at = time.monotonic() + self.rng.uniform(*REPAIR_S)
        else:
            there = [process for process in self.tally.alive(STAGES[role]) if ROLES[role] in (None, process.doing)]
            if not there:
                return False
            os.kill(self.rng.choice(there).pid, signal.SIGKILL)
        self.killed[role] = self.killed.get(role, 0) + 1
        return True

    def clips(self) -> list[Path]:
        """The files of a folder's clips; of a bucket the server counts (judge.py)."""
        return [] if "://" in self.out else list(Path(self.out).glob("clips/*/*.mp4"))

    def published(self) -> int:
        return len(self.clips())

    def look_at_clips(self) -> None:
        """A clip in a folder stays the file that it was."""
        for path in self.clips():
            stat = path.stat()
            if self.seen.setdefault(path.name, (stat.st_ino, stat.st_mtime_ns)) != (stat.st_ino, stat.st_mtime_ns):
                self.republished.add(path.name)


def write_manifest(folder: Path, prompts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "night.jsonl"
    path.write_text("".join(json.dumps({"id": f"row-{number}", "prompt": prompt, "frames": 5}) + "\n"
                            for number, prompt in enumerate(prompts)))
    return path
