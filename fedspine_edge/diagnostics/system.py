"""Checks of the machine: Python, Jetson model and power mode, disk, memory, clock."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fedspine_edge.diagnostics.check import Check
from fedspine_edge.diagnostics.probes import TEGRA_RELEASE

MIB = 1024**2
COMMAND_TIMEOUT_S = 5.0
EARLIEST_S = 1735689600.0
"""2025-01-01. A clock before this was never set: a Jetson without a battery starts in 1970 or 2000."""


def python_check() -> Check:
    """Check the interpreter. JetPack 6 has Python 3.10, JetPack 7 has 3.12."""
    detail = f"{platform.python_version()}, {sys.prefix}"
    if sys.prefix == sys.base_prefix:
        return Check("python", "warn", f"{detail}, not a virtual environment", "python3 -m venv .venv")
    return Check("python", "ok", detail)


def l4t_version(release: str) -> tuple[int, int] | None:
    """Parse (major, minor) from /etc/nv_tegra_release, such as `# R36 (release), REVISION: 4.3, ...`."""
    found = re.search(r"R(\d+)\s*\(release\),\s*REVISION:\s*(\d+)", release)
    return (int(found.group(1)), int(found.group(2))) if found else None


def jetson_check(
    release_file: Path = TEGRA_RELEASE, model_file: Path = Path("/proc/device-tree/model"), nvpmodel: str = "nvpmodel"
) -> Check:
    """Check the board, L4T and the power mode. The mode is given by name, because ids differ between boards."""
    release = _read(release_file)
    if not release:
        return Check("jetson", "ok", f"not a Jetson ({platform.machine()})")
    model = _read(model_file).strip("\0 \n") or "unknown board"
    version = l4t_version(release)
    if version is None:
        return Check("jetson", "warn", f"{model}, L4T unreadable", f"cat {release_file}")
    major, minor = version
    detail = f"{model}, L4T {major}.{minor}, power mode {power_mode(nvpmodel) or 'unknown'}"
    if major < 36:
        remedy = "flash JetPack 6 or 7 with NVIDIA SDK Manager (TX2 and Xavier have none: Orin or newer is needed)"
        return Check("jetson", "failed", f"{detail}; its Python is older than 3.10", remedy)
    return Check("jetson", "ok", detail)


def power_mode(nvpmodel: str = "nvpmodel") -> str:
    """Return the name of the current power mode, such as MAXN, or an empty string if it cannot be read."""
    found = re.search(r"NV Power Mode:\s*(\S+)", _output([nvpmodel, "-q"]))
    return found.group(1) if found else ""


def disk_check(folder: Path) -> Check:
    """Check the free disk space for a model, its checkpoints and an engine."""
    try:
        free = shutil.disk_usage(folder).free // MIB
    except OSError as error:
        return Check("disk", "failed", f"{folder}: {error.strerror}", f"mkdir -p {folder}")
    detail, remedy = f"{free:,} MiB free in {folder}", f"du -xsh {folder}/* | sort -h  # then remove what is not needed"
    if free < 512:
        return Check("disk", "failed", f"{detail}; at least 512 are needed", remedy)
    return Check("disk", "warn" if free < 4096 else "ok", detail, remedy if free < 4096 else "")


def memory_check(meminfo: Path = Path("/proc/meminfo"), limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> Check:
    """Check the available memory, which the GPU of a Jetson shares."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read(meminfo))
    if not found:
        return Check("memory", "warn", f"{meminfo} has no MemAvailable", "free -m")
    available = int(found.group(1)) // 1024
    limit = _read(limit_file).strip()
    if limit.isdecimal():
        used = _read(limit_file.with_name("memory.current")).strip()
        available = min(available, max(0, int(limit) - (int(used) if used.isdecimal() else 0)) // MIB)
    detail, remedy = f"{available:,} MiB available", "ps aux --sort=-rss | head  # then stop what is not needed"
    if available < 512:
        return Check("memory", "failed", f"{detail}; training a small model needs about 1,000", remedy)
    return Check("memory", "warn" if available < 1536 else "ok", detail, remedy if available < 1536 else "")


def clock_check(now_s: float | None = None, timedatectl: str = "timedatectl") -> Check:
    """Check the clock. A wrong clock makes TLS certificates invalid."""
    now = time.time() if now_s is None else now_s
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    remedy = "sudo timedatectl set-ntp true"
    # The clock cannot be earlier than the installed files, with a day's tolerance for time zones in archives.
    installed = Path(__file__).stat().st_mtime - 86400
    if now < max(EARLIEST_S, installed):
        return Check("clock", "failed", f"{shown} is in the past", remedy)
    synchronised = _output([timedatectl, "show", "-p", "NTPSynchronized", "--value"]).strip()
    if synchronised == "no":
        return Check("clock", "warn", f"{shown}, not synchronised", remedy)
    return Check("clock", "ok", shown + (", synchronised" if synchronised == "yes" else ""))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(command: list[str]) -> str:
    """Return the standard output of a command, or an empty string if it is missing, fails or times out."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
