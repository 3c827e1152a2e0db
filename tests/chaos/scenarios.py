"""The nights: each gives its figures, and under "wrong" a sentence for everything that is not as promised."""

import argparse
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dailies.pipeline.run import ledger
from dailies.pipeline.store import open_store
from tests.chaos.fakes import Script
from tests.chaos.full_disk import NoDisk, fill_up, small_disk, spoilt
from tests.chaos.judge import judge
from tests.chaos.losses import KINDS, lose, met
from tests.chaos.machines import CannotStart, Machines  # noqa: F401  for __main__
from tests.chaos.night import GaveUp, Night, write_manifest
from tests.chaos.weather import Weather
from tests.s3.server import S3Server

MACHINES, CPUS = 3, 2.0                 # of the cluster; its cores only count
KILLS_PER_EXPIRY = 25                   # the credentials expire once for so many kills
SLOW_S = 3.0                            # of sampling, where a second driver must start before the first has ended
LIMIT_S = 6.0                           # of the poison night, where thirty times a row hangs; 120 as it ships
START_S = 600.0                         # within which a driver is well at work, also on a machine with other work

# kind of poison -> where it strikes (in turn), and what its row's error_type must be
POISON = {"raise": (("sample", "decode"), {"RuntimeError"}), "hang": (("sample", "decode"), {"TimedOut"}),
          "segfault": (("sample", "decode"), {"WorkerDied"}), "allocate": (("sample", "decode"), {"WorkerDied"}),
          "nan": (("sample",), {"NonFiniteLatent"}), "black": (("decode",), {"Rejected"})}


@contextmanager
def machines(folder: Path) -> Iterator[Machines]:
    cluster = Machines(folder / "machines", MACHINES, CPUS)
    try:
        yield cluster
    finally:
        cluster.end()


def folder(folder: Path, options: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """Kills, on a folder."""
    with machines(folder) as cluster:
        return killed_night(folder, str(folder / "out"), cluster, options, rng)


def s3(folder: Path, options: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """Kills, on a real S3 server that misbehaves."""
    server = S3Server(folder / "server")
    before = dict(os.environ)
    try:
        server.make_bucket("night")
        os.environ |= server.env        # before the machines start: their processes inherit it
        with machines(folder) as cluster:
            weather = Weather(server, random.Random(rng.random()))
            found = killed_night(folder, "s3://night/run", cluster, options, rng, weather)
        return found | {"faults": weather.struck()}
    finally:
        os.environ.clear()
        os.environ |= before
        server.stop()


def killed_night(folder: Path, out: str, cluster: Machines, options: argparse.Namespace, rng: random.Random,
                 weather: Weather | None = None) -> dict[str, Any]:
    write_manifest(folder, [f"clip {number}" for number in range(options.clips)])
    script = Script(notes=str(folder / "notes.jsonl"), sample_s=options.sample_s, overlap=options.overlap)
    expiries = options.kills // KILLS_PER_EXPIRY if weather else 0
    with Night(folder=folder, out=out, machines=cluster, script=script, rng=rng, kills=options.kills,
               num_clips=options.clips, weather=weather, expiries=expiries) as night:
        night.run("--take-over")
    stored = None
    if weather:
        weather.server.heal()
        stored = weather.server.counts()["stored"]
    found = judge(night, clips=options.clips, rows=options.clips, stored=stored)
    return found | {
        "clips": options.clips, "kills": sum(night.killed.values()), "killed": night.killed, "drivers": night.starts,
        "exits": Counter(night.exits), "night_s": round(night.seconds),
        "share_done_twice": round(night.tally.share_done_twice(options.clips, script.pieces), 4)}


def drivers(folder: Path, options: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """Two drivers on one run folder. The first is killed; in a second round it falls silent, and wakes up again."""
    clips = max(20, options.clips // 40)
    with machines(folder) as cluster:
        rounds = {how: two_drivers(folder / how, cluster, options, rng, clips, how) for how in ("killed", "asleep")}
    wrong = [f"{how}: {said}" for how, found in rounds.items() for said in found["wrong"]]
    return {"clips": clips, **rounds, "wrong": wrong}


def two_drivers(folder: Path, cluster: Machines, options: argparse.Namespace, rng: random.Random, clips: int,
                how: str) -> dict[str, Any]:
    write_manifest(folder, [f"{how} {number}" for number in range(clips)])
    script = Script(notes=str(folder / "notes.jsonl"), sample_s=SLOW_S)
    with Night(folder=folder, out=str(folder / "out"), machines=cluster, script=script, rng=rng) as night:
        first = night.start(ray="local")                # on machines of its own: those of the second are all free
        wait_for(lambda: night.published() >= clips // 10, first, night)
        refused = night.wait(night.start())
        said, still_working = night.said().get("error", ""), first.poll() is None
        if how == "killed":
            first.kill()
            night.run("--take-over")
        else:
            first.send_signal(signal.SIGSTOP)
            third = night.start("--take-over")
            before = night.published()
            wait_for(lambda: night.published() >= before + clips // 4, third, night)
            first.send_signal(signal.SIGCONT)
            ended, taken_over = night.wait(first), night.wait(third)
        night.tally.read()
    found = judge(night, clips=clips, rows=clips, sampled_again=None if how == "asleep" else 0)
    if refused != 5 or "another driver works on this run" not in said:
        found["wrong"].append(f"the second driver must be refused with 5; it ended with {refused}: {said}")
    if not still_working:
        found["wrong"].append("the first driver must not be disturbed by the second; it has ended")
    if how == "asleep" and (ended, taken_over) != (5, 0):
        found["wrong"].append(f"the driver that slept must end with 5, the other with 0; got {ended}, {taken_over}")
    return found | {"refused_with": refused}


def poison(folder: Path, options: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """Rows that raise, hang, kill their process, or give what nobody wants to see, among good ones."""
    prompts = [f"{kind} in {places[number % len(places)]} {number}"
               for kind, (places, _) in POISON.items() for number in range(options.poison)]
    poisonous, good = len(prompts), options.good
    prompts += [f"good {number}" for number in range(good)]
    rng.shuffle(prompts)
    write_manifest(folder, prompts)
    script = Script(notes=str(folder / "notes.jsonl"), sample_s=options.sample_s, overlap=options.overlap,
                    least_limit_s=LIMIT_S)
    with machines(folder) as cluster:
        with Night(folder=folder, out=str(folder / "out"), machines=cluster, script=script, rng=rng) as night:
            night.run(ends_with=(3,))
    found = judge(night, clips=good, rows=len(prompts), failed=poisonous, left_over=["latents"])
    reasons: dict[str, Counter[str]] = {kind: Counter() for kind in POISON}
    for row in ledger.read(open_store(night.out)).to_pylist():
        kind = re.match(r"\w+", row["prompt"])[0]
        if row["status"] == "failed" and kind in POISON:
            reasons[kind][row["error_type"]] += 1
        if (row["status"] == "failed") != (kind in POISON):
            found["wrong"].append(f"{row['prompt']!r} ended as {row['status']}: {row['error_type']}: {row['error']}")
    for kind, (_, types) in POISON.items():
        if set(reasons[kind]) - types:
            found["wrong"].append(f"rows that {kind} must fail with {', '.join(types)}; got {dict(reasons[kind])}")
    return found | {"good": good, "poison": poisonous, "reasons": reasons, "night_s": round(night.seconds)}


def losses(folder: Path, options: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """Of three machines one loses its room for temporary files, one its memory, one its credentials for the store.

    Sampling is what memory is lacking for, so each kind of work is left to one machine at least.
    """
    lost = folder / "lost"
    lost.mkdir()
    clips = options.losses
    write_manifest(folder, [f"clip {number}" for number in range(clips)])
    script = Script(notes=str(folder / "notes.jsonl"), sample_s=options.sample_s, overlap=options.overlap,
                    lost=str(lost))
    with machines(folder) as cluster, ExitStack() as stack:
        is_small = True
        try:
            stack.enter_context(small_disk(cluster.others[0].temporary, 2**20))
        except NoDisk:
            is_small = False
        with Night(folder=folder, out=str(folder / "out"), machines=cluster, script=script, rng=rng) as night:
            began, driver, told = time.monotonic(), night.start(), {}
            for share, (what, machine) in enumerate(zip(KINDS, cluster.others, strict=True), start=1):
                wait_for(lambda share=share: night.published() >= share * clips // 10, driver, night)
                told[what] = round(time.monotonic() - began)
                if what == "disk" and is_small:
                    fill_up(machine.temporary / "ballast")
                elif what == "disk":                    # new processes then take another folder
                    shutil.rmtree(machine.temporary)
                lose(script.lost, machine.name, what)
            code = night.wait(driver)
            seconds = time.monotonic() - began
    missed = met(script.lost)
    found = judge(night, clips=clips, rows=clips)
    attempts = Counter(ledger.read(open_store(night.out), ["attempts"])["attempts"].to_pylist())
    if code:
        found["wrong"].append(f"the night must end with 0; got {code}: {night.said()} {night.errors()}")
    if set(attempts) - {1}:
        found["wrong"].append(f"every row must be charged one attempt; got {dict(attempts)}")
    if missing := set(KINDS) - set(missed):
        found["wrong"].append(f"every loss must have been met at work; nobody met {', '.join(sorted(missing))}")
    return found | {"clips": clips, "night_s": round(seconds), "lost_after_s": told, "met": missed}


def disk(folder: Path, options: argparse.Namespace, rng: random.Random) -> dict[str, Any]:
    """The disk is full when the run comes to write its clips, its ledger, its latents; then there is space again."""
    found: dict[str, Any] = {"wrong": []}
    try:
        with machines(folder) as cluster:
            for kind in ("clips", "ledger", "latents"):
                with small_disk(folder / kind / "disk") as place:
                    found[kind] = full_disk(folder / kind, place, cluster, kind, rng)
                found["wrong"] += [f"{kind}: {said}" for said in found[kind]["wrong"]]
    except NoDisk as error:
        return {"wrong": [], "skipped": str(error)}
    return found


def full_disk(folder: Path, place: Path, cluster: Machines, kind: str, rng: random.Random,
              clips: int = 24) -> dict[str, Any]:
    write_manifest(folder, [f"clip {number}" for number in range(clips)])
    ballast = place / "ballast"
    script = Script(notes=str(folder / "notes.jsonl"), sample_s=0.1, fill=kind, ballast=str(ballast))
    with Night(folder=folder, out=str(place / "out"), machines=cluster, script=script, rng=rng) as night:
        code = night.wait(night.start())
        said, published, broken = night.said().get("error", ""), night.published(), spoilt(night.out)
        ballast.unlink(missing_ok=True)
        night.script = replace(script, fill=None)
        night.run()
    found = judge(night, clips=clips, rows=clips)
    if code != 5 or "No space left on device" not in said or "Free some space" not in said:
        found["wrong"].append(f"a full disk must end the run with 5 and say so; it ended with {code}: {said}\n"
                              f"{night.errors()}")
    found["wrong"] += broken
    return found | {"exit_code": code, "published_before": published}


def wait_for(condition: Callable[[], bool], driver: Any, night: Night) -> None:
    ends = time.monotonic() + START_S
    while not condition():
        if driver.poll() is not None or time.monotonic() > ends:
            raise GaveUp(f"the driver should be at work; it ended with {driver.poll()}\n{json.dumps(night.said())}\n"
                         f"{night.errors()}")
        time.sleep(0.05)
