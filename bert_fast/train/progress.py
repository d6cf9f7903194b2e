"""What changes during a run and lives in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bert_fast.report.schema import EvaluationLine
from bert_fast.train.batches import PlannedStep


@dataclass
class Progress:
    """Counters. `step` is the number of finished optimizer steps, `samples` MLPerf's samples seen."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    tokens_squared: int = 0
    masked: int = 0
    next_evaluation: int = 0
    evaluations: list[EvaluationLine] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    sessions: int = 1
    first_step_s: float | None = None
    joules: list[float | None] = field(default_factory=lambda: [0.0, 0.0])  # of GPUs and of CPUs; None: not known

    def count(self, planned: PlannedStep, global_batch_size: int, elapsed_s: float) -> None:
        """Count a finished step; `elapsed_s` is on MLPerf's clock."""
        if self.first_step_s is None:
            self.first_step_s = elapsed_s
        self.step += 1
        self.samples += global_batch_size
        self.tokens += planned.num_tokens
        self.tokens_squared += planned.num_tokens_squared
        self.masked += planned.num_masked

    def add(self, name: str, value: float) -> None:
        """Add to a running sum over the run (imbalance, data wait, ...)."""
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def mean(self, name: str) -> float:
        """A running sum divided by the number of steps."""
        return self.sums.get(name, 0.0) / max(1, self.step)

    def state_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), "evaluations": [each.values() for each in self.evaluations]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave; `joules` are not known where the checkpoint lacks them."""
        self.joules = [None, None]
        for name, value in state.items():
            setattr(self, name, value)
        self.evaluations = [EvaluationLine(**each) for each in state.get("evaluations", [])]
