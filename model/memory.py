"""How much memory there is, and how much of it what computes may fill."""

import os
from pathlib import Path

import torch

SHARE = 0.25                                            # the rest is the sampler's, the weights', other processes'


def memory_on(device: str) -> int:
    """Bytes; of what there is, not of what is free: how a clip is cut to fit may show in the last bits of its pixels,
    and they must be the same tomorrow.
    """
    if device.startswith("cuda"):
        return int(SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(SHARE * machine_memory())


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of this machine, or what a container on it may have."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):         # control groups, version 2 and 1
        try:
            limits.append(int((root / "sys/fs/cgroup" / name).read_text()))
        except (FileNotFoundError, ValueError):         # not of this version, or "max": no limit
            continue
    return min(limits)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that programs could still take here, by the kernel's count; all of it where the kernel does not say."""
    memory = machine_memory(root)
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except FileNotFoundError:                           # not Linux
        return memory
    return min([memory, *(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))])
