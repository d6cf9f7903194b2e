"""What a run of a trial comes to: its curve, and samples to an accuracy by linear interpolation between evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

NEARLY = 0.97  # of the target: a curve is steep there, so that the last steps' noise counts less
EARLY = (0.27, 0.30)  # accuracies of the mini benchmark whose samples are kept beside the target's


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation."""

    samples: int
    seconds: float  # from run_start, evaluations included
    accuracy: float


@dataclass(frozen=True)
class Outcome:
    """How a run went.

    curve:        its evaluations in order
    steps:        optimizer steps
    seconds:      from run_start to its end
    step_ms:      per step, without evaluations
    optimizer_ms: of that, the optimizer's update
    pruned:       ended before the target and the cap
    diverged:     ended because a loss or a gradient was not finite
    """

    curve: list[CurvePoint]
    steps: int
    samples: int
    seconds: float
    step_ms: float
    optimizer_ms: float
    pruned: bool = False
    diverged: bool = False
    best: float = field(init=False)

    def __post_init__(self) -> None:
        finite = [point.accuracy for point in self.curve if math.isfinite(point.accuracy)]
        object.__setattr__(self, "best", max(finite, default=0.0))

    def to(self, accuracy: float, unit: str = "samples") -> float | None:
        """Samples or seconds at which the curve first comes to an accuracy; None: it never does.

        Between two evaluations by linear interpolation. Before the first there is nothing to interpolate from: where that one
        has the accuracy, its own samples count.
        """
        return crossing([(getattr(point, unit), point.accuracy) for point in self.curve], accuracy)

    def value(self, target: float, cap: float, unit: str = "samples") -> tuple[float, bool]:
        """What is minimised, and whether it is censored.

        A run that has not come to the target counts as the cap, and more the farther it stayed away:
        cap * (1 + (target - best) / target). One that diverged counts as if its best were 0.

        Args:
            cap: in the unit; what the run has come to counts in its place if it is more.
        """
        reached = None if self.diverged else self.to(target, unit)
        if reached is not None:
            return reached, False
        cap = max(cap, self.samples if unit == "samples" else self.seconds)
        return cap * (2.0 if self.diverged else 1 + (target - self.best) / target), True

    def record(self, target: float, cap: float, unit: str = "samples") -> dict[str, Any]:
        """All of it as plain values; arguments as for `value`."""
        value, censored = self.value(target, cap, unit)
        return {
            "value": value,
            "censored": censored,
            "diverged": self.diverged,
            "best_accuracy": self.best,
            "samples_to": {f"{level:.4g}": self.to(level) for level in levels(target)},
            "samples": self.samples,
            "seconds": self.seconds,
            "steps": self.steps,
            "step_ms": self.step_ms,
            "optimizer_ms": self.optimizer_ms,
            "curve": [list(asdict(point).values()) for point in self.curve],
        }


def levels(target: float) -> list[float]:
    """The accuracies whose samples are recorded: 0.27, 0.30, 0.97 of the target, the target."""
    return sorted({*(level for level in EARLY if level <= target), round(NEARLY * target, 6), target})


def crossing(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """The first x at which y, linear between the (x, y) points, is at least `level`; None if it never is."""
    if points and points[0][1] >= level:
        return float(points[0][0])
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 < level <= y1:
            return x0 + (level - y0) / (y1 - y0) * (x1 - x0)
    return None
