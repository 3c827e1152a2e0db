"""How much a night may take: until a time of day, and so many GPU hours. Asked before a clip is begun; ends nothing.

Whether a clip can still be done is judged by the slowest of the last clips of its bucket, stage by stage. A bucket that
was not seen yet is judged by the one nearest to it in pixels, frames and steps; before any was seen, by nothing, so the
first clips of a night are begun as long as there is time at all.
"""

import math
import time
from collections import deque
from collections.abc import Callable

from dailies.actors.messages import Request

SLACK = 1.1                             # a clip may take a tenth longer than those before it
LATEST = 8                              # clips of a bucket that are remembered; some had little to do, being half done


class Budget:
    def __init__(self, *, until: float | None = None, gpu_hours: float | None = None,
                 clock: Callable[[], float] = time.time):
        """until: as `clock` counts, seconds since 1970.  None: no limit."""
        self.until, self.clock = until, clock
        self.gpu_s = None if gpu_hours is None else 3600 * gpu_hours
        self.gpus, self.spent_gpu_s = 0, 0.0            # held now, and what holding them took so far
        self.looked_at: float | None = None
        self.latest: dict[str, dict[str, tuple[float, deque[float]]]] = {}   # stage -> bucket -> its work, seconds
        self.left_out = 0                               # clips that were not begun because they would not be done
        self.is_over = False

    @property
    def has_limit(self) -> bool:
        return self.until is not None or self.gpu_s is not None

    @property
    def has_stopped(self) -> bool:
        """Whether there was a clip that was not begun for the budget's sake."""
        return self.is_over or self.left_out > 0

    @property
    def gpu_hours(self) -> float:
        return self.spent_gpu_s / 3600

    def spend(self, gpus: int, now: float) -> None:
        """gpus: held from now on.  now: in seconds, of any clock that never goes back."""
        if self.looked_at is not None:
            self.spent_gpu_s += self.gpus * (now - self.looked_at)
        self.looked_at, self.gpus = now, gpus
        self.is_over = self.is_over or self.left_s(now) <= 0

    def left_s(self, now: float) -> float:
        """Until the first limit is reached, if as many GPUs are held as now."""
        by_time = math.inf if self.until is None else self.until - self.clock()
        by_gpus, since_s = math.inf, 0.0 if self.looked_at is None else now - self.looked_at
        if self.gpu_s is not None and (self.gpus or self.spent_gpu_s >= self.gpu_s):
            by_gpus = (self.gpu_s - self.spent_gpu_s) / max(1, self.gpus) - since_s
        return min(by_time, by_gpus)

    def fits(self, seconds: float, now: float) -> bool:
        """Whether something that takes so long may still be begun."""
        return not self.is_over and SLACK * seconds < self.left_s(now)

    def measured(self, stage: str, request: Request, seconds: float) -> None:
        """A clip of this request's bucket took so long in a stage."""
        buckets = self.latest.setdefault(stage, {})
        buckets.setdefault(request.bucket, (_work_of(request), deque(maxlen=LATEST)))[1].append(seconds)

    def seconds(self, stage: str, request: Request) -> float:
        """What a clip will take in a stage; 0 where none was measured."""
        buckets, wanted = self.latest.get(stage), _work_of(request)
        if not buckets:
            return 0.0
        nearest = min(buckets.values(), key=lambda known: abs(math.log(known[0] / wanted)))
        work, seconds = buckets.get(request.bucket, nearest)
        return max(seconds) * wanted / work


def _work_of(request: Request) -> float:
    shape = request.shape
    return float(shape.width * shape.height * shape.frames * request.num_steps)
