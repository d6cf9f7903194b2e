"""Two clocks: MLPerf's, never paused, and one for throughput, paused in evaluation and checkpointing. A device's timer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds since `start()`, and seconds of them spent in each named phase outside of training."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self._before = 0.0  # of earlier sessions of a resumed run
        self.paused: dict[str, float] = {}

    def start(self) -> None:
        """The MLPerf clock starts (again): run_start."""
        self._origin = time.perf_counter()

    @contextmanager
    def pause(self, phase: str) -> Iterator[None]:
        """Count what happens inside as `phase`, not as training."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused[phase] = self.paused.get(phase, 0.0) + time.perf_counter() - start

    @property
    def elapsed(self) -> float:
        """Seconds on the MLPerf clock."""
        return self._before + time.perf_counter() - self._origin

    @property
    def training(self) -> float:
        """Seconds on the throughput clock."""
        return self.elapsed - sum(self.paused.values())

    def state_dict(self) -> dict[str, object]:
        return {"elapsed": self.elapsed, "paused": dict(self.paused)}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._before = float(state["elapsed"])  # type: ignore[arg-type]
        self.paused = dict(state["paused"])  # type: ignore[call-overload]
        self._origin = time.perf_counter()


class DeviceTimer:
    """Times stretches of a CUDA stream by events, which the host reads only when it has waited for the device anyway."""

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._pairs.append((start, end))
        start.record()

    def __exit__(self, *_: object) -> None:
        self._pairs[-1][1].record()

    def read(self) -> list[float]:
        """Seconds of every stretch since the last read. The device must be past them."""
        seconds = [start.elapsed_time(end) / 1e3 for start, end in self._pairs]
        self.clear()
        return seconds

    def clear(self) -> None:
        """Forget what was timed so far."""
        self._pairs.clear()
