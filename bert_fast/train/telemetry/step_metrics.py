"""The steps between two log lines: added up by every rank, gathered once, made into a line of metrics.jsonl."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from bert_fast.balance.cost import CostModel
from bert_fast.balance.planner import Plan
from bert_fast.report.schema import ClipRecord, StepLine
from bert_fast.report.stragglers import StragglerTally
from bert_fast.train.clock import Clock
from bert_fast.train.collectives import gather_floats
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment
from bert_fast.train.progress import Progress
from bert_fast.train.step import StepResult

_COST_ROWS = 64  # measurements of cost in a log line (at least one of every rank)


@dataclass(frozen=True)
class IntervalSummary:
    """An interval over all ranks. The same on every rank, but that only rank 0 has the line."""

    line: StepLine | None
    seconds: float  # of training
    steps: int
    signal: int  # for which all ranks stop; 0: go on
    first_rank_with_alarm: int | None
    first_rank_with_other_plan: int | None  # whose plans, or masked tokens in them, were not rank 0's


class _OverRanks(NamedTuple):
    """What the ranks have gathered: float64 [ranks] each, and `compute_s` [ranks, steps]. Seconds are of the interval."""

    mlm_sum: np.ndarray
    nsp_sum: np.ndarray
    signals: np.ndarray
    alarms: np.ndarray
    exposed_s: np.ndarray
    data_s: np.ndarray
    optimizer_s: np.ndarray
    checksums: np.ndarray
    compute_s: np.ndarray

    def compute_imbalance(self) -> np.ndarray:
        """The longest time of forward and backward over the mean of the ranks, float64 [steps]."""
        return self.compute_s.max(axis=0) / self.compute_s.mean(axis=0)


class IntervalMetrics:
    """Steps since the last log line."""

    def __init__(
        self,
        environment: Environment,
        components: TrainComponents,
        clock: Clock,
        progress: Progress,
        cost: CostModel,
        global_batch_size: int,
    ) -> None:
        self._environment, self._components, self._clock, self._progress = environment, components, clock, progress
        self._cost, self._global_batch = cost, global_batch_size
        self.stragglers = StragglerTally()
        self.reset()

    @property
    def steps(self) -> int:
        return self._progress.step - self._first_step

    def reset(self) -> None:
        """Begin the next interval here and now."""
        self._losses = torch.zeros(2, dtype=torch.float64, device=self._environment.device)
        self._plans: list[Plan] = []
        self._checksum = 0  # of what every rank has planned for itself
        self._compute: list[float] = []  # seconds of forward and backward, step by step
        self._masked, self._data_s, self._exposed_s, self._optimizer_s = 0, 0.0, 0.0, 0.0
        self._first_step, self._start = self._progress.step, self._clock.training

    def add(self, plan: Plan, result: StepResult, masked: int, data_s: float, lr: float) -> None:
        """Add a step without asking the device. `masked` tokens of all ranks; this rank waited `data_s` for its batch."""
        self._predicts_next = result.nsp_sum is not None
        nsp_sum = torch.zeros_like(result.mlm_sum) if result.nsp_sum is None else result.nsp_sum
        self._losses += torch.stack([result.mlm_sum, nsp_sum])
        self._norm, self._lr = result.grad_norm, lr
        self._plans.append(plan)
        self._checksum = zlib.crc32(f"{plan.checksum} {masked}".encode(), self._checksum)
        self._compute.append(result.compute_s)
        self._masked += masked
        self._data_s += data_s
        self._exposed_s += result.exposed_s
        self._optimizer_s += result.optimizer_s
        self._progress.add("imbalance", plan.imbalance)

    def summarize(self, signal: int, alarm: bool) -> IntervalSummary:
        """The interval over all ranks, counted into the run's sums; the next one begins. A collective.

        Args:
            signal: the number of the signal that this rank was sent; 0: it was sent no signal.
            alarm: whether something has happened on this rank for which all ranks must stop.
        """
        steps, device_times = self.steps, self._components.step.read_device_times()
        if device_times is not None:
            self._compute = device_times.compute_s
            if device_times.exposed_s is not None:
                self._exposed_s = device_times.exposed_s
        mine = [*self._losses.tolist(), float(signal), float(alarm), self._exposed_s, self._data_s, self._optimizer_s]
        table = gather_floats([*mine, float(self._checksum), *self._compute], self._environment.device)
        ranks = _OverRanks._make([*table[:, :8].T, table[:, 8:]])
        self._count(ranks)
        seconds = self._clock.training - self._start
        line = self._make_line(ranks, steps, seconds) if self._environment.is_main else None
        self.reset()
        differ = ranks.checksums != ranks.checksums[0]
        return IntervalSummary(
            line,
            seconds,
            steps,
            int(ranks.signals.max()),
            first_rank_with_alarm=int(ranks.alarms.argmax()) if ranks.alarms.any() else None,
            first_rank_with_other_plan=int(differ.argmax()) if differ.any() else None,
        )

    def _count(self, ranks: _OverRanks) -> None:
        """Add the interval to the run's sums and to the tally of stragglers."""
        self._count_stragglers(ranks.compute_s, ranks.data_s, ranks.exposed_s)
        progress, exposed_s = self._progress, ranks.exposed_s
        progress.add("compute_s", ranks.compute_s.sum(axis=1).mean())
        # A rank that waits for another's backward is not waiting for the wire: only the last to arrive is.
        progress.add("exposed_s", exposed_s.min())
        progress.add("straggler_s", exposed_s.mean() - exposed_s.min())
        progress.add("data_s", ranks.data_s.max())
        progress.add("optimizer_s", ranks.optimizer_s.mean())
        progress.add("compute_imbalance", ranks.compute_imbalance().sum())

    def _make_line(self, ranks: _OverRanks, steps: int, seconds: float) -> StepLine:
        """The line of metrics.jsonl for an interval of `steps` steps and `seconds` of training."""
        mlm, nsp = ranks.mlm_sum.sum() / self._masked, ranks.nsp_sum.sum() / (steps * self._global_batch)
        return StepLine(
            step=self._progress.step,
            samples=self._progress.samples,
            time_s=self._clock.elapsed,
            loss=mlm + nsp,
            mlm_loss=mlm,
            nsp_loss=nsp if self._predicts_next else None,
            lr=self._lr,
            grad_norm=float(self._norm),
            samples_per_s=steps * self._global_batch / seconds,
            imbalance=[round(plan.imbalance, 6) for plan in self._plans],
            compute_imbalance=[round(x, 4) for x in ranks.compute_imbalance().tolist()],
            compute_ms=np.round(1e3 * ranks.compute_s.mean(axis=1), 3).tolist(),
            data_ms_rank=np.round(1e3 * ranks.data_s / steps, 3).tolist(),
            exposed_ms_rank=np.round(1e3 * ranks.exposed_s / steps, 3).tolist(),
            exposed_ms=1e3 * ranks.exposed_s.min() / steps,
            data_ms=1e3 * ranks.data_s.max() / steps,
            optimizer_ms=1e3 * ranks.optimizer_s.mean() / steps,
            capped=sum(plan.capped for plan in self._plans),
            cost=self._cost_rows(ranks.compute_s),
            clip=self._clip_records(),
        )

    def _count_stragglers(self, compute: np.ndarray, data_s: np.ndarray, exposed_s: np.ndarray) -> None:
        """Who was last in these steps; work that was planned to be uneven is allowed for."""
        costs = [
            self._cost.linear * plan.tokens.sum(axis=1) + self._cost.quadratic * plan.tokens_squared.sum(axis=1)
            for plan in self._plans
        ]
        waits = exposed_s if exposed_s.any() else None  # DDP's is inside backward, a graph's inside the step
        self.stragglers.add(compute, np.maximum(np.stack(costs, axis=1), 1e-12), data_wait=data_s, exposed=waits)

    def _cost_rows(self, compute: np.ndarray) -> list[tuple[int, int, float]]:
        """(tokens, squared lengths, milliseconds) of ranks in the interval's last steps, for a later fit of the cost."""
        steps = max(1, _COST_ROWS // self._environment.world_size)
        return [
            (int(tokens), int(squared), round(1e3 * seconds, 3))
            for plan, times in zip(self._plans[-steps:], compute.T[-steps:], strict=True)
            for tokens, squared, seconds in zip(
                plan.tokens.sum(axis=1), plan.tokens_squared.sum(axis=1), times, strict=True
            )
        ]

    def _clip_records(self) -> dict[str, ClipRecord]:
        statistics = self._components.engine.clip_statistics.read()
        return {group: ClipRecord(**values) for group, values in statistics.items()}
