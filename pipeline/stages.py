"""What a pipeline means: stages in a row, each a few steps that run one after the other in one process.

`run_local` is the definition. `cluster.run` yields the same outcomes in any order, on many machines.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from actors.messages import Clip, Failure, Request


@dataclass(frozen=True, kw_only=True)
class Step:
    """How to make one actor: `actor(**args)` gives a callable from a list of values to a list of values of the same length."""

    actor: Callable[..., Callable[[list], list]]
    args: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Callable[[list], list]:
        return self.actor(**self.args)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One kind of worker: what it runs, and what one copy of it needs."""

    name: str                                           # "encode", "sample", "publish": names the seconds in the ledger
    steps: tuple[Step, ...]                             # in one process, so what passes between them never travels
    gpus: float = 0.0                                   # of one copy
    cpus: float = 1.0
    copies: int | None = None                           # None: as many as fit (placement.py)
    batch: int = 1                                      # values per call, all of one bucket
    key: Callable[[Request], str] | None = None         # work shared by requests of one key is done once (the encoder's)
    window: int | None = None                           # keys done ahead of the next stage; when they are, the resources go back
