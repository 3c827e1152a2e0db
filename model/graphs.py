"""A transformer's forward as one CUDA graph per shape of clip: a step is then one launch, and no work for Python.

What it saves is the time in which the GPU waits for launches, so it shows in small models and short clips.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

KEPT, WARM_UP = 2, 2                                    # shapes whose recordings stay; runs before one is made
Run = Callable[[], Tensor]
Record = Callable[[Run], tuple[Callable[[], None], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """held: the inputs, which every replay reads from where they were first; result: where it writes."""

    held: list[Tensor]
    replay: Callable[[], None]
    result: Tensor


class Graphed:
    """`forward`, recorded once for each shape of its inputs and replayed from then on.

    What it is given are tensors, None, and tuples and dataclasses of them. It must be a function of those and of
    weights that stay where they are, and must not wait for the device.
    """

    def __init__(self, forward: Callable[..., Tensor], record: Record | None = None):
        self.forward, self.record = forward, record or cuda_graph
        self.recordings: dict[tuple, Recording] = {}
        self.aside = False

    def __call__(self, *inputs: Any) -> Tensor:
        if self.aside:
            return self.forward(*inputs)
        given = tensors_of(inputs)
        shape = tuple((tensor.shape, tensor.dtype) for tensor in given)
        if shape not in self.recordings:
            while len(self.recordings) >= KEPT:
                self.recordings.pop(next(iter(self.recordings)))
            self.recordings[shape] = self.recorded(inputs)
        recording = self.recordings[shape]
        for held, tensor in zip(recording.held, given, strict=True):
            held.copy_(tensor)
        recording.replay()
        return recording.result.clone()

    def recorded(self, inputs: tuple) -> Recording:
        inputs = with_each(inputs, Tensor.clone)
        replay, result = self.record(lambda: self.forward(*inputs))
        return Recording(held=tensors_of(inputs), replay=replay, result=result)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Nothing is recorded or replayed in the block, and what the recordings held is free."""
        self.recordings.clear()
        self.aside = True
        try:
            yield
        finally:
            self.aside = False


def cuda_graph(run: Run) -> tuple[Callable[[], None], Tensor]:
    """Recorded on a stream of its own, once kernels are chosen.  Raises RuntimeError for what cannot be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):            # other threads may copy meanwhile
        result = run()
    return graph.replay, result


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
    if is_dataclass(value):
        return type(value)(**{field.name: with_each(getattr(value, field.name), make) for field in fields(value)})
    if value is not None:
        raise TypeError("a forward is recorded with tensors, None, and tuples and dataclasses of them; "
                        f"got {type(value).__name__}")
