"""What this rank's device does: waiting for it, its best matmul rate, its peak memory."""

from __future__ import annotations

import resource
import time

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


def peak_memory(environment: Environment) -> dict[str, float]:
    """Largest over ranks: `host_mib` (resident) and `device_mib` (allocated). A collective."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cuda = environment.device.type == "cuda"
    device = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
    table = gather_floats([host, device], environment.device)
    return {"host_mib": float(table[:, 0].max()), "device_mib": float(table[:, 1].max())}
