"""What this rank's device does: waiting for it, its best matmul rate, its peak memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

from bert_fast.train.collectives import barrier, gather_floats
from bert_fast.train.environment import Environment


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done all its work; a CPU has, always."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(environment: Environment, seconds: float = 0.3) -> float:
    """Best measured matmul rate of this rank in FLOP/s, all ranks measuring at once, in the run's format. A collective."""
    size = 8192 if environment.device.type == "cuda" else 1024
    own = torch.Generator(environment.device).manual_seed(0)  # the run's random numbers are not touched
    a, b = (torch.randn(size, size, generator=own, device=environment.device).to(environment.dtype) for _ in range(2))
    barrier()
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        synchronize(environment.device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def resident_mib() -> float:
    """MiB of this process that are in memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * resource.getpagesize() / 2**20


def peak_memory(environment: Environment, before_mib: float = 0.0) -> dict[str, float]:
    """Largest over ranks: `host_mib` (resident), `device_mib` (allocated), `growth_mib` beyond `before_mib`. A collective."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cuda = environment.device.type == "cuda"
    device = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    table = gather_floats([host, device, host - before_mib], environment.device)
    return dict(zip(("host_mib", "device_mib", "growth_mib"), table.max(axis=0).tolist(), strict=True))
