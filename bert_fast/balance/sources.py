"""Which pairs are in a step: all of one source, sources by weight, and no two with a text in common.

In-batch negatives of one source cannot be told from the positive by what they look like, as those of another source could. Li
et al. (arXiv 2308.03281) and Nussbaum et al. (arXiv 2402.01613) draw this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bert_fast.balance.permutation import EpochOrder, Permutation
from bert_fast.balance.strata import largest_remainder
from bert_fast.errors import UserError

_CYCLE = 1000  # steps in which every source has an exact number of them
_STEPS_PER_SOURCE = 10  # of a cycle, at least, where there are very many sources
_TURNS, _ORDER, _OTHERS = 2, 3, 4  # which random stream; a strategy's own are 0 and 1


class SourceDraw:
    """Draws the pairs of any step from the seed and the step alone, in O(cycle + batch), for any number of ranks.

    Every `cycle` steps, each source has a number of them that its weight gives by largest remainder, at least one, in a random
    order. A source goes through its pairs in random order, epoch after epoch without replacement. Where two pairs of a batch
    have a text in common, also the same pair where two epochs meet, another pair of the source takes the place of the second
    one, which comes in a later epoch.

    Attributes:
        cycle: steps of a cycle.
        slots: int64 [sources], steps of a cycle in which each source is drawn from.
    """

    def __init__(
        self,
        sources: Sequence[tuple[int, int, float]],
        groups: np.ndarray,
        batch: int,
        seed: int,
        names: Sequence[str] = (),
    ) -> None:
        """
        Args:
            sources: (first pair, number of pairs, weight) of each. Weights are relative to each other.
            groups: unsigned [N], the group of every pair; pairs with a text in common share one. May be memory-mapped; it is
                read once.
            batch: pairs of a step.
            seed: of the order of steps and pairs.
            names: of the sources, for messages; their numbers if not given.

        Raises:
            UserError: no source, a weight that is not above 0, or a source with fewer groups than a batch has pairs.
        """
        if not sources:
            raise UserError("there is no source to draw pairs from; prepare the pairs again")
        names = [str(names[index]) if names else str(index) for index in range(len(sources))]
        weights = np.array([weight for _, _, weight in sources], dtype=np.float64)
        for name, weight in zip(names, weights.tolist(), strict=True):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"source {name}: weight {weight:g}; give a number above 0")
        for name, (first, num, _) in zip(names, sources, strict=True):
            found = len(np.unique(groups[first : first + num]))
            if found < batch:
                raise UserError(
                    f"source {name}: its {num:,} pairs are {found:,} groups without a text in common, fewer than the {batch:,} "
                    "pairs of a batch, which are of one source and have no text in common; lower batch.global_batch_size or "
                    "leave the source out"
                )
        self._sources, self._groups, self._batch, self._seed = list(sources), groups, batch, seed
        self.cycle = max(_CYCLE, _STEPS_PER_SOURCE * len(sources))
        self.slots = _slots(weights / weights.sum(), self.cycle)
        self._turns = np.repeat(np.arange(len(sources)), self.slots)
        self._orders = [EpochOrder(num, (seed, _ORDER, index)) for index, (_, num, _) in enumerate(sources)]
        self._shuffled: tuple[int, np.ndarray] | None = None

    def source(self, step: int) -> int:
        """The number of the source that step `step` draws from."""
        return int(self._order_of(step // self.cycle)[step % self.cycle])

    def draw(self, step: int) -> np.ndarray:
        """Ids of the pairs of step `step` (from 0), int64 [batch]."""
        cycle, place = divmod(step, self.cycle)
        order = self._order_of(cycle)
        index = int(order[place])
        before = cycle * int(self.slots[index]) + int((order[:place] == index).sum())  # batches of this source
        first = self._sources[index][0]
        ids = first + self._orders[index].take(before * self._batch, self._batch)
        is_new = np.zeros(self._batch, dtype=bool)
        is_new[np.unique(self._groups[ids], return_index=True)[1]] = True
        if not is_new.all():
            ids[~is_new] = self._others(ids[is_new], index, step)
        return ids

    def _others(self, kept: np.ndarray, index: int, step: int) -> np.ndarray:
        """Pairs that fill up a batch of `kept` pairs (int64 [n]) of source `index` without a group in common, int64."""
        first, num, _ = self._sources[index]
        wanted = self._batch - len(kept)
        order = Permutation(num, (self._seed, _OTHERS, index, step))
        taken, found = kept, kept[:0]
        start, size = 0, max(64, 2 * wanted)
        while len(found) < wanted:  # ends: the source has as many groups as a batch has pairs
            ids = first + order(np.arange(start, min(num, start + size)))
            ids = ids[np.sort(np.unique(self._groups[ids], return_index=True)[1])]
            ids = ids[~np.isin(self._groups[ids], self._groups[taken])][: wanted - len(found)]
            taken, found = np.concatenate([taken, ids]), np.concatenate([found, ids])
            start, size = start + size, 2 * size
        return found

    def _order_of(self, cycle: int) -> np.ndarray:
        """The source of every step of a cycle, int64 [cycle]."""
        shuffled = self._shuffled  # one read: a step may be planned in two threads
        if shuffled is None or shuffled[0] != cycle:
            shuffle = Permutation(self.cycle, (self._seed, _TURNS, cycle))
            shuffled = self._shuffled = cycle, self._turns[shuffle(np.arange(self.cycle))]
        return shuffled[1]


def _slots(shares: np.ndarray, cycle: int) -> np.ndarray:
    """Steps of a cycle for each source by largest remainder, at least 1, int64 [sources]; `shares` add up to 1."""
    slots = np.maximum(1, largest_remainder(shares, cycle))
    while slots.sum() > cycle:  # the steps of those that were given one are taken from who has most above its share
        slots[np.argmax(np.where(slots > 1, slots - shares * cycle, -np.inf))] -= 1
    return slots
