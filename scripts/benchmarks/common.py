"""What several benchmarks need of this process: one core for itself, its peak memory."""

from __future__ import annotations

import os
from pathlib import Path


def pin_to_one_core() -> None:
    """Stay on the last core that this process may use, where the system can say so."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])


def peak_resident_mib() -> float:
    """Peak resident memory of this process alone, in MiB: `getrusage` begins with the size of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
