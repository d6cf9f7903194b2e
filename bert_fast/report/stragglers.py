"""Which rank the others wait for: the time lost to waiting, charged step by step to the rank that came last.

In a step every rank waits for the last, so the time lost is (max over ranks - mean over ranks), and all of it is charged
to the rank that was last. A rank is called slow only if all of this holds:

- it is the last in more steps than chance explains: with n steps, R ranks and the last in k of them, Chernoff's bound on
  the chance that any of R equal ranks does so, R * exp(-n * KL(k/n || 1/R)), is below 1 in 1,000;
- its share of the time lost is above 1/R;
- its mean time is more than 2 % above the mean over ranks;
- where the ranks' waits for collectives are known, it waits no longer than the mean rank does: the others wait for it.

Work a rank was only given is no fault of its hardware: with the planned costs, times are those of equal work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bert_fast.report.schema import Straggler

MIN_EXCESS = 0.02  # of the mean time over ranks
_CHANCE = 1e-3  # that one of equal ranks is called slow for the number of steps in which it was last


class Straggling:
    """Sums by rank over steps, from which ranks are judged. Grows with the ranks only."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.steps = ranks, 0
        self.slowest = np.zeros(ranks, dtype=np.int64)
        self.lost_s = np.zeros(ranks)
        self.late_s = np.zeros(ranks)  # compute, and data wait where it is known
        self.data_s = np.zeros(ranks)
        self.exposed_s = np.zeros(ranks)

    def worst(self, count: int) -> list[Straggler]:
        """The `count` ranks that cost most, the worst first; none that was never the last."""
        order = np.argsort(-self.lost_s, kind="stable")[:count]
        total, mean = float(self.lost_s.sum()), float(self.late_s.mean())
        if total <= 0 or mean <= 0:
            return []
        return [self._judge(int(rank), total, mean) for rank in order if self.lost_s[rank] > 0]

    def _judge(self, rank: int, total: float, mean: float) -> Straggler:
        slowest, share = int(self.slowest[rank]), float(self.lost_s[rank]) / total
        excess = float(self.late_s[rank]) / mean - 1
        data_excess = float(self.data_s[rank] - self.data_s.mean()) / mean
        is_slow = (
            excess > MIN_EXCESS
            and share > 1 / self.ranks
            and _is_no_chance(slowest, self.steps, self.ranks)
            and float(self.exposed_s[rank]) <= float(self.exposed_s.mean())
        )
        return Straggler(
            rank, slowest, float(self.lost_s[rank]), share, slowest / self.steps, excess, data_excess, is_slow
        )


def _is_no_chance(slowest: int, steps: int, ranks: int) -> bool:
    """Whether no rank of `ranks` equal ones is likely to be the last in so many of `steps`."""
    if ranks < 2 or slowest * ranks <= steps:
        return False
    seen, chance = slowest / steps, 1 / ranks
    divergence = seen * math.log(seen / chance)
    if seen < 1:
        divergence += (1 - seen) * math.log((1 - seen) / (1 - chance))
    return steps * divergence > math.log(ranks / _CHANCE)


def losses(
    compute: np.ndarray,
    costs: np.ndarray | None = None,
    data_wait: np.ndarray | None = None,
    exposed: np.ndarray | None = None,
) -> Straggling:
    """Who was the last in each step of a table and what that cost.

    Args:
        compute: seconds of forward and backward, [ranks, steps]; steps that are not finite are left out.
        costs: planned costs in any unit, above 0, [ranks, steps] or [ranks]; times become those of equal work.
        data_wait: seconds of waiting for data of each rank, all steps together, [ranks]. A rank whose data is late is
            late as well: an equal part of it is added in each step.
        exposed: seconds of waiting for collectives of each rank, all steps together, [ranks].

    Raises:
        ValueError: the shapes do not fit.
    """
    late = np.asarray(compute, dtype=np.float64)
    if late.ndim != 2 or not late.size:
        raise ValueError(f"compute must be [ranks, steps], not {late.shape}")
    ranks, steps = late.shape
    if costs is not None:
        costs = np.asarray(costs, dtype=np.float64)
        costs = np.broadcast_to(costs[:, None] if costs.ndim == 1 else costs, late.shape)
        late = late / costs * costs.mean(axis=0)
    found = Straggling(ranks)
    if data_wait is not None:
        found.data_s += np.asarray(data_wait)
        late = late + (found.data_s / steps)[:, None]
    if exposed is not None:
        found.exposed_s += np.asarray(exposed)
    mean = late.mean(axis=0)
    finite = np.isfinite(mean)
    if not finite.all():
        late, mean = late[:, finite], mean[finite]
    if not mean.size:
        return Straggling(ranks)
    last, found.steps = late.argmax(axis=0), mean.size
    found.slowest += np.bincount(last, minlength=ranks)
    found.lost_s += np.bincount(last, late[last, np.arange(mean.size)] - mean, minlength=ranks)
    found.late_s += late.sum(axis=1)
    return found


class StragglerTally:
    """Adds up `losses` over the intervals of a run."""

    def __init__(self) -> None:
        self.total: Straggling | None = None

    def add(
        self,
        compute: np.ndarray,
        costs: np.ndarray | None = None,
        data_wait: np.ndarray | None = None,
        exposed: np.ndarray | None = None,
    ) -> None:
        """Add an interval; the arguments are those of `losses`. Raises ValueError for another number of ranks."""
        found = losses(compute, costs, data_wait, exposed)
        if self.total is None:
            self.total = found
            return
        total = self.total
        if found.ranks != total.ranks:
            raise ValueError(f"the tally is of {total.ranks} ranks and the table of {found.ranks}; start another tally")
        total.steps += found.steps
        total.slowest += found.slowest
        total.lost_s += found.lost_s
        total.late_s += found.late_s
        total.data_s += found.data_s
        total.exposed_s += found.exposed_s

    def worst(self, count: int) -> list[Straggler]:
        """The `count` ranks that cost most so far; see `Straggling.worst`."""
        return [] if self.total is None else self.total.worst(count)


def text(worst: Sequence[Straggler], hosts: Sequence[str] | None = None, unit: str = "steps") -> str:
    """One line for the user: the slow ranks among `worst`, or that there are none.

    `hosts` names each rank's node; `unit` is what a column of the tables was.
    """
    slow = [one for one in worst if one.is_slow]
    if not slow:
        return "slow: no rank stands out"
    first = slow[0]
    why = ", most of it waiting for data" if first.data_excess > first.excess / 2 else ""
    line = (
        f"slow: {rank_name(first.rank, hosts)} is the last in {100 * first.slowest_share:.0f} % of {unit}, "
        f"{100 * first.excess:.1f} % over the mean{why}: {100 * first.share:.0f} % of the time lost to waiting"
    )
    others = [f"{rank_name(one.rank, hosts)} {100 * one.share:.0f} %" for one in slow[1:]]
    return line + (f"; then {', '.join(others)}" if others else "")


def rank_name(rank: int, hosts: Sequence[str] | None = None) -> str:
    """`rank 3 (node-07)`, or without the node where it is not known."""
    host = hosts[rank] if hosts is not None and rank < len(hosts) else ""
    return f"rank {rank} ({host})" if host else f"rank {rank}"
