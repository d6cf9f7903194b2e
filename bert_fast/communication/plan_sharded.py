"""Buckets of the sharded variant: the same ones are scattered during backward and gathered during the next forward pass.

Backward wants the last bucket small, forward the same one, since it is the first whose weights are needed; few large buckets
save latency twice. With a reduce-scatter of bucket k ready at r_k and its gathered weights needed n_k after the start of
forward, gathers in the order of need, a cycle is longer than its compute by

    max over k of (r_k + sum of scatters from k on) - r_last  +  max over k of (sum of gathers up to k's turn - n_k), >= 0.

Both depend on the whole partition, so it is searched: from several starts, by moving, adding and removing ends of buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bert_fast.communication.plan import Link, exact_plan, uniform_ends

_STRIDES = (8, 4, 2, 1)
_STARTS = 3  # of the first candidates, so many of the best are improved


@dataclass(frozen=True)
class ShardedTimes:
    """Units in ready order: when gradients are ready from the start of backward, when weights are needed from that of forward.

    ready_s, needed_s: [n]; sizes: [n], bytes of gradients on the wire; weight_sizes: [n], bytes of weights.
    """

    ready_s: np.ndarray
    needed_s: np.ndarray
    sizes: np.ndarray
    weight_sizes: np.ndarray
    scatter: Link
    gather: Link


class _Costs:
    """Cumulative forms of the times, so that a plan is evaluated in the number of its buckets."""

    def __init__(self, times: ShardedTimes) -> None:
        self.ready = np.maximum.accumulate(np.asarray(times.ready_s, np.float64))
        self.needed = np.asarray(times.needed_s, np.float64)
        self.bytes = np.concatenate([[0.0], np.cumsum(times.sizes)])
        self.weights = np.concatenate([[0.0], np.cumsum(times.weight_sizes)])
        self.scatter, self.gather = times.scatter, times.gather

    def of(self, ends: Sequence[int]) -> tuple[float, float]:
        """`delays` of a plan."""
        edges = np.array([0, *ends])
        scatters = self.scatter(np.diff(self.bytes[edges]))
        behind = np.cumsum(scatters[::-1])[::-1]  # this scatter and all later ones
        exposed = float((self.ready[edges[1:] - 1] + behind).max() - self.ready[-1])
        arrived = np.cumsum(self.gather(np.diff(self.weights[edges]))[::-1])[::-1]
        needed = np.minimum.reduceat(self.needed, edges[:-1])
        return exposed, max(0.0, float((arrived - needed).max()))


def delays(times: ShardedTimes, ends: Sequence[int]) -> tuple[float, float]:
    """Seconds by which a plan delays the end of backward, and the forward pass."""
    return _Costs(times).of(ends)


def sharded_plan(times: ShardedTimes, *, min_bytes: float = 0.0, max_bytes: float = float("inf")) -> tuple[int, ...]:
    """Ends of buckets for which both delays together are small; bounds as in `exact_plan`."""
    costs, n = _Costs(times), len(times.sizes)

    def total(ends: Sequence[int]) -> float:
        spans = np.diff(costs.bytes[[0, *ends]])
        units = np.diff([0, *ends])
        if ((spans > max_bytes) & (units > 1)).any() or (spans[:-1] < min_bytes).any():
            return float("inf")
        return sum(costs.of(ends))

    sizes = np.asarray(times.sizes, np.float64)
    caps = np.geomspace(max(1.0, sizes.min()), sizes.sum(), 24)
    starts = {tuple(uniform_ends(sizes, cap)) for cap in caps} | {tuple(range(1, n + 1)), (n,)}
    starts.add(exact_plan(times.ready_s, sizes, times.scatter, min_bytes=min_bytes, max_bytes=max_bytes).ends)
    best = sorted(starts, key=lambda ends: (total(ends), len(ends)))[:_STARTS]
    return min((_climb(ends, n, total) for ends in best), key=lambda ends: (total(ends), len(ends)))


def _climb(ends: tuple[int, ...], n: int, total: Callable[[Sequence[int]], float]) -> tuple[int, ...]:
    """Take the best single change as long as one helps."""
    value = total(ends)
    while True:
        inner = set(ends[:-1])
        changed: set[tuple[int, ...]] = set()
        for end in inner:
            rest = inner - {end}
            changed.add((*sorted(rest), n))
            changed.update((*sorted(rest | {end + d}), n) for s in _STRIDES for d in (s, -s) if 0 < end + d < n)
        changed.update((*sorted(inner | {end}), n) for end in range(1, n) if end not in inner)
        if not changed:
            return ends
        best = min(changed, key=lambda each: (total(each), len(each)))
        reached = total(best)
        fewer = reached <= value and len(best) < len(ends)
        if reached >= value * (1 - 1e-9) and not fewer:
            return ends
        ends, value = best, reached
