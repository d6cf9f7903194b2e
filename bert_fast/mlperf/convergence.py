"""Reference convergence points (RCPs): how many samples the reference needs at a global batch size, and how few may pass.

The points, their pruning, interpolation and the t-test are mlperf-logging's (`rcp_checker`); this module gives them types.
"""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker

from bert_fast.errors import UserError

NUM_RUNS = 10


@dataclass(frozen=True)
class ConvergencePoint:
    """Samples to the target at a global batch size.

    Attributes:
        mean: of the reference's runs, without the fastest and the slowest.
        least: the fewest samples that pass.
        kind: `reference`, `interpolated`, or `of a larger batch`.
    """

    global_batch_size: int
    mean: float
    least: float
    kind: str  # reference | interpolated | of a larger batch


@dataclass(frozen=True)
class ConvergenceVerdict:
    """The verdict on a set of runs.

    Attributes:
        point: the reference's, None where there is no reference.
        samples: mean of the runs, without the fastest and the slowest; None of too few runs.
        scale: factor of the score, above 1 for runs that are faster than the reference but allowed.
    """

    passed: bool
    text: str
    point: ConvergencePoint | None
    samples: float | None
    scale: float = 1.0


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the checker, which writes to the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        root.setLevel(level)


@functools.cache
def _checker(ruleset: str) -> Any:
    try:
        with _quiet():
            return RCP_Checker("training", ruleset, "bert", verbose=False)
    except Exception as error:  # it raises bare Exceptions, and FileNotFoundError for rulesets without BERT
        raise UserError(f"mlperf.ruleset={ruleset} has no reference convergence points of BERT: {error}") from None


def reference_points(ruleset: str, *, pruned: bool = True) -> dict[int, ConvergencePoint]:
    """Points of a ruleset by global batch size; if `pruned`, without those that an interpolation of their neighbors beats.

    Raises:
        UserError: the ruleset has no points of BERT.
    """
    checker = _checker(ruleset)
    records = checker.pruned_rcp_data if pruned else checker.rcp_data
    points = (_point(record, "reference") for record in records.values())
    return {point.global_batch_size: point for point in sorted(points, key=lambda each: each.global_batch_size)}


def reference_point(global_batch_size: int, ruleset: str) -> ConvergencePoint | None:
    """The pruned point of a global batch size: its own, else interpolated; the smallest for sizes below all points.

    Returns:
        None for sizes above all points.

    Raises:
        UserError: the ruleset has no points of BERT.
    """
    points = reference_points(ruleset)
    if global_batch_size in points:
        return points[global_batch_size]
    below = [batch for batch in points if batch < global_batch_size]
    above = [batch for batch in points if batch > global_batch_size]
    if not above:
        return None
    if not below:
        smallest = points[min(above)]
        return ConvergencePoint(smallest.global_batch_size, smallest.mean, smallest.least, "of a larger batch")
    checker = _checker(ruleset)
    low, high = (checker._find_rcp(batch, "pruned_rcps") for batch in (max(below), min(above)))
    with _quiet():
        _, record = checker._create_interp_rcp(global_batch_size, low, high)
    return _point(record, "interpolated")


def _point(record: dict[str, Any], kind: str) -> ConvergencePoint:
    return ConvergencePoint(int(record["BS"]), float(record["RCP Mean"]), float(record["Min Epochs"]), kind)


def judge(samples: Sequence[float | None], global_batch_size: int, ruleset: str) -> ConvergenceVerdict:
    """Compare the samples to converge of one system's runs (None: a run that did not converge) with the reference.

    One run that did not converge counts as the slowest.
    """
    if len(samples) < 3 or sum(value is None for value in samples) > 1:
        return ConvergenceVerdict(False, "too few runs that converged", None, None)
    point = reference_point(global_batch_size, ruleset)
    kept = sorted(float("inf") if value is None else float(value) for value in samples)[1:-1]
    mean = statistics.fmean(kept)
    if point is None:
        return ConvergenceVerdict(
            False, f"no reference at a global batch of {global_batch_size:,} or above", None, mean
        )
    if mean < point.least:
        text = f"{mean:,.0f} samples are fewer than the {point.least:,.0f} that the reference ({point.kind}) allows"
        return ConvergenceVerdict(False, text, point, mean)
    if mean < point.mean:
        scale = point.mean / mean
        text = f"passed; faster than the reference's {point.mean:,.0f}, so the score is multiplied by {scale:.5f}"
        return ConvergenceVerdict(True, text, point, mean, scale)
    return ConvergenceVerdict(True, f"passed (reference {point.mean:,.0f}, {point.kind})", point, mean)
