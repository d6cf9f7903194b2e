"""Samples stay where the draw puts them: the baselines."""

from __future__ import annotations

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.strategies.base import EqualCounts, StepSamples


class Random(EqualCounts):
    """A rank gets what is drawn for it."""

    def to_ranks(self, samples: StepSamples) -> np.ndarray:
        return assign.in_order(samples.costs, self.shape.num_ranks)


class PadToLongest(Random):
    """The same, and every sample is computed as if it were as long as the longest of its micro-batch."""

    layout = "longest"

    def to_micro_batches(self, ranks: np.ndarray, costs: np.ndarray) -> np.ndarray:
        return ranks

    def computed_lengths(self, lengths: np.ndarray) -> np.ndarray:
        size = self.shape.micro_batch_size
        return np.repeat(lengths.astype(np.int64).reshape(-1, size).max(axis=1), size)
