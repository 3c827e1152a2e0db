"""A night that is killed: the report made right after says what the ledger says, whatever was half-written."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_report import column, head_of, report

from dailies.pipeline.run import ledger
from dailies.pipeline.run.layout import clip_id_in
from dailies.pipeline.store import Store, open_store

# Imports once; then for each line of its input a child that goes on with the night, until it is killed. Sampling is
# pretended, frames are noise; clips, posters, ledger and the reports meanwhile are real.
NIGHT = """
import os, sys, time
import torch
import dailies
from dailies.actors.clip_writer import ClipWriter
from dailies.actors.messages import Frames
from dailies.jobs.bench.pretend import Pretend
from dailies.jobs.report import Reports
from dailies.pipeline.run.layout import clip_key, poster_key
from dailies.pipeline.run.ledger import Ledger

class Drawn:
    def __call__(self, latents):
        return [self.frames(latent.request) for latent in latents]

    def frames(self, request):
        if request.seed % 7 == 0:
            raise ValueError(f"seed {request.seed} cannot be drawn")
        shape = request.shape
        torch.manual_seed(request.seed)
        return Frames(request=request, rgb=torch.randint(0, 256, (shape.frames, shape.height, shape.width, 3)).byte())

def night(out):
    torch.set_num_threads(1)
    Ledger.open.__func__.__kwdefaults__["flush_rows"] = 3
    card, store = dailies.CATALOG["demo"], dailies.open_store(out)
    run = dailies.prepare(dailies.Manifest.read(prompts=[f"a red circle, {n}" for n in range(120)]), store, card,
                          weights=dailies.locate_weights(None, card), defaults=dailies.Defaults(steps=1, frames=9))
    writer = dailies.Step(actor=ClipWriter, args=dict(store=store, key_of=clip_key, poster_key_of=poster_key))
    stages = [dailies.Stage(name="sample", steps=(dailies.Step(actor=Pretend, args=dict(makes="latent")),)),
              dailies.Stage(name="publish", steps=(dailies.Step(actor=Drawn), writer))]
    with Reports(store, 0.2, print):
        for _ in run.render(stages):
            pass

for line in sys.stdin:
    child = os.fork()
    if not child:
        night(line.strip())
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("over", flush=True)
"""


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_report_after_a_kill_says_what_the_ledger_says(tmp_path, capsys, moments):
    how = random.Random(moments)
    root = str(Path(__file__).resolve().parent.parent)
    process = subprocess.Popen([sys.executable, "-c", NIGHT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})
    states = []
    try:
        for moment in range(moments):
            out = tmp_path / f"out-{moment // 4}"       # four kills in a night
            before = len(list(out.glob("clips/*/*.mp4")))
            process.stdin.write(f"{out}\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            until = time.monotonic() + 60
            while len(list(out.glob("clips/*/*.mp4"))) == before and time.monotonic() < until:
                time.sleep(0.02)
            time.sleep(how.uniform(0.0, 0.5))
            if moment == moments - 1:
                hold_ahead_of_ledger(child, out)
            os.kill(child, signal.SIGKILL)
            while process.stdout.readline() != "over\n":
                pass
            states.append(checked(out, capsys))
            let_go(out)
    finally:
        process.stdin.close()
        process.wait(30)
    assert states[-1]["done"] > 0 and states[-1]["unrecorded"] > 0


def hold_ahead_of_ledger(child: int, out: Path) -> None:
    """Stop the night at a moment at which it has published what it has not recorded."""
    for _ in range(600):
        os.kill(child, signal.SIGSTOP)
        store = open_store(out)
        if published(store) - {*ledger.read(store, ["clip_id"])["clip_id"].to_pylist()}:
            return
        os.kill(child, signal.SIGCONT)
        time.sleep(0.05)
    raise AssertionError("all that the night published was recorded, whenever it was stopped")


def published(store: Store) -> set[str]:
    return {clip_id_in(info.key) for info in store.list("clips/")}


def let_go(out: Path) -> None:
    """The next driver need not wait until the killed one is given up."""
    (out / "lease.json").unlink(missing_ok=True)
    shutil.rmtree(out / ".tmp", ignore_errors=True)


def checked(out: Path, capsys) -> dict:
    said = report(capsys, out)
    store = open_store(out)
    rows = ledger.read(store, ["id", "status", "clip_id"])
    statuses = rows["status"].to_pylist()
    figures = head_of(out / "report")["figures"]
    assert (figures["done"], figures["failed"]) == (statuses.count("done"), statuses.count("failed"))
    assert figures["done"] + figures["failed"] + figures["pending"] == 120
    assert column(out / "report", "id") == rows["id"].to_pylist()
    assert said["unrecorded"] == len(published(store) - {*rows["clip_id"].to_pylist()})
    assert said["without_poster"] == 0
    return said
