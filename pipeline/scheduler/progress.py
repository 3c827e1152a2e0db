"""What a person is told of a run while it goes on."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dailies.pipeline.scheduler.stage_queue import StageQueue


@dataclass(frozen=True, kw_only=True)
class StageProgress:
    name: str
    replicas: int               # ready to work
    starting: int
    queued: int
    in_flight: int
    done: int
    seconds: float | None       # per value, lately


@dataclass(frozen=True, kw_only=True)
class Progress:
    stages: tuple[StageProgress, ...]
    done: int                   # requests that ended as a Clip
    failed: int
    notes: tuple[str, ...]      # what happened since the last Progress: hand-overs, deaths, retries


class Reporter:
    """Collects notes, and says how far all is every so often; where nobody listens, nothing."""

    def __init__(self, on_progress: Callable[[Progress], None] | None, every_s: float):
        self.on_progress, self.every_s = on_progress, every_s
        self.notes: list[str] = []
        self.lost_inputs = 0                            # since the last Progress
        self.due_at = -math.inf

    def note(self, text: str) -> None:
        if self.on_progress:
            self.notes.append(text)

    def is_due(self, now: float) -> bool:
        return self.on_progress is not None and now >= self.due_at

    def tell(self, queues: list[StageQueue], *, done: int, failed: int, now: float) -> None:
        if not self.on_progress:
            return
        self.due_at = now + self.every_s
        if self.lost_inputs:
            self.note(f"what an earlier stage made is gone for {self.lost_inputs} clips, and is made again")
            self.lost_inputs = 0
        notes, self.notes = tuple(self.notes), []
        self.on_progress(Progress(stages=tuple(map(stage_progress, queues)), done=done, failed=failed, notes=notes))


def stage_progress(queue: StageQueue) -> StageProgress:
    ready = len(queue.ready)
    return StageProgress(name=queue.stage.name, replicas=ready, starting=len(queue.replicas) - ready, done=queue.done,
                         queued=len(queue.waiting) + queue.sharing, in_flight=queue.in_flight, seconds=queue.seconds)
