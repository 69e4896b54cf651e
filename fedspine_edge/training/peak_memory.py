"""Measurement of peak memory."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


class PeakMemory:
    """Peak memory since `reset`: of CUDA's allocator on a GPU, otherwise of the resident set of the process.

    Linux can reset the resident peak with `/proc/self/clear_refs`. Where that is not permitted, the peak is that of the
    whole process.
    """

    def __init__(self, torch_device: str) -> None:
        self._cuda = torch_device.startswith("cuda")

    def reset(self) -> None:
        """Start a new measurement."""
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Return the peak in bytes since `reset`."""
        if self._cuda:
            import torch

            return int(torch.cuda.max_memory_allocated())
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
