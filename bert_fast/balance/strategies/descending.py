"""Strategies with equal counts that assign all samples of the step, costliest first."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.strategies.base import EqualCounts, StepSamples


class Descending(EqualCounts):
    """Assigns the samples in descending order of cost; which rank is which is drawn anew in every step."""

    def to_ranks(self, samples: StepSamples) -> np.ndarray:
        num_ranks = self.shape.num_ranks
        return self.divide(samples.costs, samples.descending())[samples.rng.permutation(num_ranks)]

    @abstractmethod
    def divide(self, costs: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Indices of `costs` in as many equal parts as there are ranks, int64 [ranks, samples per rank]."""


class Exchange(Descending):
    """One sample per rank, round after round (NVIDIA's exchange padding, as a plan)."""

    def divide(self, costs: np.ndarray, order: np.ndarray) -> np.ndarray:
        return assign.round_robin(costs, self.shape.num_ranks, order)


class ExchangeSnake(Descending):
    """The same with every second round in reverse."""

    def divide(self, costs: np.ndarray, order: np.ndarray) -> np.ndarray:
        return assign.snake(costs, self.shape.num_ranks, order)


class Balanced(Descending):
    """Karmarkar-Karp with equal counts, then refined for `balance.refine_ms`."""

    def divide(self, costs: np.ndarray, order: np.ndarray) -> np.ndarray:
        return assign.balanced(costs, self.shape.num_ranks, order, self.config.refine_ms)
