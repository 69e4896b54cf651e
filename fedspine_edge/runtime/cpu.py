"""CPUs that this process may use, from its affinity mask and the CPU quota of its cgroup."""

from __future__ import annotations

import os
from pathlib import Path


def thread_limit(root: str | Path = "/") -> int | None:
    """Return the number of threads to use where this process may not use all CPUs of the machine, else None.

    ONNX Runtime starts one thread per physical core and pins it. In a container this exceeds the quota, or pins threads
    to CPUs outside of the affinity mask.

    Args:
        root: Root of the file system in which the files of the kernel are read.
    """
    root = Path(root)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = _physical_cores(allowed, root)
    quota = _cgroup_quota(root)
    restricted = len(allowed) < (os.cpu_count() or 1)
    if quota is not None and quota < len(allowed):
        return max(1, min(int(quota), cores))
    return cores if restricted else None


def _physical_cores(cpus: set[int], root: Path) -> int:
    """Return the number of physical cores among `cpus`, which may be hardware threads of the same core."""
    cores = set()
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            cores.add(f"cpu{cpu}")
    return max(1, len(cores))


def _cgroup_quota(root: Path) -> float | None:
    """Return the smallest CPU quota of the process's cgroup and its parents, in CPUs; None if there is none."""
    quotas = []
    for controllers, path in _cgroups(root):
        base = root / "sys/fs/cgroup" / ("" if not controllers else "cpu")
        # Inside a container the cgroup file system often begins at the container's own group.
        for folder in (base / path.lstrip("/"), base):
            while folder == base or base in folder.parents:
                quotas.append(_cpu_max(folder) if not controllers else _cfs_quota(folder))
                folder = folder.parent
    return min((quota for quota in quotas if quota is not None), default=None)


def _cgroups(root: Path) -> list[tuple[str, str]]:
    """Return (controllers, path) of the process's cgroups that limit CPUs; controllers are empty for version 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return [("", "/")]
    entries = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    return [(names, path) for _, names, path in entries if not names or "cpu" in names.split(",")]


def _cpu_max(folder: Path) -> float | None:
    """Read cpu.max of cgroup version 2: quota and period in microseconds."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _cfs_quota(folder: Path) -> float | None:
    """Read the CFS quota of cgroup version 1; -1 means unlimited."""
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
