"""Runs the parts of the kit, each in a process of its own with its own seconds, and writes down what they found.

OUT/results.json, OUT/report.md and OUT/log.txt are written again after every part, so whatever ends the kit, what was
known is there. A part that crashes, hangs or loses the GPU's context costs only itself. Parts that check run side by
side; parts that time run alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from dailies.jobs.bench.machine import commit
from dailies.jobs.gpu.report import markdown

ROOT = Path(__file__).resolve().parent.parent.parent
LEAST_S = 10.0                                          # a part that has less is not begun
SLOWER = 4                                              # a dry run on a CPU that is busy with something else
LOG_BYTES, TAIL = 200_000, 1500                         # of a part's output that is kept; of a failed one's, shown


@dataclass(frozen=True, kw_only=True)
class Part:
    """box_s: the seconds it may take.  times: it measures time, so nothing may run beside it."""

    name: str
    box_s: float
    times: bool


# By worth: what is not known without them, and what the others wait for.
PARTS = (
    Part(name="machine", box_s=60, times=True),
    Part(name="norms-right", box_s=95, times=False),
    Part(name="linears-right", box_s=95, times=False),
    Part(name="attention-right", box_s=95, times=False),
    Part(name="sparse-right", box_s=95, times=False),
    Part(name="around-conv-right", box_s=95, times=False),
    Part(name="models-right", box_s=95, times=False),
    Part(name="parity", box_s=95, times=False),
    Part(name="vae-right", box_s=95, times=False),
    Part(name="tests", box_s=95, times=False),
    Part(name="kernels", box_s=80, times=True),
    Part(name="clip", box_s=120, times=True),
    Part(name="night", box_s=70, times=True),
    Part(name="decode", box_s=60, times=True),
    Part(name="profile", box_s=50, times=True),
    Part(name="big", box_s=120, times=True),
)


@dataclass(kw_only=True)
class Running:
    part: Part
    process: subprocess.Popen
    began: float
    ends: float                                         # of its time box
    log: Path
    found: Path


@dataclass(kw_only=True)
class Kit:
    out: Path
    budget_s: float
    tiny: bool = False
    command: str = ""                                   # that began it, for the report
    silent: bool = False                                # nothing on standard output
    began: float = field(default_factory=time.monotonic)
    results: list[dict[str, Any]] = field(default_factory=list)

    def run(self, parts: Sequence[Part]) -> int:
        """0 where every part ended well; 3 otherwise."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.txt").unlink(missing_ok=True)
        self.write()
        with tempfile.TemporaryDirectory(prefix="dailies-gpu-") as work:
            try:
                for group in groups(parts):
                    self.run_group(group, Path(work))
            except KeyboardInterrupt:
                print("interrupted; what was measured so far is written", file=sys.stderr)
                return 130
        self.say(f"wrote {self.out / 'report.md'} and results.json")
        return 0 if all(result["status"] == "done" for result in self.results) else 3

    def run_group(self, parts: Sequence[Part], work: Path) -> None:
        """Parts side by side; each is ended when its own time or the kit's is over."""
        left = self.budget_s - (time.monotonic() - self.began)
        running = []
        for part in parts:
            if left < LEAST_S:
                self.record(dict(part=part.name, status="not begun: no time left", seconds=0.0, rows=[]))
            else:
                running.append(self.start(part, min(part.box_s * (SLOWER if self.tiny else 1), left), work))
        try:
            while running:
                for one in list(running):
                    overdue = time.monotonic() > one.ends
                    if one.process.poll() is None and not overdue:
                        continue
                    running.remove(one)
                    self.finish(one, overdue=one.process.poll() is None)
                time.sleep(0.05)
        finally:
            for one in running:
                end(one.process)

    def start(self, part: Part, box_s: float, work: Path) -> Running:
        log, found = work / f"{part.name}.log", work / f"{part.name}.jsonl"
        command = [sys.executable, "-m", "dailies.jobs.gpu.part", part.name, "--found", str(found),
                   *["--tiny"] * self.tiny]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        began = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
                                       env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path})
        return Running(part=part, process=process, began=began, ends=began + box_s, log=log, found=found)

    def finish(self, one: Running, *, overdue: bool) -> None:
        if overdue:
            end(one.process)
        code = one.process.wait()
        status = "out of time" if overdue else "done" if code == 0 else f"ended by signal {-code}" if code < 0 else (
            f"failed, exit {code}")
        said = one.log.read_text(errors="replace")
        with (self.out / "log.txt").open("a") as file:
            file.write(f"== {one.part.name}\n{said[-LOG_BYTES:]}\n")
        self.record(dict(part=one.part.name, status=status, seconds=round(time.monotonic() - one.began, 1),
                         rows=rows_of(one.found)) | (dict(tail=said[-TAIL:]) if status != "done" else {}))

    def record(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        self.write()
        failed = sum("failed" in row for row in result["rows"])
        self.say(f"{result['part']}: {result['status']}, {result['seconds']} s, {len(result['rows'])} lines"
                 f"{f', {failed} failed' if failed else ''}")

    def say(self, line: str) -> None:
        if not self.silent:
            print(line, flush=True)

    def write(self) -> None:
        about = dict(command=self.command, commit=commit(), on=str(date.today()), tiny=self.tiny,
                     seconds=round(time.monotonic() - self.began, 1))
        known = {"about": about, "parts": self.results}
        for name, text in (("results.json", json.dumps(known, indent=1)), ("report.md", markdown(known))):
            fresh = self.out / f".{name}"
            fresh.write_text(text)
            fresh.replace(self.out / name)


def groups(parts: Iterable[Part]) -> list[list[Part]]:
    """Neighbours that only check, together; each that times, alone."""
    made: list[list[Part]] = []
    for part in parts:
        if made and not part.times and not made[-1][0].times:
            made[-1].append(part)
        else:
            made.append([part])
    return made


def end(process: subprocess.Popen) -> None:
    """The part and whatever it started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """What a part found; its last line may have been cut off when it was ended."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
