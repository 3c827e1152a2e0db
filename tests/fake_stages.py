"""Stages that misbehave on purpose, for the tests of the pipeline. Importable in the processes that Ray starts."""

import ctypes
import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from dailies.actors.actor import Actor
from dailies.actors.messages import Request
from dailies.jobs.bench.pretend import pretend_value
from dailies.pipeline.run.saved_steps import Halted
from dailies.pipeline.stages import Stage, Step
from dailies.pipeline.store import NotFound, StoreError

MAKES = {"encode": "embedding", "sample": "latent", "publish": "clip"}


@dataclass(kw_only=True)
class Fake(Actor):
    """Makes the next value and writes each call into `folder`/calls.jsonl.

    faults: seed -> "raise", "die", "segfault", "hang", "store" or "not-found"; "die once" and the like do it in one
    process only.
    """

    stage: str
    folder: Path
    sleep_s: float = 0.0
    faults: dict[int, str] = field(default_factory=dict)
    load: str | None = None             # "raise" or "die" while being made
    embedding_bytes: int = 0            # above 100 kB a value lies in the object store of the node that made it
    safe: bool = False                  # set by the worker

    def __post_init__(self) -> None:
        if self.load == "raise":
            raise ValueError("weights are broken: blocks.0.attn.q.weight is missing")
        if self.load == "die":
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, batch: list) -> list:
        requests = [value if isinstance(value, Request) else value.request for value in batch]
        self.write(began=time.time(), seeds=[request.seed for request in requests], threads=threads(),
                   safe=self.safe)
        for request in requests:
            self.misbehave(request.seed)
        time.sleep(self.sleep_s * len(batch))
        self.write(ended=time.time(), seeds=[request.seed for request in requests])
        values = [pretend_value(MAKES[self.stage], request) for request in requests]
        if self.stage == "encode" and self.embedding_bytes:
            import torch
            rows = torch.zeros(self.embedding_bytes, dtype=torch.uint8)
            return [replace(value, prompt={"video": rows}) for value in values]
        return values

    def misbehave(self, seed: int) -> None:
        fault = self.faults.get(seed, "")
        if fault.endswith(" once"):
            try:
                (self.folder / f"{self.stage}-{seed}").touch(exist_ok=False)
            except FileExistsError:
                return
        match fault.removesuffix(" once"):
            case "raise":
                raise RuntimeError(f"seed {seed} is poison")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "hang":
                time.sleep(3600)
            case "store":
                raise StoreError("s3://night: access denied")
            case "not-found":
                raise NotFound(f"no embedding for seed {seed}")

    def write(self, **entry: Any) -> None:
        with open(self.folder / "calls.jsonl", "a") as file:
            file.write(json.dumps({"stage": self.stage, "pid": os.getpid(), **entry}) + "\n")


@dataclass(kw_only=True)
class Patient(Actor):
    """A sampler whose first clip takes until somebody wants it to stop: then it takes its time to save."""

    folder: Path
    halted: Callable[[], bool] = lambda: False

    def __call__(self, batch: list) -> list:
        if not (self.folder / "saved").exists():
            write_whole(self.folder / "begun", str(os.getpid()))
            while not self.halted():
                time.sleep(0.05)
            time.sleep(1.0)
            write_whole(self.folder / "saved", str(os.getpid()))
            raise Halted("saved")
        return [pretend_value("latent", value.request) for value in batch]


class CannotBeMade:
    """In place of the process that would load a stage's steps."""

    def __init__(self, threads: int):
        raise ModuleNotFoundError("No module named 'dailies.model.catalog'; 'model' is not a package")

    def hello(self) -> None: ...
    def load(self, stage: Stage, name: str) -> None: ...


def write_whole(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def threads() -> int:
    """What this process computes with."""
    import torch
    assert os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())) == str(torch.get_num_threads())
    return torch.get_num_threads()


def fake_stages(folder: Path, *, faults: dict[str, dict[int, str]] | None = None,
                sleeps_s: dict[str, float] | None = None, gpus: dict[str, float] | None = None,
                load: dict[str, str] | None = None, replicas: dict[str, int] | None = None, cpus: float = 0.1,
                window: int = 100, embedding_bytes: int = 0, names: Iterable[str] = MAKES) -> list[Stage]:
    """Dictionaries by stage; cpus of every stage."""
    faults, sleeps_s, gpus, load, replicas = faults or {}, sleeps_s or {}, gpus or {}, load or {}, replicas or {}
    first = dict(key=attrgetter("embedding_key"), window=window)
    stages = []
    for name in names:
        args = dict(stage=name, folder=folder, faults=faults.get(name, {}), sleep_s=sleeps_s.get(name, 0.0),
                    load=load.get(name), embedding_bytes=embedding_bytes)
        stages.append(Stage(name=name, steps=(Step(actor=Fake, args=args),), gpus=gpus.get(name, 0.0), cpus=cpus,
                            replicas=replicas.get(name), **(first if name == "encode" else {})))
    return stages


def calls(folder: Path, stage: str | None = None, mark: str = "began") -> list[dict]:
    """What the fakes wrote, in order; mark: "began" or "ended"."""
    entries = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    return [entry for entry in entries if mark in entry and stage in (None, entry["stage"])]
