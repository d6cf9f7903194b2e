"""Timing on the device of a stage: seconds of an action, by events on CUDA and by the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch


def wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def repeat(action: Callable[[], object], device: str, repeats: int, warm_up: int = 2) -> list[float]:
    """Seconds of each of `repeats` calls, one after the other, after `warm_up` calls that do not count."""
    for _ in range(warm_up):
        action()
    wait(device)
    if device == "cpu":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return times
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def median_seconds(action: Callable[[], object], device: str, repeats: int = 10, warm_up: int = 2) -> float:
    return statistics.median(repeat(action, device, repeats, warm_up))


def reset_peak(device: str) -> None:
    """Device memory: the peak starts anew. Nothing on a CPU."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_mib(device: str) -> float | None:
    """MiB at the peak since `reset_peak`; None on a CPU, where nobody counts tensors."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
