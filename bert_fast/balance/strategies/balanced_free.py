"""Balanced with any number of samples per micro-batch, under a cap of its tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.strategies.base import Assignment, StepSamples, StepShape, Strategy, slots_to_ranks
from bert_fast.config import BalanceConfig
from bert_fast.errors import UserError


class BalancedFree(Strategy):
    """Samples are assigned to the micro-batches of all ranks, and those to ranks.

    The default cap, the tokens of a full equal-count micro-batch, can always be kept.
    """

    has_equal_counts = False

    def __init__(self, config: BalanceConfig, shape: StepShape, lengths: np.ndarray, seed: int) -> None:
        super().__init__(config, shape, lengths, seed)
        self._always_kept = shape.micro_batch_size * shape.max_seq_len
        self.cap: int = config.max_tokens or self._always_kept

    def prepare(self, first_steps: Iterable[StepSamples]) -> None:
        """Refuse a token cap that the first steps do not keep with room for longer ones."""
        if self.cap >= self._always_kept:
            return
        steps = list(first_steps)
        totals = [int(samples.lengths.sum(dtype=np.int64)) for samples in steps]
        expected = float(np.mean(totals)) / self.shape.num_slots
        most = expected + 4 * float(np.std(totals)) / self.shape.num_slots
        if most > self.cap:
            raise UserError(
                f"balance.max_tokens={self.cap} is too few: a micro-batch has {expected:.0f} tokens on average and up to "
                f"{most:.0f} in some steps; set balance.max_tokens to at least {int(1.1 * most) + 1} or lower the batch"
            )
        for samples in steps:
            self.assign(samples)

    def assign(self, samples: StepSamples) -> Assignment:
        costs, num_slots, budget_ms = samples.costs, self.shape.num_slots, self.config.refine_ms
        tokens, order = samples.lengths.astype(np.int64), samples.descending()
        try:
            grid, capped = assign.balanced_free(
                costs, num_slots, order, tokens=tokens, cap=self.cap, budget_ms=budget_ms
            )
        except ValueError as error:
            if self.cap < self._always_kept:
                raise UserError(f"step {samples.step}: {error}; raise balance.max_tokens or lower the batch") from None
            grid, capped = assign.balanced(costs, num_slots, order, budget_ms), True
        sums = np.append(costs, 0)[grid].sum(axis=1)
        grid = grid[slots_to_ranks(sums, self.shape, samples.rng)]
        taken = grid != assign.EMPTY
        starts = np.concatenate([[0], np.cumsum(taken.sum(axis=1))])
        return Assignment(grid[taken], starts, capped=capped)
