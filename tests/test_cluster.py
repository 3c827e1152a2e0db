"""The pipeline on Ray: real processes, real deaths, GPUs that only count."""

import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from fake_stages import CannotBeMade, Patient, calls, fake_stages

from dailies.actors.messages import Clip, Failure
from dailies.jobs.bench.pretend import pretend_request, pretend_stages
from dailies.pipeline.run.lease import process_start
from dailies.pipeline.scheduler import cluster, ray_executor, ray_private
from dailies.pipeline.scheduler.cluster import ClusterError, Stop
from dailies.pipeline.stages import Stage, Step, run_local

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def four_gpus():
    """One local cluster for the tests of this file; each test's processes end with its run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))           # Ray's processes import fake_stages
        with cluster.connect("local", cpus=4, gpus=4):
            yield


def requests(count: int):
    return map(pretend_request, range(count))


def by_seed(outcomes) -> dict:
    outcomes = list(outcomes)
    assert len({outcome.value.request.seed for outcome in outcomes}) == len(outcomes)
    return {outcome.value.request.seed: outcome for outcome in outcomes}


def test_outcomes_are_those_of_run_local(four_gpus, tmp_path):
    (local := tmp_path / "local").mkdir()
    (spread := tmp_path / "spread").mkdir()
    faults = {"sample": {5: "raise"}}
    wanted = by_seed(run_local(fake_stages(local, faults=faults), requests(12)))
    seen = []
    stages = fake_stages(spread, faults=faults, gpus={"encode": 0.25, "sample": 0.75, "publish": 0.25}, cpus=2.0,
                         replicas={"encode": 1, "sample": 1, "publish": 1})
    got = by_seed(cluster.run(stages, requests(12), on_progress=seen.append))
    assert got.keys() == wanted.keys()
    assert got[5].value == replace(wanted[5].value, worker=got[5].worker) and got[5].worker.startswith("sample-")
    assert all(got[seed].value == wanted[seed].value for seed in wanted if seed != 5)
    assert [seed for seed in got if isinstance(got[seed].value, Failure)] == [5] and got[5].attempts == 3
    outcome = got[0]
    assert outcome.seconds.keys() == {"encode", "sample", "publish"} and outcome.queue_s > 0
    assert outcome.worker.endswith(socket.gethostname()) and outcome.device == "cpu"
    assert outcome.peak_memory_bytes > 2**20
    assert (seen[-1].done, seen[-1].failed) == (11, 1)
    assert {call["threads"] for call in calls(spread)} == {2}


def test_the_encoder_encodes_each_prompt_once_and_its_gpu_goes_to_a_sampler(four_gpus, tmp_path):
    stages = fake_stages(tmp_path, gpus={"encode": 2, "sample": 2}, sleeps_s={"encode": 0.05, "sample": 0.2},
                         window=200, replicas={"publish": 1})
    rows = [pretend_request(number, prompt=f"prompt {number // 4}") for number in range(100)]
    notes = []
    outcomes = by_seed(cluster.run(stages, rows, on_progress=lambda progress: notes.extend(progress.notes)))
    assert len(outcomes) == 100 and all(isinstance(outcome.value, Clip) for outcome in outcomes.values())
    assert len(calls(tmp_path, "encode")) == 25 and len({call["pid"] for call in calls(tmp_path, "encode")}) == 1
    assert any("encode: all clips are ready; it has ended" in note for note in notes)
    began = {pid: min(call["began"] for call in calls(tmp_path, "sample") if call["pid"] == pid)
             for pid in {call["pid"] for call in calls(tmp_path, "sample")}}
    all_encoded = max(call["ended"] for call in calls(tmp_path, "encode", "ended"))
    assert len(began) == 2 and min(began.values()) < all_encoded < max(began.values())


def test_every_kind_of_poison_costs_its_own_row_after_three_attempts(four_gpus, tmp_path, monkeypatch):
    monkeypatch.setattr("dailies.pipeline.scheduler.watchdog.LEAST_LIMIT_S", 6.0)
    faults = {"sample": {5: "raise", 9: "segfault", 14: "hang"}, "publish": {20: "raise once"}}
    stages = fake_stages(tmp_path, faults=faults, sleeps_s={"sample": 0.02},
                         replicas={"encode": 1, "sample": 2, "publish": 2})
    outcomes = by_seed(cluster.run(stages, requests(40)))
    failed = {seed: outcome for seed, outcome in outcomes.items() if isinstance(outcome.value, Failure)}
    assert {seed: outcome.value.error_type for seed, outcome in failed.items()} == {
        5: "RuntimeError", 9: "WorkerDied", 14: "TimedOut"}
    assert all(outcome.attempts == 3 and outcome.worker.startswith("sample-") for outcome in failed.values())
    assert "fake_stages.py" in failed[5].value.stack and len(outcomes) == 40
    assert all(outcomes[seed].attempts <= (2 if seed == 20 else 1) for seed in set(range(40)) - set(failed))
    safe = [call["safe"] for call in calls(tmp_path, "sample") if call["seeds"] == [5]]
    assert safe == [False, False, True]


def test_a_death_reruns_only_what_that_process_held(four_gpus, tmp_path):
    """One process of each kind dies under one clip, and every process that samples seed 20 dies."""
    faults = {"encode": {7: "die once"}, "sample": {8: "die once", 20: "die"}, "publish": {9: "die once"}}
    stages = fake_stages(tmp_path, faults=faults, sleeps_s={"sample": 0.05},
                         replicas={"encode": 1, "sample": 2, "publish": 1})
    notes = []
    outcomes = by_seed(cluster.run(stages, requests(40), max_attempts=2,
                                   on_progress=lambda progress: notes.extend(progress.notes)))
    poison = outcomes[20].value
    assert (poison.stage, poison.error_type) == ("sample", "WorkerDied") and outcomes[20].attempts == 2
    for seed in set(range(40)) - {20}:
        assert isinstance(outcomes[seed].value, Clip)
        assert outcomes[seed].attempts <= (2 if seed in (7, 8, 9) else 1)
    for stage in ("encode", "sample", "publish"):
        ended = Counter(seed for call in calls(tmp_path, stage, "ended") for seed in call["seeds"])
        again = [seed for seed, times in ended.items() if times > 1]
        assert len(again) <= 4, (stage, again)              # done, and its answer died with the process
    assert 5 <= sum("it died" in note for note in notes) <= 6      # the poison's first may be nobody's for certain


@pytest.mark.parametrize("how, word", [("raise", "ValueError: weights are broken"), ("die", "cannot start")])
def test_steps_that_cannot_be_made_end_the_run_with_a_clear_error(four_gpus, tmp_path, how, word):
    with pytest.raises(ClusterError, match=word):
        stages = fake_stages(tmp_path, load={"sample": how}, names=["sample"], replicas={"sample": 1})
        list(cluster.run(stages, requests(4)))


@pytest.mark.parametrize("what", ["the process", "its steps"])
def test_what_cannot_be_imported_where_the_work_is_says_so_in_its_own_words(what, four_gpus, tmp_path, monkeypatch):
    stages = fake_stages(tmp_path, names=["sample"], replicas={"sample": 1})
    wanted = ("ModuleNotFoundError: No module named 'dailies.model.catalog'; 'model' is not a package. "
              "No clip is charged")
    if what == "the process":
        monkeypatch.setattr(ray_executor, "Process", CannotBeMade)
    else:
        wanted = "ModuleNotFoundError: No module named 'only_here'. No clip is charged"
        there = type("OnlyHere", (), {"__module__": "only_here", "__qualname__": "OnlyHere"})
        module = ModuleType("only_here")
        module.OnlyHere = there
        monkeypatch.setitem(sys.modules, "only_here", module)
        stages = [replace(stages[0], steps=(Step(actor=there),))]
    with pytest.raises(ClusterError) as raised:
        list(cluster.run(stages, requests(2)))
    said = str(raised.value)
    assert f"stage sample cannot start: {wanted}" in said and "\x1b" not in said and " object at 0x" not in said


def test_what_the_machines_can_never_hold_is_said_at_once(four_gpus, tmp_path):
    with pytest.raises(ClusterError, match="sample fits on no machine.* 8 GPU"):
        list(cluster.run(fake_stages(tmp_path, gpus={"sample": 8}), requests(4)))


def test_draining_publishes_what_is_sampled_and_ends_every_process(four_gpus, tmp_path):
    stop, outcomes = Stop(), []
    stages = fake_stages(tmp_path, sleeps_s={"sample": 0.2}, replicas={"sample": 2})
    for outcome in cluster.run(stages, requests(1000), stop=stop):
        outcomes.append(outcome)
        if len(outcomes) == 5:
            stop.drain()
    sampled = [seed for call in calls(tmp_path, "sample", "ended") for seed in call["seeds"]]
    assert 5 <= len(outcomes) <= 20
    assert len(set(sampled) - by_seed(outcomes).keys()) <= 2        # begun in the moment of being called off
    deadline = time.monotonic() + 20
    pids = {call["pid"] for call in calls(tmp_path)}
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("who", ["the driver", "the machine"])
def test_a_sampler_that_is_told_to_end_saves_and_charges_nobody(who, four_gpus, tmp_path):
    """The driver stops the run by saving, or the sampler's process gets SIGTERM; the next one goes on."""
    stop, told = Stop(), []

    def tell(progress):
        if told or not (tmp_path / "begun").exists():
            return
        told.append(int((tmp_path / "begun").read_text()))
        stop.save() if who == "the driver" else os.kill(told[0], signal.SIGTERM)

    encode, _, publish = fake_stages(tmp_path)
    sample = Stage(name="sample", steps=(Step(actor=Patient, args={"folder": tmp_path}),), replicas=1)
    stages = [encode, sample, publish]
    outcomes = by_seed(cluster.run(stages, requests(3), stop=stop, on_progress=tell, progress_every_s=0.1))
    assert (tmp_path / "saved").read_text() == str(told[0])
    if who == "the driver":
        assert outcomes == {}
        outcomes = by_seed(cluster.run(stages, requests(3)))
    assert len(outcomes) == 3
    assert all(isinstance(outcome.value, Clip) and outcome.attempts == 1 for outcome in outcomes.values())
    assert not alive(told[0])


def alive(pid: int) -> bool:
    return bool(process_start(pid))                     # "" of a zombie, None of one that is gone


def test_the_drivers_memory_does_not_grow_with_the_night(four_gpus):
    marks = []
    stages = pretend_stages(window=50, replicas=1)
    for done, _ in enumerate(cluster.run(stages, requests(3000)), start=1):
        if done % 500 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            marks.append(pages * resource.getpagesize())
    growth = (marks[-1] - marks[1]) / 2000
    assert growth < 4096, f"{growth:.0f} bytes per clip"


def test_a_lost_machine_loses_no_row(tmp_path):
    """All embeddings are lost while samplers hold every GPU: one of them makes room, and the encoder returns."""
    done = subprocess.run([sys.executable, str(HERE / "lose_a_machine.py"), str(tmp_path)],
                          capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "40 clips, attempts {1}" in done.stdout, done.stdout
    assert "makes room for encode" in done.stdout and "and is made again" in done.stdout, done.stdout


def test_no_cluster_at_the_address_is_said_within_seconds():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"     # bound, and nobody listens
        began = time.monotonic()
        with pytest.raises(ClusterError, match="no Ray cluster answers.*ray start --head"), cluster.connect(address):
            pass
    assert time.monotonic() - began < 30
    with pytest.raises(ClusterError, match="dailies submit"), cluster.connect("ray://127.0.0.1:10001"):
        pass


def test_a_cluster_without_tokens_is_refused_unless_it_is_on_loopback(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(cluster, "reachable", lambda address, named: address)
    for address in ("local", "192.0.2.7:6379"):
        with pytest.raises(ClusterError, match="whoever reaches this port.*Set RAY_AUTH_MODE=token"):
            with cluster.connect(address):
                pass
    for host in ("127.0.0.1", "[::1]", "localhost"):
        assert cluster.is_loopback(host)
    for host in ("0.0.0.0", "192.0.2.7", "no such host"):
        assert not cluster.is_loopback(host)


def test_a_ray_that_was_not_tried_with_is_told_of_and_one_that_lacks_a_private_name_is_refused(monkeypatch):
    assert ray_private.unknown_version() is None
    monkeypatch.setattr(ray_private.ray, "__version__", "2.99.1")
    assert "Ray 2.99.1 is not one that dailies was tested with" in ray_private.unknown_version()
    script = ("import ray, sys\nsys.modules['ray._private.authentication.authentication_token_setup'] = None\n"
              "from dailies.pipeline.scheduler.executor import ClusterError\n"
              "try:\n    from dailies.pipeline.scheduler import cluster\nexcept ClusterError as error:\n    "
              "print(error)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "dailies does not know it: " in done.stdout and "pip install 'ray[default]==" in done.stdout


def test_rays_private_modules_are_used_in_one_file():
    folders = [HERE.parent / name for name in ("actors", "pipeline", "jobs")]
    found = {path.name for folder in folders for path in folder.rglob("*.py")
             if re.search(r"ray\._(private|raylet)", path.read_text())}
    assert found == {"ray_private.py"}


def test_a_run_needs_a_cluster():
    script = ("from dailies.pipeline.scheduler import cluster\ntry:\n    cluster.run([], [])\n"
              "except cluster.ClusterError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "dailies.connect(" in done.stdout


def test_the_token_is_for_its_owner_only(tmp_path, monkeypatch):
    """Ray writes it readable for everybody; a local run needs none, and makes none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    path = tmp_path / ".ray" / "auth_token"
    assert cluster.guard_token() == path and not path.parent.exists()
    path.parent.mkdir()
    path.write_text("token")
    os.chmod(path, 0o644)
    cluster.guard_token()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == "token"


def test_an_address_from_the_environment_is_named_in_what_it_causes(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match="RAY_ADDRESS='127.0.0.1:1', which the environment.*unset RAY_ADDRESS"):
        with cluster.connect("auto"):
            pass
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(ClusterError, match="RAY_ADDRESS='ray://127.0.0.1:10001'.*Ray Client"), cluster.connect("auto"):
        pass
    with pytest.raises(ClusterError, match="answers at '127.0.0.1:1'") as raised, cluster.connect("127.0.0.1:1"):
        pass
    assert "RAY_ADDRESS" not in str(raised.value)


def test_auto_does_not_follow_what_other_users_say_about_a_cluster(monkeypatch):
    """Ray would: a process called raylet, or a file in /tmp/ray, may name anybody's."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def raylet(**user) -> subprocess.Popen:
        started = subprocess.Popen(["raylet", "-c", "echo; read line", "sh", "--gcs-address=192.0.2.7:1"],
                                   executable="/bin/sh", stdin=subprocess.PIPE, stdout=subprocess.PIPE, **user)
        started.stdout.readline()
        return started

    with raylet() as ours:
        assert "192.0.2.7:1" in cluster.own_raylets()
        ours.stdin.close()
    assert "192.0.2.7:1" not in cluster.own_raylets()
    if os.getuid() == 0:                                # only root can be another user
        with raylet(user=65534, group=65534, extra_groups=[]) as theirs:
            assert "192.0.2.7:1" not in cluster.own_raylets()
            theirs.stdin.close()
    monkeypatch.setattr(ray_private, "latest_address", lambda: "192.0.2.7:1")
    monkeypatch.setattr(cluster, "own_raylets", set)
    with pytest.raises(ClusterError, match="0 clusters have a raylet of this user's.*--ray HOST:6379"):
        cluster.reachable("auto", "'auto'")
    with socket.create_server(("0.0.0.0", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr(cluster, "own_raylets", lambda: {address})
        assert cluster.reachable("auto", "'auto'").endswith(address.partition(":")[2])
        monkeypatch.setattr(cluster, "own_raylets", lambda: {address, "192.0.2.8:1"})
        with pytest.raises(ClusterError, match="2 clusters have a raylet.*192.0.2.8:1"):
            cluster.reachable("auto", "'auto'")
        monkeypatch.setattr(ray_private, "latest_address", lambda: address)
        assert cluster.reachable("auto", "'auto'").endswith(address.partition(":")[2])


def test_a_killed_driver_leaves_no_process(tmp_path):
    script = ("import os, sys\nfrom pathlib import Path\nfrom fake_stages import fake_stages\n"
              "from dailies.jobs.bench.pretend import pretend_request\nfrom dailies.pipeline.scheduler import cluster\n"
              "folder = Path(sys.argv[1])\n"
              "with cluster.connect('local', cpus=2, gpus=0):\n"
              "    stages = fake_stages(folder, names=['sample'], replicas={'sample': 1})\n"
              "    for _ in cluster.run(stages, map(pretend_request, range(1000))):\n"
              "        node = cluster.ray._private.worker._global_node\n"
              "        (folder / 'session').write_text(node.get_session_dir_path())\n"
              "        os.kill(os.getpid(), 9)\n")
    with open(tmp_path / "output", "w") as output:      # no pipe: Ray's two agents hold it for a minute more
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], stdout=output, stderr=output,
                              timeout=120, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == -9, (tmp_path / "output").read_text()
    session, pids = (tmp_path / "session").read_text(), {call["pid"] for call in calls(tmp_path)}
    deadline = time.monotonic() + 60
    while (left := [pid for pid in pids if alive(pid)] + processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


def processes_of(session: str) -> list[str]:
    """Ray's own processes (raylet, GCS) of a session, by its folder in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if session in path.read_text() and alive(int(path.parent.name)):
                found.append(path.parent.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def test_a_start_of_ray_that_is_tried_again_is_told_of(monkeypatch, tmp_path):
    notes, answers = [], [Exception("The current node timed out during startup. This could happen because ..."), None]

    def init(**options):
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr(cluster.ray, "init", init)
    cluster.start(tmp_path, notes.append)
    assert not answers and len(notes) == 1 and "did not come up in time: The current node timed out" in notes[0]
