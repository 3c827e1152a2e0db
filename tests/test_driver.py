"""The driver's decisions, on simulated machines in simulated time: a night on a thousand GPUs passes in seconds."""

import heapq
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module

import pytest

from dailies.actors.messages import Clip, Failure
from dailies.jobs.bench.pretend import SHARED, SLEEPS_S, WHOLE, pretend_request, pretend_stages, pretend_value
from dailies.pipeline.scheduler.budget import Budget
from dailies.pipeline.scheduler.driver import ClusterError, Driver, Stop
from dailies.pipeline.scheduler.executor import Alive, Answer, Broken, Call, Done, Hello, Replica
from dailies.pipeline.scheduler.forecast import Cost, forecast
from dailies.pipeline.scheduler.placement import Node
from dailies.pipeline.stages import Report, Stage, Step, Worker, run_local
from dailies.pipeline.store import StoreError


class SimulatedExecutor:
    """Machines that only keep time. `fault` may answer a call in place of the work."""

    def __init__(self, nodes: list[Node], seconds: dict[str, float], *, load_s: float = 2.0,
                 fault: Callable[[Call], Answer | None] = lambda call: None):
        self.clock, self.machines, self.seconds, self.load_s, self.fault = 0.0, nodes, seconds, load_s, fault
        self.events: list[tuple[float, int, Call]] = []
        self.order = itertools.count()
        self.free_at: dict[Replica, float] = {}
        self.started: list[Replica] = []
        self.worked: dict[str, list[tuple[float, float, Call]]] = defaultdict(list)
        self.store_waits_s = 0.0

    def now(self) -> float:
        return self.clock

    def nodes(self) -> list[Node]:
        return self.machines

    def start(self, replica: Replica) -> None:
        self.started.append(replica)
        self.free_at[replica] = self.clock

    def end(self, replica: Replica) -> None:
        del self.free_at[replica]

    def cancel(self, call: Call) -> None:
        for place, (_, order, other) in enumerate(self.events):
            if other is call:
                self.events[place] = (self.clock, order, call)
                call.kind = "cancelled"
        heapq.heapify(self.events)

    recall = cancel

    def waits_for(self, replica: Replica) -> None:
        return None

    def kept_waiting_s(self, replica: Replica) -> float:
        return self.store_waits_s

    def submit(self, call: Call) -> None:
        stage = call.replica.stage.name
        takes = {"hello": 0.5, "load": self.load_s, "ping": 0.0}.get(call.kind, self.seconds[stage] * len(call.tasks))
        began = max(self.clock, self.free_at[call.replica])
        self.free_at[call.replica] = began + takes
        if call.kind == "work":
            call.values = [] if call.last else [(stage, task.request) for task in call.tasks]
            self.worked[stage].append((began, began + takes, call))
        heapq.heappush(self.events, (began + takes, next(self.order), call))

    def wait(self, timeout_s: float) -> Iterator[tuple[Call, Answer]]:
        until = self.clock + max(timeout_s, 1e-3)
        if not self.events or self.events[0][0] > until:
            self.clock = until
            return
        self.clock = max(self.clock, self.events[0][0])
        while self.events and self.events[0][0] <= self.clock:
            call = heapq.heappop(self.events)[2]
            if call.replica in self.free_at:
                yield call, self.fault(call) or self.answer(call)

    def answer(self, call: Call) -> Answer:
        if call.kind == "cancelled":
            call.kind = "work"
            return Broken(how="cancelled", reason="")
        if call.kind != "work":
            return Hello() if call.kind == "hello" else Alive()
        name = call.replica.stage.name
        return Done(made=values(call),
                    report=Report(seconds={name: self.seconds[name]}, worker=call.replica.name, device="none",
                                  peak_memory_bytes=0))

    def encoded(self) -> list[str]:
        return [task.request.prompt for _, _, call in self.worked["encode"] for task in call.tasks]


def values(call: Call) -> list:
    return [pretend_value("clip", task.request) if call.last else None for task in call.tasks]


def drive(executor: SimulatedExecutor, stages, requests, **options) -> tuple[Driver, list]:
    driver = Driver(executor, stages, requests, **options)
    outcomes = []
    for outcome in driver.outcomes():
        outcomes.append(outcome)
        assert executor.clock < 10**7, "the driver waits for something that will not come"
    assert not executor.free_at, "processes were left behind"
    return driver, outcomes


def requests(count: int, **options) -> Iterator:
    return (pretend_request(number, **options) for number in range(count))


def box(gpus: int, cpus: int = 16) -> list[Node]:
    return [Node(id="box", cpus=cpus, gpus=gpus)]


@pytest.mark.parametrize("gpus, limit_s", [(SHARED, 25.2), (WHOLE, 26.7)], ids=["shared", "whole"])
def test_samplers_are_kept_busy(gpus, limit_s):
    executor = SimulatedExecutor(box(4), SLEEPS_S, load_s=1.0)
    _, outcomes = drive(executor, pretend_stages(gpus=gpus), requests(200))
    assert len(outcomes) == 200 and all(isinstance(outcome.value, Clip) for outcome in outcomes)
    began, ended = zip(*[(began, ended) for began, ended, _ in executor.worked["sample"]], strict=True)
    assert max(ended) - min(began) <= limit_s           # ideal 25.0


def test_the_encoder_gives_its_gpu_to_a_sampler_when_all_is_encoded():
    executor = SimulatedExecutor(box(4), SLEEPS_S)
    drive(executor, pretend_stages(gpus=WHOLE), requests(200))
    assert Counter(replica.stage.name for replica in executor.started) == {"encode": 1, "sample": 4, "publish": 1}


@pytest.mark.parametrize("gpus", [1, 4])
def test_the_encoder_works_in_windows(gpus):
    executor, notes = SimulatedExecutor(box(gpus), SLEEPS_S), []
    driver, outcomes = drive(executor, pretend_stages(gpus=WHOLE, window=100), requests(400),
                             on_progress=lambda progress: notes.extend(progress.notes))
    assert len(outcomes) == 400 and len(executor.encoded()) == len(set(executor.encoded())) == 400
    assert sum("it goes on" in note for note in notes) >= 3
    assert sum("makes room for encode" in note for note in notes) >= 3


def test_each_key_is_encoded_once_while_its_clips_are_pending():
    executor = SimulatedExecutor(box(4), SLEEPS_S)
    pairs = (pretend_request(number, prompt=f"prompt {number // 5}") for number in range(300))
    _, outcomes = drive(executor, pretend_stages(gpus=SHARED), pairs)
    assert len(outcomes) == 300
    assert len(executor.encoded()) == len(set(executor.encoded())) == 60
    assert sum("encode" in outcome.seconds for outcome in outcomes) == 60


def test_what_is_held_does_not_grow_with_the_night():
    executor, held = SimulatedExecutor(box(8), {"encode": 0.001, "sample": 0.01, "publish": 0.001}), []
    driver = Driver(executor, pretend_stages(gpus=WHOLE, window=200), requests(5000))
    for _ in driver.outcomes():
        held.append(driver.queues.held)
    assert len(held) == 5000 and max(held) <= 300
    assert not driver.queues[0].shared and driver.queues.held == 0


def test_a_thousand_gpus_are_all_used():
    nodes = [Node(id=f"node {number}", cpus=32, gpus=8) for number in range(125)]
    executor = SimulatedExecutor(nodes, {"encode": 0.05, "sample": 60.0, "publish": 2.0}, load_s=60.0)
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE, window=4000, cpus=1), requests(2900))
    assert len(outcomes) == 2900
    assert executor.clock < 1.25 * (3 * 60 + 60)            # three rounds and one start


def test_a_slow_publisher_holds_the_samplers_back_and_gets_replicas():
    executor = SimulatedExecutor([Node(id="box", cpus=4, gpus=4)], {"encode": 0.01, "sample": 0.5, "publish": 2.0})
    driver = Driver(executor, pretend_stages(gpus=WHOLE, cpus=0.5), requests(300))
    queued = [len(driver.queues[2].waiting) for _ in driver.outcomes()]
    assert max(queued) <= 16
    assert Counter(replica.stage.name for replica in executor.started)["publish"] > 1


def test_a_batch_is_of_one_bucket():
    executor = SimulatedExecutor(box(2), SLEEPS_S)
    mixed = (pretend_request(number, frames=1 + 4 * (number // 3 % 2)) for number in range(60))
    drive(executor, pretend_stages(gpus=WHOLE, batch=4), mixed)
    batches = [{task.request.bucket for task in call.tasks} for _, _, call in executor.worked["sample"]]
    assert all(len(buckets) == 1 for buckets in batches)
    assert max(len(call.tasks) for _, _, call in executor.worked["sample"]) > 1


def failing(stage: str, seeds: set[int], answer: Callable[[Call], Answer]) -> Callable[[Call], Answer | None]:
    def fault(call: Call) -> Answer | None:
        hit = {task.request.seed for task in call.tasks} & seeds
        if call.kind == "work" and call.replica.stage.name == stage and hit:
            return answer(call)
        return None
    return fault


def failing_load(reason: str, where: Callable[[Replica], bool], how: str = "load") -> Callable[[Call], Answer | None]:
    return lambda call: Broken(how=how, reason=reason) if call.kind == "load" and where(call.replica) else None


def dying(reason: str, how: str = "died") -> Callable[[Call], Answer]:
    return lambda call: Broken(how=how, reason=reason)


def poisoned(seeds: set[int]) -> Callable[[Call], Answer]:
    def answer(call: Call) -> Answer:
        made = [Failure(request=task.request, stage=call.replica.stage.name, error_type="ValueError", error="poison")
                if task.request.seed in seeds else value for task, value in zip(call.tasks, values(call), strict=True)]
        return Done(made=made, report=Report(seconds={}, worker=call.replica.name, device="none", peak_memory_bytes=0))
    return answer


def test_an_exception_is_tried_again_elsewhere_and_then_fails_the_row():
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=failing("sample", {7}, poisoned({7})))
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(40))
    failed, = [outcome for outcome in outcomes if isinstance(outcome.value, Failure)]
    assert failed.value.error_type == "ValueError" and failed.attempts == 3
    assert len(outcomes) == 40
    where = [call.replica.name for _, _, call in executor.worked["sample"] if call.tasks[0].request.seed == 7]
    assert len(where) == 3 and where[0] != where[1] != where[2]


def test_a_row_that_kills_its_process_is_charged_and_its_neighbours_are_not():
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=failing("sample", {7}, dying("signal 9")))
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(40))
    attempts = {outcome.value.request.seed: outcome.attempts for outcome in outcomes}
    failed, = [outcome.value for outcome in outcomes if isinstance(outcome.value, Failure)]
    assert failed.request.seed == 7 and failed.error_type == "WorkerDied" and "signal 9" in failed.error
    assert attempts == {seed: 3 if seed == 7 else 1 for seed in range(40)}


def test_where_several_rows_are_at_work_in_one_process_a_death_charges_none_until_one_dies_alone():
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=failing("sample", {7, 20}, dying("signal 11")))
    _, outcomes = drive(executor, pretend_stages(gpus=SHARED, concurrency=3), requests(40))
    attempts = {outcome.value.request.seed: outcome.attempts for outcome in outcomes}
    assert attempts == {seed: 3 if seed in (7, 20) else 1 for seed in range(40)}
    assert {outcome.value.request.seed for outcome in outcomes if isinstance(outcome.value, Failure)} == {7, 20}


@pytest.mark.parametrize("concurrency, calls", [(1, 2), (2, 2), (4, 4)])
def test_a_replica_is_given_as_many_calls_as_it_has_threads_and_two_at_least(concurrency, calls):
    executor, most = SimulatedExecutor(box(1), SLEEPS_S | {"sample": 5.0}), []
    driver = Driver(executor, pretend_stages(gpus=SHARED, concurrency=concurrency), requests(30))
    for _ in driver.outcomes():
        most.append(max(len(replica.calls) for replica in driver.queues[1].replicas))
    assert max(most) == calls


def test_a_decoder_makes_room_for_the_encoder_and_the_sampler_goes_on():
    """On one GPU; what is sampled meanwhile waits for the decoder."""
    executor, notes = SimulatedExecutor(box(1), {"encode": 0.2, "sample": 1.0, "publish": 0.5}), []
    _, outcomes = drive(executor, pretend_stages(gpus=SHARED, window=100), requests(300),
                        on_progress=lambda progress: notes.extend(progress.notes))
    assert len(outcomes) == 300 and any(note.startswith("publish") and "makes room" in note for note in notes)
    assert Counter(replica.stage.name for replica in executor.started)["sample"] == 1


def test_a_suspect_shares_no_batch_so_one_poison_costs_one_row():
    executor = SimulatedExecutor(box(2), SLEEPS_S, fault=failing("sample", {7}, dying("")))
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE, batch=4), requests(40))
    assert [outcome.value.request.seed for outcome in outcomes if isinstance(outcome.value, Failure)] == [7]


def test_a_failed_encoding_does_not_take_its_key_along():
    fault = failing("encode", {0}, poisoned({0}))
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=fault)
    same = (pretend_request(number, prompt="one") for number in range(10))
    _, outcomes = drive(executor, pretend_stages(gpus=SHARED), same)
    assert [outcome.value.request.seed for outcome in outcomes if isinstance(outcome.value, Failure)] == [0]
    assert len(outcomes) == 10 and len(executor.encoded()) == 4


def test_inputs_lost_after_the_encoder_left_are_made_again():
    lost = iter(range(30))

    def fault(call: Call) -> Answer | None:
        sampling = call.kind == "work" and call.replica.stage.name == "sample" and executor.clock > 12
        return Broken(how="input", reason="its node is gone") if sampling and next(lost, None) is not None else None

    executor = SimulatedExecutor(box(2), SLEEPS_S, fault=fault)
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(80))
    assert len(outcomes) == 80
    assert all(isinstance(outcome.value, Clip) and outcome.attempts == 1 for outcome in outcomes)
    assert 80 < len(executor.encoded()) <= 80 + 30


def test_a_lost_machine_charges_nobody_and_a_new_one_is_used():
    executor = SimulatedExecutor([Node(id="a", cpus=8, gpus=2), Node(id="b", cpus=8, gpus=2)], SLEEPS_S)
    driver = Driver(executor, pretend_stages(gpus=WHOLE), requests(200))
    outcomes = []
    for outcome in driver.outcomes():
        outcomes.append(outcome)
        if len(outcomes) == 40:
            executor.machines = executor.machines[:1]
        if len(outcomes) == 100:
            executor.machines = [*executor.machines, Node(id="c", cpus=8, gpus=2)]
    assert len(outcomes) == 200 and all(outcome.attempts == 1 for outcome in outcomes)
    assert {replica.placement.node for replica in executor.started} == {"a", "b", "c"}


def test_a_machine_that_is_lost_under_one_row_again_and_again_is_the_rows_doing():
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=failing("sample", {3}, dying("unreachable", how="node")))
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(20))
    failed, = [outcome.value for outcome in outcomes if isinstance(outcome.value, Failure)]
    assert failed.request.seed == 3 and "11 machines" in failed.error


@pytest.mark.parametrize("stage", ["encode", "sample", "publish"])
def test_steps_that_cannot_be_made_end_the_run(stage):
    fault = failing_load("ValueError: weights", lambda replica: replica.stage.name == stage)
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=fault)
    with pytest.raises(ClusterError, match=f"stage {stage} cannot start: ValueError: weights"):
        drive(executor, pretend_stages(gpus=WHOLE), requests(20))
    assert not executor.free_at and len([replica for replica in executor.started if replica.stage.name == stage]) <= 3


def test_one_bad_machine_does_not_end_the_run():
    fault = failing_load("no CUDA device", lambda replica: replica.placement.node == "bad")
    executor = SimulatedExecutor([Node(id="good", cpus=8, gpus=2)], SLEEPS_S, fault=fault)
    driver = Driver(executor, pretend_stages(gpus=WHOLE), requests(200))
    outcomes = []
    for outcome in driver.outcomes():
        outcomes.append(outcome)
        if len(outcomes) == 20:
            executor.machines = [*executor.machines, Node(id="bad", cpus=8, gpus=1)]
    assert len(outcomes) == 200
    assert 1 <= sum(replica.placement.node == "bad" for replica in executor.started) <= 9      # ever later


def test_processes_that_die_while_loading_end_the_run():
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=failing_load("out of memory", lambda _: True, how="died"))
    with pytest.raises(ClusterError, match="cannot start: out of memory"):
        drive(executor, pretend_stages(gpus=WHOLE), requests(20))


def test_an_unusable_store_ends_the_run_and_a_short_trouble_charges_nobody():
    trouble = iter(range(4))
    short = failing("publish", set(range(100)),
                    lambda call: Broken(how="store", reason="503") if next(trouble, None) is not None else None)
    _, outcomes = drive(SimulatedExecutor(box(4), SLEEPS_S, fault=short), pretend_stages(gpus=WHOLE), requests(20))
    assert len(outcomes) == 20 and all(outcome.attempts == 1 for outcome in outcomes)
    lasting = failing("publish", set(range(100)), dying("access denied", how="store"))
    with pytest.raises(StoreError, match="access denied"):
        drive(SimulatedExecutor(box(4), SLEEPS_S, fault=lasting), pretend_stages(gpus=WHOLE), requests(20))


def hanging(executor: SimulatedExecutor, seeds: set[int]) -> None:
    plain = executor.submit

    def submit(call: Call) -> None:
        plain(call)
        if call.kind == "work" and call.replica.stage.name == "sample" and call.tasks[0].request.seed in seeds:
            executor.events = [event for event in executor.events if event[2] is not call]
            executor.free_at[call.replica] = 10**6

    executor.submit = submit


def test_a_call_that_never_ends_costs_its_row_an_attempt():
    executor = SimulatedExecutor(box(2), SLEEPS_S)
    hanging(executor, {5})
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(30), task_timeout_s=60.0)
    failed, = [outcome for outcome in outcomes if isinstance(outcome.value, Failure)]
    assert failed.value.request.seed == 5 and "no answer" in failed.value.error and failed.attempts == 3
    assert failed.value.error_type == "TimedOut" and len(outcomes) == 30


def test_a_row_may_take_a_multiple_of_what_its_like_took():
    executor = SimulatedExecutor(box(2), SLEEPS_S)
    hanging(executor, {5})
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(30))
    assert [outcome.value.error_type for outcome in outcomes if isinstance(outcome.value, Failure)] == ["TimedOut"]
    assert 3 * 120 < executor.clock < 3 * (120 + 10 * 0.5) + 60     # three attempts; nobody knew a limit in hours


def test_waiting_for_the_store_is_not_charged_to_the_row():
    executor = SimulatedExecutor(box(2), SLEEPS_S)
    executor.store_waits_s = 10**6
    plain = executor.submit

    def submit(call: Call) -> None:                     # one clip takes 1,000 s longer
        executor.seconds = SLEEPS_S | {"publish": 1000.0 if call.tasks and call.tasks[0].request.seed == 5 else 0.1}
        plain(call)

    executor.submit = submit
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(30))
    assert len(outcomes) == 30 and all(outcome.attempts == 1 for outcome in outcomes)


def test_the_third_attempt_is_in_the_safe_profile_and_its_clip_says_so():
    tries = iter(range(2))
    fault = failing("sample", {7}, lambda call: poisoned({7})(call) if next(tries, None) is not None else None)
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=fault)
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE, batch=4), requests(40))
    calls = [call for _, _, call in executor.worked["sample"] if 7 in {task.request.seed for task in call.tasks}]
    assert [call.safe for call in calls] == [False, False, True] and len(calls[2].tasks) == 1
    told = {outcome.value.request.seed: (outcome.attempts, outcome.value.fallbacks) for outcome in outcomes}
    assert told[7][0] == 3 and "safe profile" in told[7][1][0]
    assert all(told[seed] == (1, ()) for seed in told if seed != 7)


def test_a_replica_that_fails_three_rows_in_succession_is_replaced_and_no_row_is_lost():
    notes = []
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=lambda call: bad_replica(call, "sample-4"))
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(100),
                        on_progress=lambda progress: notes.extend(progress.notes))
    assert len(outcomes) == 100 and all(isinstance(outcome.value, Clip) for outcome in outcomes)
    assert sum("sample-4: replaced by a new process" in note for note in notes) == 1
    assert 3 <= sum(outcome.attempts - 1 for outcome in outcomes) <= 5


def test_a_replica_that_now_and_then_fails_what_others_make_is_replaced():
    calls, notes = itertools.count(), []
    executor = SimulatedExecutor(box(4), SLEEPS_S,
                         fault=lambda call: bad_replica(call, "sample-4") if next(calls) % 3 == 0 else None)
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(200),
                        on_progress=lambda progress: notes.extend(progress.notes))
    assert len(outcomes) == 200 and all(isinstance(outcome.value, Clip) for outcome in outcomes)
    assert sum("sample-4: replaced by a new process" in note and "made elsewhere" in note for note in notes) == 1


def bad_replica(call: Call, name: str) -> Answer | None:
    if call.kind != "work" or call.replica.name != name:
        return None
    return poisoned({task.request.seed for task in call.tasks})(call)


def test_rows_that_fail_everywhere_do_not_fence_the_replicas_that_make_all_others():
    notes, poison = [], set(range(0, 200, 5))
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=failing("sample", poison, poisoned(poison)))
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(200),
                        on_progress=lambda progress: notes.extend(progress.notes))
    failed = {outcome.value.request.seed for outcome in outcomes if isinstance(outcome.value, Failure)}
    assert failed == poison and len(outcomes) == 200
    assert len([replica for replica in executor.started if replica.stage.name == "sample"]) <= 8


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_stage_that_makes_nothing_ends_the_run_and_charges_no_row(gpus):
    executor = SimulatedExecutor(box(gpus), SLEEPS_S,
                                 fault=lambda call: bad_replica(call, call.replica.name)
                                 if call.replica.stage.name == "sample" else None)
    driver, outcomes = Driver(executor, pretend_stages(gpus=WHOLE), requests(500)), []
    with pytest.raises(ClusterError, match="stage sample made nothing of .* different clips .* ValueError: poison"):
        outcomes.extend(driver.outcomes())
    assert not outcomes and not executor.free_at


def test_a_manifest_of_a_few_bad_rows_ends_with_failed_rows():
    executor = SimulatedExecutor(box(1), SLEEPS_S, fault=failing("sample", set(range(10)), poisoned(set(range(10)))))
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(10))
    assert len(outcomes) == 10 and all(outcome.attempts == 3 for outcome in outcomes)


def test_verdicts_on_rows_never_fence_a_replica():
    def refused(call: Call) -> Answer:
        done = poisoned({task.request.seed for task in call.tasks})(call)
        return replace(done, made=[replace(failure, about_row=True) for failure in done.made])

    executor, notes = SimulatedExecutor(box(2), SLEEPS_S, fault=failing("publish", set(range(100)), refused)), []
    _, outcomes = drive(executor, pretend_stages(gpus=WHOLE), requests(60),
                        on_progress=lambda progress: notes.extend(progress.notes))
    assert len(outcomes) == 60 and not any("replaced by" in note for note in notes)


def ends(executor: SimulatedExecutor, stage: str = "publish") -> list[float]:
    return [ended for _, ended, _ in executor.worked[stage]]


@pytest.mark.parametrize("gpus, batch", [(SHARED, 1), (WHOLE, 1), (WHOLE, 4)])
def test_no_clip_is_begun_that_would_not_be_published_by_the_deadline(gpus, batch):
    executor = SimulatedExecutor(box(4), SLEEPS_S)
    budget = Budget(until=40.0, clock=executor.now)
    _, outcomes = drive(executor, pretend_stages(gpus=gpus, batch=batch), requests(10_000), budget=budget)
    assert len(outcomes) == len(ends(executor, "sample")) * batch == len(ends(executor)) * batch
    assert max(ends(executor)) <= 40.0 and max(ends(executor)) > 40.0 - 2 * batch
    assert budget.has_stopped


def test_a_deadline_that_passes_while_models_load_ends_the_run():
    executor = SimulatedExecutor(box(4), SLEEPS_S, load_s=600.0)
    budget = Budget(until=30.0, clock=executor.now)
    assert drive(executor, pretend_stages(gpus=SHARED), requests(100), budget=budget)[1] == []
    assert executor.clock < 32 and budget.has_stopped


@pytest.mark.parametrize("gpus, held", [(WHOLE, 4), (SHARED, 4)])
def test_gpu_hours_count_every_gpu_that_is_held_from_its_start_to_its_end(gpus, held):
    executor = SimulatedExecutor(box(4), SLEEPS_S)
    budget = Budget(gpu_hours=100 / 3600)
    _, outcomes = drive(executor, pretend_stages(gpus=gpus), requests(10_000), budget=budget)
    assert outcomes and budget.has_stopped
    assert 85 < 3600 * budget.gpu_hours <= 100
    assert 3600 * budget.gpu_hours == pytest.approx(held * executor.clock, abs=8)


def test_a_night_on_cpus_holds_no_gpu_and_is_not_limited_by_them():
    executor, budget = SimulatedExecutor([Node(id="box", cpus=8)], SLEEPS_S), Budget(gpu_hours=1e-9)
    assert len(drive(executor, pretend_stages(), requests(50), budget=budget)[1]) == 50
    assert budget.gpu_hours == 0.0 and not budget.has_stopped


def test_when_a_long_clip_no_longer_fits_shorter_ones_are_still_made():
    executor = SimulatedExecutor(box(1), SLEEPS_S)
    plain = executor.answer

    def answer(call: Call) -> Answer:                   # a frame takes 0.1 s of sampling
        done = plain(call)
        if call.kind == "work" and call.replica.stage.name == "sample":
            seconds = {"sample": 0.1 * call.tasks[0].request.shape.frames}
            return replace(done, report=replace(done.report, seconds=seconds))
        return done

    executor.answer = answer
    budget = Budget(until=30.0, clock=executor.now)
    first = [pretend_request(number, frames=5) for number in range(10)]
    long = [pretend_request(100 + number, frames=301) for number in range(20)]
    last = [pretend_request(200 + number, frames=5) for number in range(10)]
    _, outcomes = drive(executor, pretend_stages(gpus=SHARED), iter([*first, *long, *last]), budget=budget)
    assert sorted(outcome.value.request.seed for outcome in outcomes) == [*range(10), *range(200, 210)]
    assert budget.left_out == 20                        # judged by their frames: none of them was ever measured


def test_a_budget_that_is_not_reached_changes_nothing():
    executor, budget = SimulatedExecutor(box(4), SLEEPS_S), Budget(until=10**6, gpu_hours=10**6, clock=lambda: 0.0)
    assert len(drive(executor, pretend_stages(gpus=SHARED), requests(200), budget=budget)[1]) == 200
    assert not budget.has_stopped and budget.left_out == 0


def test_draining_publishes_what_is_being_sampled_and_begins_nothing():
    executor, stop = SimulatedExecutor(box(4), SLEEPS_S), Stop()
    outcomes = []
    for outcome in Driver(executor, pretend_stages(gpus=SHARED), requests(10_000), stop=stop).outcomes():
        outcomes.append(outcome)
        if len(outcomes) == 50:
            stop.drain()
            sampled = len([1 for _, ended, _ in executor.worked["sample"] if ended <= executor.clock])
            stopped_at = executor.clock
    assert sampled <= len(outcomes) <= sampled + 5
    assert executor.clock - stopped_at <= 2.0 and not executor.free_at


def test_saving_stops_what_is_being_sampled_charges_nobody_and_publishes_what_is_sampled():
    executor, stop = SimulatedExecutor(box(4), SLEEPS_S | {"sample": 1000.0}), Stop()
    driver = Driver(executor, pretend_stages(gpus=SHARED), requests(10_000), stop=stop)
    outcomes = []
    for outcome in driver.outcomes():
        outcomes.append(outcome)
        if not stop.saving:
            stop.save()
            stopped_at = executor.clock
    sampled = len([1 for _, ended, _ in executor.worked["sample"] if ended <= stopped_at])
    assert sampled <= len(outcomes) <= sampled + 5 and driver.failed == 0
    assert executor.clock - stopped_at <= 2.0 and not executor.free_at


def test_saving_leaves_what_waits_for_a_decoder_that_is_only_starting():
    """Hundreds of latents are safe in the run folder, and whoever sends SIGTERM waits for seconds."""
    executor, stop = SimulatedExecutor(box(4), SLEEPS_S | {"sample": 0.05, "publish": 5.0}), Stop()
    slow_to_load = executor.submit

    def submit(call: Call) -> None:
        executor.load_s = 60.0 if call.replica.stage.name == "publish" else 2.0
        slow_to_load(call)

    executor.submit = submit
    driver = Driver(executor, pretend_stages(gpus=SHARED), requests(10_000), stop=stop)

    def on_progress(progress):
        if not stop.saving and progress.stages[2].queued > 200:
            stop.save()
            stop.at = executor.clock

    driver.reporter.on_progress = on_progress
    outcomes = list(driver.outcomes())
    assert stop.saving and len(outcomes) <= 20 and executor.clock - stop.at < 20 and not executor.free_at


def test_another_process_that_keeps_a_gpu_is_named_and_not_waited_for_without_end():
    executor, notes = SimulatedExecutor(box(1), SLEEPS_S | {"sample": 10_000.0}), []
    executor.waits_for = lambda replica: ("process 7 (night.py)", executor.clock - 20.0)
    said = "sample cannot work .*process 7 .night.py. has had its GPU for [0-9]+ s. End it"
    with pytest.raises(ClusterError, match=said):
        drive(executor, pretend_stages(gpus=SHARED), requests(5),
              on_progress=lambda progress: notes.extend(progress.notes))
    assert sum("waits for its GPU, which process 7 (night.py) has had for" in note for note in notes) > 20


def test_seconds_of_a_clip_that_was_partly_done_before_are_no_measure_for_others():
    def fault(call):
        if call.kind == "work" and call.replica.stage.name == "sample" and call.tasks[0].request.seed < 5:
            report = Report(seconds={"sample": 0.001}, worker="", device="", peak_memory_bytes=0, partly=True)
            return Done(made=values(call), report=report)

    budget = Budget()
    _, outcomes = drive(SimulatedExecutor(box(4), SLEEPS_S, fault=fault), pretend_stages(gpus=SHARED), requests(20),
                        budget=budget)
    assert len(outcomes) == 20 and min(outcome.seconds["sample"] for outcome in outcomes) == 0.001
    assert budget.seconds("sample", outcomes[0].value.request) == pytest.approx(SLEEPS_S["sample"])


def test_stopping_at_once_leaves_no_process():
    executor, stop = SimulatedExecutor(box(4), SLEEPS_S), Stop()
    outcomes = []
    for outcome in Driver(executor, pretend_stages(gpus=SHARED), requests(10_000), stop=stop).outcomes():
        outcomes.append(outcome)
        stop.now()
    assert 1 <= len(outcomes) <= 5 and not executor.free_at


def test_a_closed_iterator_leaves_no_process():
    executor = SimulatedExecutor(box(4), SLEEPS_S)
    outcomes = Driver(executor, pretend_stages(gpus=SHARED), requests(100)).outcomes()
    next(outcomes)
    outcomes.close()
    assert not executor.free_at


def test_no_requests_start_nothing():
    executor = SimulatedExecutor([], SLEEPS_S)
    assert drive(executor, pretend_stages(gpus=WHOLE), [])[1] == []
    assert not executor.started


def test_progress_adds_up():
    seen = []
    executor = SimulatedExecutor(box(4), SLEEPS_S, fault=failing("sample", {7}, poisoned({7})))
    drive(executor, pretend_stages(gpus=WHOLE), requests(40), on_progress=seen.append)
    last = seen[-1]
    assert (last.done, last.failed) == (39, 1)
    assert [(stage.name, stage.done, stage.queued, stage.in_flight) for stage in last.stages] == [
        ("encode", 40, 0, 0), ("sample", 39, 0, 0), ("publish", 39, 0, 0)]
    assert any("seed" not in note and "poison" in note for progress in seen for note in progress.notes)


@pytest.mark.parametrize("seed", range(40))
def test_every_request_ends_once_whatever_breaks(seed):
    """Random machines, pipelines and faults; calls die, machines vanish and return, inputs are lost, stores stall."""
    chance = random.Random(seed)
    full = [Node(id=f"node {number}", cpus=chance.choice([2, 8]), gpus=chance.choice([1, 2, 4]))
            for number in range(chance.choice([1, 2, 3]))]
    breaks = chance.choice([0.0, 0.02, 0.1])

    def fault(call: Call) -> Answer | None:
        if len(full) > 1 and chance.random() < breaks / 5:
            executor.machines = chance.sample(full, len(full) - 1)
        elif chance.random() < 0.2:
            executor.machines = full
        if chance.random() >= breaks:
            return None
        at_work = ["input", "store", "cancelled", "failure", "unfit"] if call.kind == "work" else []
        how = chance.choice(["died", "node", *at_work])
        if how == "failure":
            return poisoned({chance.choice(call.tasks).request.seed})(call)
        return Broken(how=how, reason="chance")

    seconds = {"encode": 0.02, "sample": chance.choice([0.05, 0.5]), "publish": chance.choice([0.01, 0.3])}
    executor = SimulatedExecutor(full, seconds, fault=fault)
    gpus = chance.choice([SHARED, WHOLE, {"encode": 1.0, "sample": 0.5, "publish": 0.5}])
    room = gpus is SHARED and full[0].gpus > 1
    stages = pretend_stages(gpus=gpus, window=chance.choice([None if room else 20, 20, 1000]),
                            batch=chance.choice([1, 3]))
    wanted = [pretend_request(number, prompt=f"prompt {number // chance.choice([1, 4])}") for number in range(150)]
    driver, outcomes = drive(executor, stages, iter(wanted), max_attempts=3)
    assert Counter(outcome.value.request.seed for outcome in outcomes) == Counter(range(150))
    assert all(1 <= outcome.attempts <= 3 for outcome in outcomes)
    assert driver.queues.held == 0 and not driver.queues[0].shared and not any(queue.tasks for queue in driver.queues)
    if not breaks:
        assert all(isinstance(outcome.value, Clip) and outcome.attempts == 1 for outcome in outcomes)


UPSCALER = '''"""A stage that a person adds: twice as many pixels."""

from dataclasses import replace
from importlib import import_module


class Upscaler:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, batch):
        return [replace(latent, streams=(*latent.streams, self.factor)) for latent in batch]
'''


def test_a_stage_of_another_name_takes_its_place_between_two_others_and_one_file_is_all_that_it_needs(
        tmp_path, monkeypatch):
    """The same outcomes from `run_local`, which runs it, and from the driver, which gives it replicas and a queue."""
    (tmp_path / "upscaling.py").write_text(UPSCALER)
    monkeypatch.syspath_prepend(tmp_path)
    step = Step(actor=import_module("upscaling").Upscaler, args={"factor": 2})
    upscale = Stage(name="upscale", steps=(step,), gpus=0.5, cpus=0.25)
    encode, sample, publish = pretend_stages(gpus={"encode": 0.25, "sample": 0.5})
    stages, notes = [encode, sample, upscale, publish], []
    worker = Worker("upscale", upscale.steps, threads=1)
    (latent,), _ = worker([pretend_value("latent", pretend_request(1))])
    assert latent.streams == (2,)
    local = {outcome.value.request.clip_id: outcome for outcome in run_local(stages, requests(40))}
    executor = SimulatedExecutor(box(2), SLEEPS_S | {"upscale": 0.2}, fault=failing("upscale", {7}, poisoned({7})))
    driver, outcomes = drive(executor, stages, requests(40),
                             on_progress=lambda progress: notes.extend(progress.notes))
    assert all(set(outcome.seconds) >= {"sample", "upscale", "publish"} for outcome in local.values())
    made = [outcome for outcome in outcomes if isinstance(outcome.value, Clip)]
    assert {outcome.value.request.clip_id for outcome in made} == set(local) - {f"{7:064x}"} and len(made) == 39
    assert all(outcome.seconds["upscale"] == 0.2 for outcome in made)
    failed, = [outcome.value for outcome in outcomes if isinstance(outcome.value, Failure)]
    assert failed.stage == "upscale" and any(note.startswith("upscale-") for note in notes)
    assert [queue.stage.name for queue in driver.queues] == ["encode", "sample", "upscale", "publish"]
    found = forecast(stages, box(2), {name: Cost(held_s=1.0) for name in SLEEPS_S | {"upscale": 0.2}}, clips=100)
    assert found.replicas["upscale"] >= 1 and found.clips_per_hour > 0
