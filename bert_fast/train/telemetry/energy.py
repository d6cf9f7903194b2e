"""Energy of a run: what all nodes' devices took from run_start to run_stop, over all its sessions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bert_fast.train.collectives import gather_floats
from bert_fast.train.environment import Environment
from bert_fast.train.progress import Progress
from bert_fast.train.telemetry.energy_meter import EnergyMeter

Joules = list[float | None]  # of GPUs, of CPUs and memory; None: some node could not read its own


class EnergyTally:
    """This rank's share: the first rank of a node counts for the node."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._meter = EnergyMeter() if environment.local_rank == 0 else None
        self._counted = np.zeros(2)  # joules that earlier calls of `delta` have given
        self.source = ""

    def start(self) -> None:
        """Count from here."""
        if self._meter is not None:
            self._meter.start()

    def tick(self) -> None:
        """Read the counters. They wrap around: call it at every log line."""
        if self._meter is not None:
            self._meter.tick()

    def delta(self, *, last: bool = False) -> list[float]:
        """Joules since the last call, of GPUs and of CPUs, for a sum over ranks; NaN for what cannot be read."""
        if self._meter is None:
            return [0.0, 0.0]
        reading = self._meter.stop() if last else self._meter.tick()
        self.source = reading.source
        counted = np.array([np.nan if j is None else j for j in (reading.joules_gpu, reading.joules_cpu)])
        delta, self._counted = counted - self._counted, counted
        return [float(each) for each in delta]

    def add_to(self, progress: Progress, *, last: bool = False) -> None:
        """Add what all nodes took since the last call to the run's joules. A collective."""
        progress.joules = summed(progress.joules, gather_floats(self.delta(last=last), self._environment.device))


def summed(joules: Sequence[float | None], deltas: np.ndarray) -> Joules:
    """`joules` so far and all ranks' `deltas` [ranks, 2]. What was once not known stays so."""
    return [
        None if before is None or np.isnan(now) else before + float(now)
        for before, now in zip(joules, deltas.sum(axis=0), strict=True)
    ]
