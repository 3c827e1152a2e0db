"""The pipeline on many machines, and on this one: Ray starts the processes, driver.py decides what they do.

    with cluster.connect("local"):
        for outcome in cluster.run(stages, requests):
            ...

Which cluster that is, that only this user gets into it, and what is said where it cannot be had. The processes are in
ray_executor.py.
"""

import ipaddress
import logging
import os
import socket
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray

from dailies.actors.cores import usable_cores
from dailies.actors.messages import Request
from dailies.model.private import at_home
from dailies.pipeline.scheduler import local_ray, ray_private
from dailies.pipeline.scheduler.budget import Budget
from dailies.pipeline.scheduler.driver import Driver
from dailies.pipeline.scheduler.executor import ClusterError
from dailies.pipeline.scheduler.faults import machine_fault
from dailies.pipeline.scheduler.intake import Stop
from dailies.pipeline.scheduler.progress import Progress
from dailies.pipeline.scheduler.ray_executor import RayExecutor, nodes, one_line
from dailies.pipeline.stages import Outcome, Stage, check_stages

__all__ = ["ClusterError", "Progress", "Stop", "connect", "nodes", "run"]

OBJECT_STORE_BYTES = 512 * 2**20    # of a local cluster; what does not fit goes to its disk


def run(stages: Sequence[Stage], requests: Iterable[Request], *, max_attempts: int = 3,
        task_timeout_s: float | None = 4 * 3600.0, on_progress: Callable[[Progress], None] | None = None,
        progress_every_s: float = 0.5, stop: Stop | None = None, budget: Budget | None = None) -> Iterator[Outcome]:
    """What `run_local` yields, in any order, from all machines of the connected cluster.

    requests: taken as the first stage has room, so there may be any number.  task_timeout_s: of one clip in one stage.
    budget: what does not fit in it is not begun, and has no outcome.
    All processes are ended when the iterator is exhausted or closed.
    Raises ClusterError when the machines cannot run the stages, StoreError when the store cannot be used.
    """
    if not ray.is_initialized():
        raise ClusterError("no cluster is connected; use `with dailies.connect(address):` around dailies.run_cluster")
    check_stages(stages)
    driver = Driver(RayExecutor(), stages, requests, max_attempts=max_attempts, task_timeout_s=task_timeout_s,
                    on_progress=on_progress, progress_every_s=progress_every_s, stop=stop, budget=budget)
    return on_this_machine(driver.outcomes())


def on_this_machine(outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    """The same; what is wrong with the driver's own machine is a ClusterError that says what to do."""
    try:
        yield from outcomes
    except (OSError, MemoryError) as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        raise ClusterError(f"this machine, which directs the work, cannot go on: {fault}. The same command continues"
                           ) from error


@contextmanager
def connect(address: str = "local", *, cpus: int | None = None, gpus: int | None = None,
            note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """A cluster for the time of the block: "local" starts one on this machine, "auto" finds the one around this process
    (RAY_ADDRESS, or `ray start` on this machine), HOST:PORT names one that this machine belongs to.

    cpus, gpus: what a local one says it has; None: the cores that this process may use, and the GPUs of the machine.
    note: is told when a local one has to be started again, which costs half a minute, and of a Ray that was never
    tried with.
    A local one listens on loopback only, asks for a token that is made for it, and keeps its files in a folder that
    only this user can enter (local_ray.py). It ends with this process, even when that is killed: raylet, GCS and
    workers within seconds, Ray's two agents, which keep its standard output open, after a minute or two. Call it in the
    main thread: they end with the thread that started them.
    Any other listens on every network interface, and whoever gets in runs programs there: without token authentication
    only a cluster on loopback is used.
    Raises ClusterError with the next step when there is no such cluster, or it is open to everybody.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if warning := ray_private.unknown_version():
        note(warning)
    ray_private.quiet_workers()
    with own_cluster(cpus, gpus, note) if address == "local" else another_cluster(address):
        yield


OPTIONS: dict[str, Any] = dict(namespace="dailies", log_to_driver=False, logging_level=logging.CRITICAL)


@contextmanager
def own_cluster(cpus: int | None, gpus: int | None, note: Callable[[str], None]) -> Iterator[None]:
    refuse_without_token("local")
    with local_ray.session_folder() as folder:
        local_ray.stand_somewhere(folder)
        try:
            with local_ray.changed(local_ray.environment(folder)), ray_private.on_loopback():
                ray_private.forget_token()
                start(folder, note, address="local", include_dashboard=False, num_cpus=cpus or usable_cores(),
                      num_gpus=gpus, object_store_memory=OBJECT_STORE_BYTES, _temp_dir=str(folder / local_ray.SESSION))
            yield
        finally:
            ray.shutdown()
            ray_private.forget_token()


def start(folder: Path, note: Callable[[str], None], **options: Any) -> None:
    """Raises ClusterError with what to do about it."""
    for last in (False, False, True):                   # on a busy machine Ray may not come up within its own 30 s
        try:
            ray.init(job_config=ray_private.Job(), **options, **OPTIONS)
            return
        except Exception as error:                      # Ray raises bare Exceptions too
            next_step = local_ray.advice(error, folder)
            ray.shutdown()
            if last or next_step != local_ray.BUSY:
                raise ClusterError(f"Ray does not start on this machine: {one_line(error)}. {next_step}") from error
            note(f"Ray did not come up in time: {one_line(error)}; starting it again")


@contextmanager
def another_cluster(address: str) -> Iterator[None]:
    named = f"{address!r}"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        named = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']!r}, which the environment sets and --ray auto obeys"
    token = guard_token()
    address = reachable(address, named)
    ray_private.use_token()
    refuse_without_token(address, named)
    try:
        context = ray.init(address=address, job_config=ray_private.Job(), **OPTIONS)
    except Exception as error:                          # Ray raises bare Exceptions too
        ray.shutdown()
        raise ClusterError(f"Ray at {named} cannot be used: {one_line(error)}. It needs Ray {ray.__version__}, as "
                           f"here, and the cluster's token in {token}") from error
    try:
        if context.dashboard_url and answers_anyone(f"http://{context.dashboard_url}"):
            raise ClusterError(open_to_everybody(context.dashboard_url))
        yield
    finally:
        ray.shutdown()


def refuse_without_token(address: str, named: str = "'local'") -> None:
    """Unset, it is Ray that makes a local cluster one with tokens.  Raises ClusterError."""
    mode = os.environ.get("RAY_AUTH_MODE", "token" if address == "local" else "disabled").lower()
    if mode == "disabled" and (address == "local" or not is_loopback(address.rpartition(":")[0])):
        raise ClusterError(f"Ray at {named}: RAY_AUTH_MODE is {mode!r}, so whoever reaches this port could run "
                           "programs here. Set RAY_AUTH_MODE=token, and start the cluster with it")


def guard_token() -> Path:
    """Ray writes its token readable for everyone; here it is kept for its owner only. Where it is looked for."""
    path = at_home(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")
    with suppress(OSError):                             # not there, or not ours
        if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
    return path


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that host, by name or number."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None)}
        return all(ipaddress.ip_address(number).is_loopback for number in found)
    except (OSError, ValueError):
        return False


def answers_anyone(url: str) -> bool:
    """Whether a head's dashboard that is not on loopback lists its jobs, and so takes them, without a token."""
    if is_loopback(urlsplit(url).hostname or ""):
        return False
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/jobs/", timeout=10) as answer:
            return answer.status == 200
    except (OSError, ValueError, HTTPException):        # refused for want of a token, or not to be reached from here
        return False


def open_to_everybody(address: str) -> str:
    return (f"the Ray head at {address} asks for no token, so whoever reaches it runs programs there. Start it with "
            "RAY_AUTH_MODE=token and a token (infra/rayjob.yaml does), or with --dashboard-host 127.0.0.1")


def reachable(address: str, named: str) -> str:
    """The cluster's HOST:PORT, once something answers there: Ray itself would try for minutes.

    named: what the person said, for messages.  Raises ClusterError.
    """
    said = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if said.startswith("ray://"):
        raise ClusterError(f"{named}: a Ray Client address cannot carry a render; use `dailies submit` with the "
                           "cluster's http://HEAD:8265, or run on a machine of the cluster with --ray auto")
    try:
        found = ray_private.full_address(around_here() if said in ("", "auto") else said)
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        unset = "unset RAY_ADDRESS or " if named.startswith("RAY_ADDRESS") else ""
        raise ClusterError(f"no Ray cluster answers at {named}: {error}. Start one with `ray start --head`, "
                           f"{unset}name another with --ray HOST:6379, or use --ray local") from None
    return found


def around_here() -> str:
    """The address of the cluster that this machine belongs to.  Raises ConnectionError with what there is instead.

    Ray's own search goes by what any process of any user says in its command line, and by a file in /tmp/ray, which is
    open for all to write to; where that leads gets the token, and what it answers is unpickled.
    """
    there = own_raylets()
    latest = ray_private.latest_address()               # several: that of the last `ray start`, where it is one of them
    if len(there) > 1 and latest in there:
        return latest
    if len(there) != 1:
        raise ConnectionError(f"{len(there)} clusters have a raylet of this user's or of root's on this machine"
                              + "".join(f", {address}" for address in sorted(there)))
    return there.pop()


def own_raylets() -> set[str]:
    """HOST:PORT of each cluster that a raylet on this machine belongs to; those of other users do not count."""
    found, trusted = set(), {0, os.getuid()}
    for process in ray_private.processes():
        said, uids = process.info["cmdline"], process.info["uids"]
        if said and uids and {uids.real, uids.effective} <= trusted and "raylet" in os.path.basename(said[0]):
            found |= {each.partition("=")[2] for each in said if each.startswith("--gcs-address=")}
    return found - {"", "None"}
