"""Thread limits from affinity, physical cores and cgroup quotas."""

from __future__ import annotations

import os

import pytest

from fedspine_edge.runtime.cpu import thread_limit


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that imitates a machine: CPUs, allowed CPUs, hardware threads per core, cgroup files."""

    def make(cpus, allowed=None, *, threads_per_core=1, files=()):
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)) if allowed is None else set(allowed))
        for cpu in range(cpus):
            topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
            topology.mkdir(parents=True)
            core = cpu // threads_per_core * threads_per_core
            (topology / "thread_siblings_list").write_text(f"{core}-{core + threads_per_core - 1}\n")
        for name, content in dict(files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return tmp_path

    return make


def test_thread_limit_is_none_on_unrestricted_machine(machine):
    files = {"proc/self/cgroup": "0::/user.slice\n", "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n"}
    assert thread_limit(machine(8, files=files)) is None


def test_thread_limit_follows_affinity_and_physical_cores(machine):
    assert thread_limit(machine(8, [0, 1, 2, 3], threads_per_core=2)) == 2


@pytest.mark.parametrize(
    ("quota", "limit"), [("50000 100000", 1), ("150000 100000", 1), ("200000 100000", 2), ("900000 100000", None)]
)
def test_thread_limit_follows_quota(machine, quota, limit):
    """The cgroup file system of a container begins at the container's group."""
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota}\n"}
    assert thread_limit(machine(8, files=files)) == limit


def test_thread_limit_follows_smallest_quota_of_parents(machine):
    files = {
        "proc/self/cgroup": "0::/system.slice/app.service\n",
        "sys/fs/cgroup/system.slice/app.service/cpu.max": "max 100000\n",
        "sys/fs/cgroup/system.slice/cpu.max": "300000 100000\n",
    }
    assert thread_limit(machine(8, files=files)) == 3


def test_thread_limit_follows_quota_of_cgroup_v1(machine):
    files = {
        "proc/self/cgroup": "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert thread_limit(machine(8, files=files)) == 2


@pytest.mark.parametrize("content", ["", "max", "x y\n", "100 0\n", "\xff"])
def test_thread_limit_ignores_unreadable_files(machine, content):
    files = {"proc/self/cgroup": content, "sys/fs/cgroup/cpu.max": content}
    assert thread_limit(machine(4, files=files)) is None
