"""What the fakes' notes say: who lives, what was sampled, what was sampled again although it was finished."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dailies.pipeline.run.lease import is_alive


@dataclass(kw_only=True)
class Process:
    pid: int
    stage: str
    start: str                          # so that another process with its pid is not taken for it
    doing: str = "process"              # its last note

    @property
    def is_alive(self) -> bool:
        return is_alive(self.pid, self.start)


class Tally:
    def __init__(self, path: Path):
        self.path, self.at = path, 0
        self.processes: dict[int, Process] = {}
        self.pieces: Counter[str] = Counter()           # begun, by clip
        self.kept: set[str] = set()                     # clips whose latent is safe
        self.written: Counter[str] = Counter()
        self.sampled_again: list[str] = []              # begun although the latent was safe

    def read(self) -> None:
        """Take what was noted since the last time."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.at)
            new = file.read()
        whole = new.rfind(b"\n") + 1
        self.at += whole
        for line in new[:whole].splitlines():
            self.take(json.loads(line))

    def take(self, note: dict) -> None:
        what, pid, clip = note["what"], note["pid"], note.get("clip")
        if what == "process":
            self.processes[pid] = Process(pid=pid, stage=note["stage"], start=note["start"])
            return
        if pid in self.processes and what != "piece":
            self.processes[pid].doing = what
        match what:
            case "sampling" if clip in self.kept:
                self.sampled_again.append(clip)
            case "piece":
                self.pieces[clip] += 1
            case "kept":
                self.kept.add(clip)
            case "written":
                self.written[clip] += 1

    def alive(self, stage: str) -> list[Process]:
        return [process for process in self.processes.values() if process.stage == stage and process.is_alive]

    def share_done_twice(self, num_clips: int, pieces: int) -> float:
        """Sampling that was not needed, as a share of what was; a piece that was cut short counts whole."""
        return sum(self.pieces.values()) / (num_clips * pieces) - 1
