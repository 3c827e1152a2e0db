"""Processes that train one model together: each takes its share of a batch, and they learn from the mean of their
gradients.

`torchrun --nproc-per-node 2 -m dailies.jobs.demo.train`, a process for each CPU core: the DiT's small matrices leave a
second thread idle for half of a step, a second process is busy. Without torchrun there is one process, and nothing here
does anything.
"""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Sample = TypeVar("Sample")
LONGEST_WAIT = datetime.timedelta(days=2)               # while one process trains what cannot be shared


@contextmanager
def training_together(device: str = "cpu") -> Iterator[None]:
    """Inside, the processes that torchrun started know of each other. Raises ValueError for several on a GPU."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        yield
        return
    if device != "cpu":
        raise ValueError(f"{processes} processes can share the cores of a CPU, and all would have the same GPU on "
                         f"{device}. Start one, without torchrun; or give --device cpu")
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_number() -> int:
    """Of this process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def share_of(batch: list[Sample]) -> list[Sample]:
    """What of a batch is this process's. Raises ValueError where shares would not be equal: the mean of the processes'
    gradients would not be the batch's.
    """
    if len(batch) % num_processes():
        raise ValueError(f"a batch of {len(batch)} cannot be shared by {num_processes()} processes. Start as many as "
                         "divide it, 2 or 4, say")
    return batch[process_number()::num_processes()]


def noise_for(seed: int) -> torch.Generator:
    """Of the CPU; another one in each process, or their shares would have the same noise."""
    return torch.Generator().manual_seed(seed + process_number())


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """The same in all processes afterwards."""
    if num_processes() == 1:
        return
    grads: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, mean in zip(grads, flat.div_(num_processes()).split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view(grad.shape))


@contextmanager
def alone() -> Iterator[bool]:
    """True in the first process, with a thread for each of the others, which wait until it is done."""
    threads = torch.get_num_threads()
    if process_number() == 0:
        torch.set_num_threads(max(threads, num_processes()))
    else:
        wait_for_all()
    try:
        yield process_number() == 0
    finally:
        torch.set_num_threads(threads)
        if process_number() == 0:
            wait_for_all()
