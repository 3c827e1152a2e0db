"""Cores that a process may use: affinity, and quotas of control groups as containers and batch systems set them."""

import os
from pathlib import Path

import pytest

from dailies.actors.cores import quotas, usable_cores

V2 = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = ("33 32 0:30 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
      "34 32 0:31 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n")


def machine(root: Path, cgroup: str, mountinfo: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo,
                       **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("cgroup, mountinfo, files, cores", [
    ("0::/\n", V2, {"cpu.max": "200000 100000\n"}, [2]),                                    # docker --cpus=2
    ("0::/\n", V2, {"cpu.max": "max 100000\n"}, []),
    ("0::/\n", V2, {}, []),                                                                 # the machine's own root
    ("0::/system.slice/slurmstepd.scope/job_7\n", V2,                                       # the job's, and the slice's
     {"system.slice/slurmstepd.scope/job_7/cpu.max": "800000 100000", "system.slice/cpu.max": "350000 100000"},
     [8, 3.5]),
    ("0::/docker/4f1e\n", V2.replace(" / /sys", " /docker/4f1e /sys"), {"cpu.max": "50000 100000"}, [0.5]),
    ("0::/../../pod7/4f1e\n", V2, {"cpu.max": "150000 100000"}, [1.5]),                     # another's namespace
    ("5:memory:/docker/4f\n4:cpu,cpuacct:/docker/4f\n", V1.format(root="/docker/4f"),       # version 1, in a container
     {"cpu,cpuacct/cpu.cfs_quota_us": "150000", "cpu,cpuacct/cpu.cfs_period_us": "50000"}, [3]),
    ("4:cpu,cpuacct:/slurm/job_7\n", V1.format(root="/"),
     {"cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "400000", "cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000",
      "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, [4]),
    ("4:cpu,cpuacct:/\n", V1.format(root="/"), {"cpu,cpuacct/cpu.cfs_quota_us": "what"}, []),
    ("4:cpu:/\n0::/\n", V1.format(root="/") + V2.replace("cgroup rw,nosuid", "cgroup/unified rw"), {}, []),
])
def test_quotas_are_found_where_containers_and_batch_systems_set_them(tmp_path, cgroup, mountinfo, files, cores):
    assert list(quotas(machine(tmp_path, cgroup, mountinfo, files))) == cores


@pytest.mark.parametrize("affinity, quota, cores", [
    ({3}, "max 100000", 1), (set(range(64)), "max 100000", 64), ({0, 9, 17, 33}, "800000 100000", 4),
    (set(range(64)), "250000 100000", 2), (set(range(64)), "30000 100000", 1)])
def test_cores_are_those_of_the_affinity_that_the_quota_pays_for(tmp_path, monkeypatch, affinity, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    assert usable_cores(machine(tmp_path, "0::/\n", V2, {"cpu.max": quota})) == cores


def test_without_control_groups_or_proc_the_affinity_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert usable_cores(tmp_path) == 3
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1
