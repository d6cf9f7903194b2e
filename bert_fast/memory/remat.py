"""Rematerialization: which stages of a model keep what backward needs, and which compute it again.

A model is a chain of stages, each from one tensor (a boundary) to the next. A plan cuts the chain into segments: a stage is
kept, with all that its forward pass saves, or a run of stages keeps its first boundary alone and is computed once more when
backward reaches it. So a plan adds at most one forward pass.

Let x(k) be the bytes of stage k's input, s(k) what it saves beside its input, t(k) its temporaries, g(k) the gradients of its
weights that come to be in its backward pass. While stage k of a segment that begins at i is in its backward pass, there are,
beside what the segments before i keep and x(i),

    B(i, k) = s(i) + ... + s(k) + x(i+1) + ... + x(k) + x(k+1) + t(k) + g(k) + ... + g(n-1)

where x(k+1) stands for the gradient of its output. Boundaries behind backward's front are free, so the least peak of what
follows boundary i is

    M(i) = x(i) + min over j > i of max( U(i, j), M(j) ),   U(i, j) = max over i <= k < j of B(i, k),   M(n) = 0

(Hong et al., arXiv 2502.12499: the objective that follows the backward pass). U rises with j, so that only those j count whose
M is below that of every nearer one; U - x(i) rises as i falls, so that a j whose U has passed the M of the next nearer one
never counts again: the candidates are a staircase that is taken off at both ends, and all of it is linear in n. Where
stage i is kept, M(i) is x(i) + max(B(i, i), s(i) + M(i+1)), at no time: the fastest plan within a budget (the problem of
Beaumont et al., arXiv 1911.13214, with one recomputation) is read off the curve of peaks and times.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_TICKS = 1e9  # times are compared as whole nanoseconds, so that sums in another order are the same


@dataclass(frozen=True)
class Stage:
    """A part of a model from one tensor to one tensor; bytes are those of one micro-batch.

    output_bytes:    of the tensor that the next stage reads, and of its gradient
    saved_bytes:     of what forward keeps for backward beside the stage's input
    forward_s:       seconds to compute it again
    temporary_bytes: most that is there at a time beside that, in backward or forward: the input's gradient is a part of it
    gradient_bytes:  of gradients of weights that are not there before its backward pass; 0 where they stay from step to step
    """

    name: str
    output_bytes: int
    saved_bytes: int
    forward_s: float = 0.0
    temporary_bytes: int = 0
    gradient_bytes: int = 0


@dataclass(frozen=True)
class Chain:
    """Stages in the order of forward. `input_bytes`: of what the first one reads, if it is to be kept for it."""

    stages: tuple[Stage, ...]
    input_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a chain needs a stage")

    @property
    def forward_s(self) -> float:
        """Seconds of all stages."""
        return sum(stage.forward_s for stage in self.stages)


@dataclass(frozen=True)
class Segment:
    """Stages [begin, end): computed again in backward, or one that is kept."""

    begin: int
    end: int
    recompute: bool


@dataclass(frozen=True)
class Plan:
    """How a chain is run: its segments from first to last, the most bytes at a time, and seconds of recomputation."""

    segments: tuple[Segment, ...]
    peak_bytes: int
    recompute_s: float

    @property
    def recomputed(self) -> list[int]:
        """Numbers of the stages that run twice."""
        return [k for segment in self.segments if segment.recompute for k in range(segment.begin, segment.end)]


class BudgetTooSmallError(ValueError):
    """No plan fits. `least_bytes`: the peak of the one that needs least."""

    def __init__(self, budget: int, least_bytes: int) -> None:
        super().__init__(f"no plan of this chain stays within {budget:,} bytes; the least peak is {least_bytes:,}")
        self.least_bytes = least_bytes


def make_plan(chain: Chain, segments: Iterable[Segment]) -> Plan:
    """The plan of these segments, with its peak and time. Raises ValueError where they are not those of the chain."""
    segments = tuple(segments)
    ends = [0, *(segment.end for segment in segments)]
    if [segment.begin for segment in segments] != ends[:-1] or ends[-1] != len(chain.stages):
        raise ValueError(f"segments {segments} do not follow each other from stage 0 to {len(chain.stages)}")
    for segment in segments:
        if segment.end <= segment.begin or (not segment.recompute and segment.end != segment.begin + 1):
            raise ValueError(f"{segment} is neither a stage that is kept nor a run of stages that is recomputed")
    return Plan(segments, peak_of(chain, segments), _recompute_seconds(chain, segments))


def _recompute_seconds(chain: Chain, segments: Iterable[Segment]) -> float:
    return sum(chain.stages[k].forward_s for s in segments if s.recompute for k in range(s.begin, s.end))


def peak_of(chain: Chain, segments: Sequence[Segment]) -> int:
    """Most bytes at a time, by following the step event by event: the plain form of what the recurrences compute."""
    stages = chain.stages
    inputs = [chain.input_bytes, *(stage.output_bytes for stage in stages)]
    live = peak = 0
    for segment in segments:  # forward
        live += inputs[segment.begin]
        for k in range(segment.begin, segment.end):
            inner = inputs[k] if k > segment.begin else 0
            peak = max(peak, live + inner + stages[k].saved_bytes + inputs[k + 1])
        if not segment.recompute:
            live += stages[segment.begin].saved_bytes
    grown = 0
    for segment in reversed(segments):  # backward
        if segment.recompute:
            again = sum(stages[k].saved_bytes for k in range(segment.begin, segment.end))
            live += again + sum(inputs[segment.begin + 1 : segment.end])
        for k in reversed(range(segment.begin, segment.end)):
            grown += stages[k].gradient_bytes
            peak = max(peak, live + inputs[k + 1] + stages[k].temporary_bytes + grown)
            live -= stages[k].saved_bytes + inputs[k]
    assert live == 0
    return peak


def keep_all(chain: Chain) -> Plan:
    """Nothing is computed again."""
    return make_plan(chain, (Segment(k, k + 1, recompute=False) for k in range(len(chain.stages))))


def recompute_runs(chain: Chain, ends: Sequence[int], first: int = 0) -> Plan:
    """Recompute runs of stages from stage `first` on, each up to one of `ends`; what is before and after them is kept."""
    kept_before = [Segment(k, k + 1, recompute=False) for k in range(first)]
    runs = [Segment(begin, end, recompute=True) for begin, end in itertools.pairwise([first, *ends])]
    kept = [Segment(k, k + 1, recompute=False) for k in range(ends[-1] if ends else first, len(chain.stages))]
    return make_plan(chain, [*kept_before, *runs, *kept])


class _Costs:
    """B(i, k) = from_start[k] - before[i]: as sums from the start of the chain."""

    def __init__(self, chain: Chain) -> None:
        stages = chain.stages
        self.inputs = [chain.input_bytes, *(stage.output_bytes for stage in stages)]
        growth = list(itertools.accumulate(stage.gradient_bytes for stage in reversed(stages)))[::-1]
        saved = sums = 0
        self.before, self.from_start = [], []
        for k, stage in enumerate(stages):
            sums += self.inputs[k] if k else 0  # x(1) + ... + x(k)
            self.before.append(saved + sums)
            saved += stage.saved_bytes
            self.from_start.append(saved + sums + self.inputs[k + 1] + stage.temporary_bytes + growth[k])


def least_peak(chain: Chain) -> Plan:
    """The plan of the least peak, in time linear in the number of stages. Those after the last cut are kept, at no cost."""
    n, costs = len(chain.stages), _Costs(chain)
    inputs, before, from_start = costs.inputs, costs.before, costs.from_start
    least = [0] * (n + 1)  # M
    end_of = [0] * n
    candidates: deque[int] = deque()  # ends of the segment, the nearest at the left; M falls to the right
    largest: deque[int] = (
        deque()
    )  # stages whose from_start is above that of all nearer ones, up to the farthest candidate
    for i in reversed(range(n)):
        while candidates and least[candidates[0]] >= least[i + 1]:
            candidates.popleft()
        candidates.appendleft(i + 1)
        while largest and from_start[largest[0]] <= from_start[i]:
            largest.popleft()
        largest.appendleft(i)
        while True:
            end = candidates[-1]
            while largest[-1] >= end:
                largest.pop()
            inside = from_start[largest[-1]] - before[i]
            if len(candidates) == 1 or inside < least[candidates[-2]]:
                break
            candidates.pop()
        end_of[i] = end
        least[i] = inputs[i] + max(inside, least[end])
    segments, begin = [], 0
    while end_of[begin] < n:
        segments.append(Segment(begin, end_of[begin], recompute=True))
        begin = end_of[begin]
    segments += [Segment(k, k + 1, recompute=False) for k in range(begin, n)]
    return Plan(tuple(segments), least[0], _recompute_seconds(chain, segments))


@dataclass(frozen=True)
class _Front:
    """The best ways to run the stages from one on: peaks rise, times fall; `end` 0: the stage is kept."""

    peaks: np.ndarray  # int64 bytes, beside what is kept before
    times: np.ndarray  # int64 ticks
    ends: np.ndarray  # int64: where the first segment ends
    rest: np.ndarray  # int64: which entry of the front there goes on


def pareto(chain: Chain, max_points: int = 1024) -> list[Plan]:
    """Every plan that no other one beats in both peak and time, the least peak first; the last one keeps everything.

    Takes of the order of n^2 times the number of points.

    Args:
        max_points: where a stage has more such plans for what follows it, some between are left out: the curve is then still
            one of plans that exist, but not every point of it.
    """
    n, costs = len(chain.stages), _Costs(chain)
    ticks = np.rint(np.array([stage.forward_s for stage in chain.stages]) * _TICKS).astype(np.int64)
    time_before = np.concatenate([[0], np.cumsum(ticks)])
    bound = keep_all(chain).peak_bytes
    zero = np.zeros(1, np.int64)
    fronts = [_Front(zero, zero, zero, zero)]  # of the stages from n on; fronts[n - i] are those from i on
    for i in reversed(range(n)):
        following = fronts[n - i - 1]
        kept = costs.from_start[i] - costs.before[i]
        peaks = [np.maximum(kept, chain.stages[i].saved_bytes + following.peaks)]
        times, ends = [following.times], [np.zeros(len(following.peaks), np.int64)]
        rest = [np.arange(len(following.peaks))]
        inside = 0
        for end in range(i + 1, n + 1):
            inside = max(inside, costs.from_start[end - 1] - costs.before[i])
            if inside > bound:
                break
            front = fronts[n - end]
            peaks.append(np.maximum(inside, front.peaks))
            times.append(front.times + (time_before[end] - time_before[i]))
            ends.append(np.full(len(front.peaks), end))
            rest.append(np.arange(len(front.peaks)))
        columns = [np.concatenate(column) for column in (peaks, times, ends, rest)]
        fronts.append(_best(costs.inputs[i], columns, max_points))
    return [_follow(chain, fronts, point) for point in range(len(fronts[n].peaks))]


def _best(input_bytes: int, columns: list[np.ndarray], max_points: int) -> _Front:
    """Those that no other one beats, of columns as `_Front` has them."""
    peaks, times, ends, rest = columns
    order = np.lexsort((times, peaks))
    best_before = np.minimum.accumulate(np.concatenate([[np.iinfo(np.int64).max], times[order][:-1]]))
    order = order[times[order] < best_before]
    if len(order) > max_points:
        order = order[np.unique(np.linspace(0, len(order) - 1, max_points).astype(np.int64))]
    return _Front(peaks[order] + input_bytes, times[order], ends[order], rest[order])


def _follow(chain: Chain, fronts: list[_Front], point: int) -> Plan:
    n, begin, at = len(chain.stages), 0, point
    segments = []
    while begin < n:
        front = fronts[n - begin]
        end, at = int(front.ends[at]), int(front.rest[at])
        segments.append(Segment(begin, end or begin + 1, recompute=end > 0))
        begin = segments[-1].end
    return Plan(tuple(segments), int(fronts[n].peaks[point]), _recompute_seconds(chain, segments))


def fastest_within(curve: Sequence[Plan], budget_bytes: int) -> Plan:
    """The plan of least time on a curve (`pareto`) whose peak is at most the budget: a larger budget never gives a slower one.

    Raises:
        BudgetTooSmallError: with the least peak.
    """
    fitting = [plan for plan in curve if plan.peak_bytes <= budget_bytes]
    if not fitting:
        raise BudgetTooSmallError(budget_bytes, curve[0].peak_bytes)
    return fitting[-1]
