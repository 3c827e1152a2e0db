"""How many cores a process may use here: not those of the machine, but what an affinity and a quota leave of them.

`taskset` and Slurm narrow the affinity; `docker run --cpus`, Kubernetes and systemd set a quota of a control group,
which is enforced for the group and for all that it lies in.
"""

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """At least 1; a quota of 2.5 cores is 2, since a third thread would only stop the others.  root: of /proc."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:                              # not Linux
        allowed = os.cpu_count() or 1
    return max(1, min([allowed, *map(int, quotas(root))]))


def quotas(root: Path) -> Iterator[float]:
    """Cores, of each control group that this process is in and that has a quota, version 1 or 2."""
    groups: dict[str, str] = {}                         # controllers ("" in version 2) -> the group's path
    for line in lines_of(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        groups |= {controller: path for controller in controllers.split(",")}
    for line in lines_of(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mounted, place = before.split()[3:5]
        kind, _, options = after.split()[:3]
        if kind == "cgroup2" and "" in groups:
            path, read = groups[""], quota_of_v2
        elif kind == "cgroup" and "cpu" in options.split(",") and "cpu" in groups:
            path, read = groups["cpu"], quota_of_v1
        else:
            continue
        # in a container the path may be the host's, of which only the group itself is to be seen here
        inside = path.removeprefix(mounted).strip("/") if path.startswith(mounted) else ""
        top = root / place.lstrip("/")
        folder = top / inside if ".." not in inside.split("/") else top
        for each in [folder, *folder.parents]:
            try:
                if (quota := read(each)) is not None:
                    yield quota
            except (OSError, ValueError, ZeroDivisionError):    # the root has no such file
                pass
            if each == top:
                break


def quota_of_v2(folder: Path) -> float | None:
    quota, period = (folder / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def quota_of_v1(folder: Path) -> float | None:
    quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    return quota / period if quota > 0 else None


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:                                     # no /proc
        return []
