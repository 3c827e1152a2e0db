"""A transformer's forward as one CUDA graph per shape of clip: a step is then one launch, and no work for Python.

What it saves is the time in which the GPU waits for launches, so it shows in small models and short clips.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

KEPT = 4                                                # shapes whose recordings stay
_Run = Callable[[], Tensor]
Record = Callable[[_Run], tuple[Callable[[], None], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """held: the inputs, which every replay reads from where they were first; result: where it writes."""

    held: list[Tensor]
    replay: Callable[[], None]
    result: Tensor


class Graphed:
    """`forward`, run as it is the first time that inputs of a shape come, then recorded, and replayed from then on.

    What it is given are tensors, None, and tuples and dataclasses of them. It must be a function of those and of
    weights that stay where they are, and must not wait for the device. What cannot be recorded runs as it is, which
    changes no result.
    """

    def __init__(self, forward: Callable[..., Tensor], record: Record | None = None):
        """record: by default CudaGraphs; Graphed that never run at once may share one."""
        self.forward, self.record = forward, record or CudaGraphs()
        self.recordings: dict[tuple, Recording] = {}
        self.met: set[tuple] = set()                    # shapes whose kernels are chosen: a recording needs that
        self.refused: set[tuple] = set()
        self.aside = self.paused = False

    def __call__(self, *inputs: Any) -> Tensor:
        given = tensors_of(inputs)
        shape = tuple((tensor.shape, tensor.dtype) for tensor in given)
        recording = self.recording(shape, inputs)
        if recording is None:
            result = self.as_it_is(inputs)
            self.met.add(shape)
            return result
        for held, tensor in zip(recording.held, given, strict=True):
            held.copy_(tensor)
        recording.replay()
        return recording.result.clone()

    def recording(self, shape: tuple, inputs: tuple) -> Recording | None:
        """That of a shape, made now if it is due; None if there is none."""
        if self.aside or shape in self.recordings:
            return self.recordings.get(shape)
        if self.paused or shape in self.refused or shape not in self.met:
            return None
        while len(self.recordings) >= KEPT:
            self.recordings.pop(next(iter(self.recordings)))
        try:
            self.recordings[shape] = self.recorded(inputs)
        except RuntimeError as error:                   # out of memory too
            self.refused.add(shape)
            _log.warning("this shape of clip runs without a CUDA graph, which may be slower: %s", error)
        return self.recordings.get(shape)

    def recorded(self, inputs: tuple) -> Recording:
        inputs = with_each(inputs, Tensor.clone)
        replay, result = self.record(lambda: self.forward(*inputs))
        return Recording(held=tensors_of(inputs), replay=replay, result=result)

    def as_it_is(self, inputs: tuple) -> Tensor:
        """The forward; where it does not fit beside what the recordings hold, without them."""
        try:
            return self.forward(*inputs)
        except torch.OutOfMemoryError:
            if not self.recordings:
                raise
        # not in the except block, where the error still holds the tensors of the first try
        self.refused.update(self.recordings)
        self.recordings.clear()
        return self.forward(*inputs)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing new is recorded in the block: for a shape that may never come again."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Nothing is recorded or replayed in the block, and what the recordings held is free."""
        self.recordings.clear()
        self.aside = True
        try:
            yield
        finally:
            self.aside = False


class CudaGraphs:
    """Records on CUDA. All recordings work in the same memory, that of the largest, so two must never run at once."""

    def __init__(self) -> None:
        self.pool: tuple[int, int] | None = None
        self.alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, run: _Run) -> tuple[Callable[[], None], Tensor]:
        """Raises RuntimeError for what cannot be recorded, or finds no room.  run has run before, so that no kernel is
        chosen, compiled or loaded while it is recorded."""
        check_room()
        if self.pool is None or not self.alive:         # memory that nobody shares any more may not be shared again
            self.pool = torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # other threads may copy meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            self.pool = None
            torch.cuda.set_stream(stream)               # where a recording breaks off, torch stays on its stream
            raise
        self.alive.add(graph)
        return graph.replay, result


def check_room() -> None:
    """Raises RuntimeError unless a recording would leave as much room as it takes: for a shape that is not recorded,
    and for who else is on the device. What it takes is at most what this process ever had beyond what it has now."""
    free, _ = torch.cuda.mem_get_info()
    used = torch.cuda.memory_allocated()
    takes, room = torch.cuda.max_memory_allocated() - used, free + torch.cuda.memory_reserved() - used
    if room < 2 * takes:
        raise RuntimeError(f"a recording takes up to {takes / 1e9:.1f} GB and should leave as much free; "
                           f"there are {room / 1e9:.1f} GB")


def tensors_of(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    with_each(value, found.append)
    return found


def with_each(value: Any, make: Callable[[Tensor], Any]) -> Any:
    """The same, with make(tensor) in the place of each tensor."""
    if isinstance(value, Tensor):
        return make(value)
    if isinstance(value, tuple):
        return tuple(with_each(part, make) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: with_each(getattr(value, field.name), make) for field in fields(value)})
    if value is not None:
        raise TypeError("a forward is recorded with tensors, None, and tuples and dataclasses of them; "
                        f"got {type(value).__name__}")
