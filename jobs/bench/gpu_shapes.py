"""How busy GPUs are kept, for clips that take them seconds or minutes: pretended GPUs, in simulated time and in Ray.

    dailies bench pipeline --gpu-shapes

Driver, placement and the pipeline's description are those of a night; what computes is not. In simulated time the
machines too are pretended, so that clips of ten minutes pass at once; in Ray processes, locks and pools are real, and
only the work is a sleep.
"""

import heapq
import itertools
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dailies.actors.actor import Actor
from dailies.actors.device_lock import NO_LOCK, DeviceLock
from dailies.actors.messages import Frames, Request
from dailies.jobs.bench.pretend import Pretend, pretend_request, pretend_value
from dailies.model.catalog import CATALOG
from dailies.pipeline.run.ledger_row import row_of
from dailies.pipeline.scheduler.driver import Driver
from dailies.pipeline.scheduler.executor import Alive, Answer, Broken, Call, Done, Hello, Replica
from dailies.pipeline.scheduler.forecast import Cost, forecast, measured_costs, rows_by_work
from dailies.pipeline.scheduler.placement import Node
from dailies.pipeline.stages import Outcome, Report, Stage, Step
from dailies.pipeline.text_to_video import text_to_video

BOXES = (1, 2, 8)                       # GPUs
CPUS_PER_GPU = 16
LOAD_S = 30.0                           # of a process, in simulated time
_MEASURED = 20                           # clips by which the others are foretold


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a clip costs. Around each stage stands what it fetches from and saves to the store."""

    name: str
    sample_s: float                     # of a GPU
    decode_s: float                     # of a GPU
    write_s: float                      # of a CPU: gate, H.264, check, publishing
    num_steps: int
    encode_s: float = 0.02              # of a GPU
    beside_s: float = 0.3               # of the sampler: embedding in, latent out
    fetch_s: float = 0.1                # of the decoder and the encoder

    @property
    def costs(self) -> dict[str, Cost]:
        return {"encode": Cost(held_s=self.encode_s, beside_s=self.fetch_s),
                "sample": Cost(held_s=self.sample_s, beside_s=self.beside_s),
                "publish": Cost(held_s=self.decode_s, beside_s=self.fetch_s, pool_s=self.write_s)}

    def scaled(self, by: float) -> "Shape":
        seconds = {name: value * by for name, value in vars(self).items() if name.endswith("_s")}
        return replace(self, **seconds)


SHAPES = (Shape(name="480p, 81 frames, 4 steps", sample_s=0.8, decode_s=1.1, write_s=1.9, num_steps=4),
          Shape(name="720p, 81 frames, 4 steps", sample_s=13.0, decode_s=2.6, write_s=4.0, num_steps=4),
          Shape(name="720p, 121 frames, 50 steps", sample_s=600.0, decode_s=4.4, write_s=6.0, num_steps=50))


def pipeline() -> list[Stage]:
    """As a night on GPUs has it; its steps are not made here."""
    card = CATALOG["linum-v2-720p"]
    return text_to_video(card, None, None, card.runtime("cuda", "bf16", "dense"))


def box(gpus: int) -> list[Node]:
    return [Node(id="box", cpus=CPUS_PER_GPU * gpus, gpus=gpus)]


# In simulated time.

@dataclass(eq=False)
class Resource:
    """What so many can have at a time, first come, first served."""

    free: int = 1
    waiting: deque["Activity"] = field(default_factory=deque)


@dataclass(eq=False)
class Activity:
    """One call on its way: yields seconds to wait, or a Resource that it wants."""

    replica: Replica
    timeline: Iterator[float | Resource]
    held: list[Resource] = field(default_factory=list)


class SimulatedGPUs:
    """An executor whose processes keep only time: threads, turns and pools as Worker, DeviceLock and Pool have them."""

    def __init__(self, machines: list[Node], shape: Shape):
        self.machines, self.shape, self.costs = machines, shape, shape.costs
        self.clock, self.order = 0.0, itertools.count()
        self.events: list[tuple[float, int, Activity]] = []
        self.answers: deque[tuple[Call, Answer]] = deque()
        self.gpus = {(node.id, str(at)): Resource() for node in machines for at in range(int(node.gpus))}
        self.memory = dict.fromkeys(self.gpus, 1.0)
        self.sliced_s = dict.fromkeys(self.gpus, 0.0)   # taken by an encoder from whatever step comes next
        self.resources: dict[Replica, tuple[Resource, Resource, Resource]] = {}    # threads, turn, pool
        self.recalled: set[Call] = set()
        self.busy: list[tuple[str, tuple[str, str], float, float]] = []     # stage, GPU, from, to
        self.started: list[Replica] = []

    def now(self) -> float:
        return self.clock

    def nodes(self) -> list[Node]:
        return self.machines

    def waits_for(self, replica: Replica) -> None:
        return None

    def kept_waiting_s(self, replica: Replica) -> float:
        return 0.0

    def start(self, replica: Replica) -> None:
        """Ray gives a share of the GPU that has the least memory free for it."""
        stage = replica.stage
        fitting = [gpu for gpu, free in self.memory.items()
                   if gpu[0] == replica.placement.node and free >= stage.gpus - 1e-6]
        replica.handle = min(fitting, key=lambda gpu: self.memory[gpu])
        self.memory[replica.handle] -= stage.gpus
        self.resources[replica] = Resource(stage.concurrency), Resource(), Resource(max(1, stage.processes))
        self.started.append(replica)

    def end(self, replica: Replica) -> None:
        self.memory[replica.handle] += replica.stage.gpus
        del self.resources[replica]
        for gpu in self.gpus.values():
            gpu.waiting = deque(activity for activity in gpu.waiting if activity.replica is not replica)

    def recall(self, call: Call) -> None:
        self.recalled.add(call)

    cancel = recall

    def submit(self, call: Call) -> None:
        self.advance(Activity(call.replica, self.work(call) if call.kind == "work" else self.other(call)))

    def other(self, call: Call) -> Iterator[float | Resource]:
        yield {"hello": 0.5, "load": LOAD_S, "ping": 0.0}[call.kind]
        self.answers.append((call, Hello(devices=(call.replica.handle[1],)) if call.kind == "hello" else Alive()))

    def work(self, call: Call) -> Iterator[float | Resource]:
        stage, values = call.replica.stage, len(call.tasks)
        cost, gpu = self.costs[stage.name], self.gpus[call.replica.handle]
        threads, turn, pool = self.resources[call.replica]
        steps = self.shape.num_steps if stage.name == "sample" else 1
        call.values = [] if call.last else [None] * values
        yield threads
        yield values * cost.beside_s / 2
        yield turn
        if stage.name == "encode":                      # takes no turns: CUDA slices the time
            yield 2 * values * cost.held_s
            self.sliced_s[call.replica.handle] += values * cost.held_s
        elif call not in self.recalled:
            for _ in range(steps):
                yield gpu
                began, sliced_s = self.clock, self.sliced_s[call.replica.handle]
                self.sliced_s[call.replica.handle] = 0.0
                yield sliced_s + values * cost.held_s / steps
                self.busy.append(("encode", call.replica.handle, began, began + sliced_s))
                self.busy.append((stage.name, call.replica.handle, began + sliced_s, self.clock))
                self.give(gpu, call)
        self.give(turn, call)
        if call in self.recalled:
            answer: Answer = Broken(how="cancelled", reason="")
        else:
            if stage.processes:
                yield pool
                yield values * cost.pool_s
                self.give(pool, call)
            yield values * cost.beside_s / 2
            made = [pretend_value("clip", task.request) if call.last else None for task in call.tasks]
            answer = Done(made=made, report=self.report(call.replica, cost))
        self.give(threads, call)
        self.answers.append((call, answer))

    def report(self, replica: Replica, cost: Cost) -> Report:
        seconds = {replica.stage.name: cost.held_s + cost.beside_s}
        if replica.stage.name == "publish":
            seconds = {"decode": cost.held_s + cost.beside_s, "publish": cost.pool_s}
        return Report(seconds=seconds, worker=replica.name, device="pretended", peak_memory_bytes=0,
                      held_s=cost.held_s, pace_s=cost.pace_s(replica.stage))

    def advance(self, activity: Activity) -> None:
        """Until it has to wait."""
        self.running = activity
        for wanted in activity.timeline:
            if not isinstance(wanted, Resource):
                heapq.heappush(self.events, (self.clock + wanted, next(self.order), activity))
                return
            if not wanted.free:
                wanted.waiting.append(activity)
                return
            wanted.free -= 1
            activity.held.append(wanted)

    def give(self, resource: Resource, call: Call) -> None:
        """To the next that waits, in a moment."""
        self.running.held.remove(resource)
        self.free(resource)

    def free(self, resource: Resource) -> None:
        while resource.waiting:
            activity = resource.waiting.popleft()
            if activity.replica in self.resources:
                activity.held.append(resource)
                heapq.heappush(self.events, (self.clock, next(self.order), activity))
                return
        resource.free += 1

    def wait(self, timeout_s: float) -> Iterator[tuple[Call, Answer]]:
        until = self.clock + max(timeout_s, 1e-3)
        while not self.answers and self.events and self.events[0][0] <= until:
            self.clock, _, activity = heapq.heappop(self.events)
            if activity.replica in self.resources:
                self.advance(activity)
            else:                                       # its process has ended
                for resource in activity.held:
                    self.free(resource)
        if not self.answers:
            self.clock = until
        while self.answers:
            yield self.answers.popleft()


def simulate(shape: Shape, gpus: int, clips: int) -> dict[str, float]:
    """A night of this many clips: how it went, and what its first clips foretold."""
    executor, stages = SimulatedGPUs(box(gpus), shape), pipeline()
    outcomes = list(Driver(executor, stages, map(pretend_request, range(clips))).outcomes())
    assert len(outcomes) == clips
    # as `dailies plan` does it, from what the ledger would say of the first
    rows = [row_of("", outcome.value, outcome) for outcome in outcomes[:_MEASURED]]
    foretold = forecast(stages, box(gpus), measured_costs(stages, rows_by_work(rows), rows[0]), clips)
    busy = busy_shares([(stage, str(gpu), *times) for stage, gpu, *times in executor.busy], gpus)
    span_s = max(end for *_, end in executor.busy) - min(start for _, _, start, _ in executor.busy)
    return {"clips": clips, **busy, "clips_per_hour": 3600 * clips / span_s,
            "foretold_clips_per_hour": 3600 * clips / foretold.seconds,
            "seconds": span_s, "foretold_seconds": foretold.seconds, "foretold_gpu_hours": foretold.gpu_hours,
            "decoders": len({replica for replica in executor.started if replica.stage.name == "publish"})}


def busy_shares(work: Sequence[tuple[str, str, float, float]], gpus: int) -> dict[str, float]:
    """work: stage, GPU, from, to.  Shares of the GPUs' time from the first sample's begin to the last decode's end."""
    first = min(start for stage, _, start, _ in work if stage == "sample")
    span_s = max(end for *_, end in work) - first

    def share(*stages: str) -> float:
        return sum(end - start for stage, _, start, end in work if stage in stages and end > first) / (gpus * span_s)
    return {"busy": share("sample", "publish"), "sampling": share("sample"), "encoding": share("encode")}


# In Ray, with real processes.

@dataclass(kw_only=True)
class PretendGPU(Actor):
    """An actor that has its GPU for some seconds, in steps; before and after it sleeps without.

    trace: a file that gets every step's stage, GPU, start and end.
    """

    makes: str
    stage: str
    held_s: float
    beside_s: float
    num_steps: int
    trace: str
    lock: DeviceLock = NO_LOCK          # the worker's

    @property
    def takes_turns(self) -> bool:
        return self.stage != "encode"

    @property
    def device_id(self) -> str:
        return f"pretended-{Path(self.trace).stem}-{os.environ.get('CUDA_VISIBLE_DEVICES', '')}"

    def __call__(self, batch: list) -> list:
        time.sleep(self.beside_s / 2)
        with self.lock:
            for _ in range(self.num_steps):
                if self.lock.is_wanted():
                    self.lock.give_way()
                began = time.time()
                time.sleep(self.held_s * len(batch) / self.num_steps)
                self.note(began)
        time.sleep(self.beside_s / 2)
        return [self.value(value if isinstance(value, Request) else value.request) for value in batch]

    def note(self, began: float) -> None:
        with open(self.trace, "ab", buffering=0) as file:
            file.write(json.dumps([self.stage, self.device_id, began, time.time()]).encode() + b"\n")

    def value(self, request: Request) -> Any:
        if self.makes != "frames":
            return pretend_value(self.makes, request)
        import torch
        return Frames(request=request, rgb=torch.zeros(9, 64, 64, 3, dtype=torch.uint8))


def with_pretended_work(stages: Sequence[Stage], shape: Shape, trace: str) -> list[Stage]:
    makes = {"encode": "embedding", "sample": "latent", "publish": "frames"}
    made = []
    for stage in stages:
        cost = shape.costs[stage.name]
        step = Step(actor=PretendGPU, name="decode" if stage.name == "publish" else None,
                    args=dict(makes=makes[stage.name], stage=stage.name, held_s=cost.held_s, beside_s=cost.beside_s,
                              num_steps=shape.num_steps if stage.name == "sample" else 1, trace=trace))
        then = (Step(actor=Pretend, args=dict(makes="clip", sleep_s=cost.pool_s)),) if stage.then else ()
        made.append(replace(stage, steps=(step,), then=then))
    return made


def in_ray(shape: Shape, gpus: int, clips: int,
           on_outcome: Callable[[Outcome], None] = lambda outcome: None) -> dict[str, float]:
    """As `simulate`, on this machine's Ray. Raises AssertionError where two processes had one GPU at a time."""
    from dailies.pipeline.scheduler import cluster

    with tempfile.NamedTemporaryFile(suffix=".jsonl") as trace, \
            cluster.connect("local", cpus=CPUS_PER_GPU * gpus, gpus=gpus):
        stages = with_pretended_work(pipeline(), shape, trace.name)
        count = 0
        for outcome in cluster.run(stages, map(pretend_request, range(clips))):
            on_outcome(outcome)
            count += 1
        work = [tuple(json.loads(line)) for line in Path(trace.name).read_text().splitlines()]
    for gpu in {gpu for _, gpu, _, _ in work}:
        turns = sorted((start, end) for stage, on, start, end in work if on == gpu and stage != "encode")
        assert all(end <= start + 1e-3 for (_, end), (start, _) in itertools.pairwise(turns)), f"two on GPU {gpu}"
    span_s = max(end for *_, end in work) - min(start for stage, _, start, _ in work if stage == "sample")
    return {"clips": count, **busy_shares(work, gpus), "clips_per_hour": 3600 * count / span_s}


CLIPS_PER_GPU: Mapping[str, int] = {SHAPES[0].name: 400, SHAPES[1].name: 200, SHAPES[2].name: 30}


def rows() -> Iterator[tuple[str, dict[str, float]]]:
    for shape in SHAPES:
        for gpus in BOXES:
            figures = simulate(shape, gpus, CLIPS_PER_GPU[shape.name] * gpus)
            yield f"simulated, {shape.name}, {gpus} GPU", figures
    for gpus in (1, 2):
        short = SHAPES[0].scaled(0.5)
        yield f"Ray, pretended GPUs, {short.name} in half the time, {gpus} GPU", in_ray(short, gpus, 60 * gpus)

