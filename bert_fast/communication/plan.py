"""Which gradients share a collective: the exact plan for a measured backward and a measured link.

Units (tensors, or clip groups where those must stay whole) become ready one after the other at times r_1 <= ... <= r_n;
S_j is the number of bytes of the first j. One collective runs at a time and takes T(bytes). With f(j) the earliest time at
which the first j units can have been reduced,

    f(0) = 0,   f(j) = min over i < j of  max(f(i), r_j) + T(S_j - S_i)

is exact, because finishing a prefix earlier never delays the rest. O(n^2), each row vectorised. Exposed communication is
f(n) - r_n. Where the ranks' backward differs, r_j is the latest rank's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Link:
    """Time of one collective: latency + bytes / bandwidth, or a table of measured times.

    seconds: [k] at the sizes `sizes` [k], bytes, both ascending; beyond the ends the first and the last slope go on.
    """

    latency_s: float
    bytes_per_s: float
    sizes: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()

    def __call__(self, num_bytes: np.ndarray | float) -> np.ndarray:
        """Seconds of collectives of so many bytes, float64, same shape."""
        num_bytes = np.asarray(num_bytes, np.float64)
        if len(self.sizes) < 2:
            return self.latency_s + num_bytes / self.bytes_per_s
        sizes, seconds = np.array(self.sizes), np.array(self.seconds)
        inside = np.interp(num_bytes, sizes, seconds)
        slopes = np.diff(seconds) / np.diff(sizes)
        above = seconds[-1] + slopes[-1] * (num_bytes - sizes[-1])
        below = np.maximum(0.0, seconds[0] - slopes[0] * (sizes[0] - num_bytes))
        return np.where(num_bytes > sizes[-1], above, np.where(num_bytes < sizes[0], below, inside))


def fit_link(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """Latency and bandwidth by non-negative least squares of the relative error.

    Args:
        sizes, seconds: of measured collectives, at least two different sizes.

    Raises:
        ValueError: too few sizes, or times that do not grow with the size.
    """
    from scipy.optimize import nnls

    size, time = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    if len(np.unique(size)) < 2 or not (time > 0).all():
        raise ValueError("a link is fitted to positive times of at least two different sizes")
    unit = float(size.max())
    (latency, per_unit), _ = nnls(np.column_stack([1 / time, size / unit / time]), np.ones(len(time)))
    if per_unit <= 0:
        raise ValueError("the measured times do not grow with the size; measure larger collectives")
    return Link(float(latency), unit / float(per_unit))


def tabulate_link(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """A table of the medians of measured times, ascending: for links that one latency and bandwidth do not describe.

    Neighbouring sizes whose times would descend are pooled (isotonic regression).
    """
    fitted = fit_link(sizes, seconds)
    size, time = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    grid = np.unique(size)
    heights = [[float(np.median(time[size == each])), 1] for each in grid]
    pooled: list[list[float]] = []
    for height in heights:
        pooled.append(list(height))
        while len(pooled) > 1 and pooled[-2][0] > pooled[-1][0]:
            (a, m), (b, n) = pooled[-2:]
            pooled[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    table = np.repeat([h for h, _ in pooled], [int(n) for _, n in pooled])
    return Link(fitted.latency_s, fitted.bytes_per_s, tuple(grid.tolist()), tuple(table.tolist()))


@dataclass(frozen=True)
class BucketPlan:
    """`ends[k]` is the number of units up to the end of bucket k; times in seconds from the start of backward."""

    ends: tuple[int, ...]
    starts_s: tuple[float, ...]
    finish_s: tuple[float, ...]
    exposed_s: float


def timeline(ready_s: np.ndarray, sizes: np.ndarray, ends: Sequence[int], link: Link) -> BucketPlan:
    """What a plan comes to: one collective at a time, in order, each from the moment that its last unit is ready.

    Args:
        ready_s: [n] when units become ready, in seconds, ascending (running maxima are taken where not).
        sizes: [n] bytes.
    """
    ready = np.maximum.accumulate(np.asarray(ready_s, np.float64))
    total = np.concatenate([[0.0], np.cumsum(sizes)])
    durations = link(np.diff(total[[0, *ends]]))
    starts, finish, now = [], [], 0.0
    for end, duration in zip(ends, durations.tolist(), strict=True):
        start = max(now, float(ready[end - 1]))
        now = start + duration
        starts.append(start)
        finish.append(now)
    return BucketPlan(tuple(ends), tuple(starts), tuple(finish), now - float(ready[-1]))


def exact_plan(
    ready_s: np.ndarray, sizes: np.ndarray, link: Link, *, min_bytes: float = 0.0, max_bytes: float = float("inf")
) -> BucketPlan:
    """The plan that finishes first; of such, one of few buckets.

    Args:
        ready_s: [n] when units become ready, in seconds.
        sizes: [n] bytes.
        min_bytes: no bucket but the last is smaller.
        max_bytes: no bucket of more than one unit is larger.

    Raises:
        ValueError: no plan keeps both bounds.
    """
    ready = np.maximum.accumulate(np.asarray(ready_s, np.float64))
    total = np.concatenate([[0.0], np.cumsum(np.asarray(sizes, np.float64))])
    n = len(ready)
    finish = np.zeros(n + 1)
    for j in range(1, n + 1):
        finish[j] = _through_last(j, finish, ready, total, link, min_bytes, max_bytes).min()
    if not np.isfinite(finish[n]):  # units so large, and a minimum so close to the maximum, that no plan keeps both
        raise ValueError(f"no buckets between {min_bytes:,.0f} and {max_bytes:,.0f} bytes hold these units")
    # From the end: the largest last bucket that still meets the deadline, then the same for what is before it.
    ends, at, deadline = [], n, finish[n]
    while at > 0:
        ends.append(at)
        in_time = _through_last(at, finish, ready, total, link, min_bytes, max_bytes) <= deadline * (1 + 1e-12)
        begin = int(in_time.argmax())
        deadline -= float(link(total[at] - total[begin]))
        at = begin
    return timeline(ready, np.asarray(sizes), ends[::-1], link)


def _through_last(
    j: int, finish: np.ndarray, ready: np.ndarray, total: np.ndarray, link: Link, min_bytes: float, max_bytes: float
) -> np.ndarray:
    """When units 1 ... j are reduced if the last bucket holds i + 1 ... j: [j] for i = 0 ... j - 1, infinite where not
    allowed."""
    spans = total[j] - total[:j]
    reduced = np.maximum(finish[:j], ready[j - 1]) + link(spans)
    allowed = spans <= max_bytes
    allowed[j - 1] = True
    if j < len(ready):
        allowed &= spans >= min_bytes
    return np.where(allowed, reduced, np.inf)


def lower_bound(ready_s: np.ndarray, sizes: np.ndarray, link: Link) -> float:
    """Exposed seconds that no plan can be below: the last unit leaves after backward, and all bytes must be sent."""
    last, first = float(np.max(ready_s)), float(np.min(ready_s))
    sizes = np.asarray(sizes, np.float64)
    return max(float(link(sizes[-1])), first + float(link(sizes.sum())) - last)


def uniform_ends(sizes: np.ndarray, cap_bytes: float) -> list[int]:
    """Buckets that close as soon as they hold `cap_bytes`."""
    ends, held = [], 0.0
    for index, size in enumerate(np.asarray(sizes, np.float64).tolist(), start=1):
        held += size
        if held >= cap_bytes:
            ends.append(index)
            held = 0.0
    return ends if ends and ends[-1] == len(sizes) else [*ends, len(sizes)]


def best_uniform(ready_s: np.ndarray, sizes: np.ndarray, link: Link) -> tuple[BucketPlan, float]:
    """The best plan with one cap for all buckets, and that cap in bytes, over 64 caps from the smallest unit to all."""
    sizes = np.asarray(sizes, np.float64)
    caps = np.geomspace(max(1.0, sizes.min()), sizes.sum(), 64)
    plans = [(timeline(ready_s, sizes, uniform_ends(sizes, cap), link), float(cap)) for cap in caps]
    return min(plans, key=lambda plan_and_cap: plan_and_cap[0].exposed_s)


def merge_rule(ready_s: np.ndarray, sizes: np.ndarray, link: Link) -> BucketPlan:
    """MG-WFBP's rule (Shi et al., INFOCOM 2019): wait for the next unit if it comes within a latency of the start."""
    ready = np.maximum.accumulate(np.asarray(ready_s, np.float64))
    total = np.concatenate([[0.0], np.cumsum(np.asarray(sizes, np.float64))])
    ends, begin, finish = [], 0, 0.0
    for index in range(len(ready)):
        start = max(finish, float(ready[index]))
        if index + 1 < len(ready) and ready[index + 1] < start + link.latency_s:
            continue
        finish = start + float(link(total[index + 1] - total[begin]))
        ends.append(index + 1)
        begin = index + 1
    return timeline(ready, np.asarray(sizes), ends, link)
