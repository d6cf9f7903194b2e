"""When a run reaches its target, if its accuracy goes on as it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def forecast(
    evaluations: Sequence[dict[str, Any]], target: float | None, every: int | None, limit: float | None = None
) -> dict[str, Any] | str:
    """When the target is reached if accuracy goes on along a straight line through the latest evaluations, or why not.

    The line goes through the later half of the evaluations, at least 4 and at most 8. It is no forecast unless its slope
    is above three times its standard error and the target no further ahead than the run has come. The result is the
    evaluation (one `every` so many samples) that sees the target: `samples`, `time_s` on the clock, `in_s` after the last
    evaluation, `within` whether that is before the run's `limit` of samples.
    """
    if target is None:
        return "no target is set"
    points = np.array(
        [[one["samples"], one["accuracy"], one["time_s"]] for one in evaluations if math.isfinite(one["accuracy"])]
    )
    if len(points) and points[-1, 1] >= target:
        return "reached"
    if len(points) < 4:
        return "no forecast: fewer than 4 evaluations"
    samples, accuracy, time_s = points[-min(8, max(4, len(points) // 2)) :].T
    spread = samples - samples.mean()
    slope = float(spread @ accuracy / (spread @ spread))
    rest = accuracy - accuracy.mean() - slope * spread
    error = math.sqrt(float(rest @ rest) / (len(rest) - 2) / float(spread @ spread))
    if slope <= 0 or slope <= 3 * error:
        return "no forecast: accuracy does not rise steadily"
    last = float(samples[-1])
    ahead = max(0.0, float(samples.mean() + (target - accuracy.mean()) / slope) - last)
    if ahead > last:
        return "no forecast: the target is further ahead than the run has come"
    if every:
        ahead = max(1, math.ceil(ahead / every)) * every
    in_s = ahead * float((time_s[-1] - time_s[0]) / (last - samples[0]))
    return {
        "samples": round(last + ahead),
        "time_s": float(time_s[-1]) + in_s,
        "in_s": in_s,
        "evaluations": len(samples),
        "within": limit is None or last + ahead <= limit,
    }
