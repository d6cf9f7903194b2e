"""Samples packed into rows of `max_seq_len` tokens (Krell et al., arXiv 2107.02027)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.packing import pack
from bert_fast.balance.strategies.base import Assignment, StepSamples, StepShape, Strategy, slots_to_ranks
from bert_fast.config import BalanceConfig
from bert_fast.integers import ceil_div


class Packed(Strategy):
    """Every micro-batch has the same number of rows and so of tokens; what is balanced is attention."""

    has_equal_counts = False
    layout = "rows"

    def __init__(self, config: BalanceConfig, shape: StepShape, lengths: np.ndarray, seed: int) -> None:
        super().__init__(config, shape, lengths, seed)
        self._num_rows = config.num_packs or 0

    def prepare(self, first_steps: Iterable[StepSamples]) -> None:
        """Find how many rows of a micro-batch hold the first steps and, most likely, all."""
        if self.config.num_packs is None:
            needed = [self._pack(samples)[1] for samples in first_steps]
            most = max(needed) + (max(needed) - min(needed))
            self._num_rows = ceil_div(most, self.shape.num_slots)

    def assign(self, samples: StepSamples) -> Assignment:
        row_of, needed = self._pack(samples)
        num_slots = self.shape.num_slots
        num_rows = max(self._num_rows, ceil_div(needed, num_slots))
        num_all = num_slots * num_rows
        long = samples.lengths.astype(np.int64)
        gaps = self.shape.max_seq_len - np.bincount(row_of, long, num_all).astype(np.int64)
        squared = np.bincount(row_of, long**2, num_all).astype(np.int64) + gaps**2
        rows = assign.karmarkar_karp(squared, num_slots)  # [slots, rows of a micro-batch]
        rows = rows[slots_to_ranks(squared[rows].sum(axis=1), self.shape, samples.rng)]
        new_row = np.empty(num_all, np.int64)
        new_row[rows.reshape(-1)] = np.arange(num_all)
        row_of = new_row[row_of]
        places = np.argsort(row_of, kind="stable")
        row_of = row_of[places]
        starts = np.searchsorted(row_of, np.arange(0, num_all + 1, num_rows))
        return Assignment(places, starts, gaps=gaps[rows], rows=row_of % num_rows, num_rows=num_rows)

    def _pack(self, samples: StepSamples) -> tuple[np.ndarray, int]:
        """The row of every sample, and how many rows there are."""
        config, order = self.config, samples.descending()
        return pack(samples.lengths, self.shape.max_seq_len, config.max_samples_per_pack, config.pack_order, order)
