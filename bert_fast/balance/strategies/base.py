"""What a strategy is given, what it returns, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.permutation import EpochOrder
from bert_fast.config import BalanceConfig


@dataclass(frozen=True)
class StepShape:
    """How a step is divided."""

    num_ranks: int
    num_micro_batches: int  # of a rank
    micro_batch_size: int  # samples, on average where a strategy leaves counts free
    ranks_per_node: int
    max_seq_len: int

    @property
    def num_slots(self) -> int:
        """Micro-batches of all ranks."""
        return self.num_ranks * self.num_micro_batches

    @property
    def samples_per_rank(self) -> int:
        return self.num_micro_batches * self.micro_batch_size

    @property
    def global_batch_size(self) -> int:
        return self.num_ranks * self.samples_per_rank


@dataclass(frozen=True)
class StepSamples:
    """The samples of a step in the order in which they were drawn.

    lengths: uint16 [N]; costs: int64 [N], whole numbers, larger for longer samples; rng: for the labels of ranks, so that no
    rank always gets the costliest samples.
    """

    step: int
    lengths: np.ndarray
    costs: np.ndarray
    rng: np.random.Generator

    def descending(self) -> np.ndarray:
        """Indices of the samples, longest and so costliest first, equals in their order; int64 [N]."""
        # 16-bit keys are sorted by radix
        return np.argsort(np.uint16(65535) - self.lengths.astype(np.uint16, copy=False), kind="stable")


@dataclass(frozen=True)
class Assignment:
    """Who gets which sample of a step.

    samples:          int64 [N], indices into the step's samples, rank by rank and micro-batch by micro-batch
    starts:           int64 [slots + 1], where micro-batches start in `samples`
    computed_lengths: int64 [N], tokens that are computed for each of `samples`, where that is more than its own
    gaps:             int64 [slots, rows of a micro-batch], tokens of padding at the end of each row, if there are rows
    rows, num_rows:   the row of each of `samples` in its micro-batch (int64 [N]), and rows of a micro-batch, likewise
    capped:           whether a token cap changed the assignment
    """

    samples: np.ndarray
    starts: np.ndarray
    computed_lengths: np.ndarray | None = None
    gaps: np.ndarray | None = None
    rows: np.ndarray | None = None
    num_rows: int = 0
    capped: bool = False


class Strategy(ABC):
    """Draws the samples of steps and assigns them. Every rank does so by itself and must find the same."""

    has_equal_counts: ClassVar[bool] = True
    """Whether every rank gets the same number of samples, as the lower bound of a plan must know."""

    layout: ClassVar[Literal["flat", "longest", "rows"]] = "flat"
    """How a micro-batch is laid out: without padding, padded to its longest sample, or in rows of `max_seq_len`."""

    cap: int | None = None
    """The most tokens of a micro-batch, if the strategy keeps such a cap."""

    def __init__(self, config: BalanceConfig, shape: StepShape, lengths: np.ndarray, seed: int) -> None:
        """
        Args:
            lengths: uint16 [N], tokens of every sample of the store; may be memory-mapped.

        Raises:
            UserError: the settings do not fit the lengths.
        """
        self.config, self.shape = config, shape
        self._order = EpochOrder(len(lengths), (seed, 0))

    def draw(self, step: int) -> np.ndarray:
        """Ids of the samples of a step, int64 [global batch]. They depend on the seed, the step and the global batch only."""
        return self._order.take(step * self.shape.global_batch_size, self.shape.global_batch_size)

    def prepare(self, first_steps: Iterable[StepSamples]) -> None:  # noqa: B027  # most have nothing to prepare
        """Look at the first steps before any is assigned.

        Raises:
            UserError: a setting does not fit them.
        """

    @abstractmethod
    def assign(self, samples: StepSamples) -> Assignment:
        """Who gets which sample.

        Raises:
            UserError: the samples cannot be assigned as the settings have it.
        """


class EqualCounts(Strategy):
    """Every rank gets the same number of samples, and each of its micro-batches, too."""

    @abstractmethod
    def to_ranks(self, samples: StepSamples) -> np.ndarray:
        """Indices of the samples of every rank, int64 [ranks, samples per rank]."""

    def to_micro_batches(self, ranks: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """The order of a rank's samples, so that its micro-batches cost about the same; shape of `ranks`."""
        if self.shape.num_micro_batches == 1:
            return ranks
        split = assign.snake_rows(costs[ranks], self.shape.num_micro_batches).reshape(len(ranks), -1)
        return np.take_along_axis(ranks, split, axis=1)

    def assign(self, samples: StepSamples) -> Assignment:
        places = self.to_micro_batches(self.to_ranks(samples), samples.costs).reshape(-1)
        starts = np.arange(0, self.shape.global_batch_size + 1, self.shape.micro_batch_size)
        return Assignment(places, starts, self.computed_lengths(samples.lengths[places]))

    def computed_lengths(self, lengths: np.ndarray) -> np.ndarray | None:
        """See `Assignment`; of samples with these lengths, micro-batch by micro-batch."""
        return None


def slots_to_ranks(sums: np.ndarray, shape: StepShape, rng: np.random.Generator) -> np.ndarray:
    """Assign micro-batches to ranks evenly by cost: int64 [slots], rank by rank, with mixed rank labels."""
    return assign.karmarkar_karp(sums, shape.num_ranks)[rng.permutation(shape.num_ranks)].reshape(-1)
