"""The plan of any step from the length table, the seed and the step number alone, without communication."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.cost import CostModel, imbalance
from bert_fast.balance.strategies.base import StepSamples, StepShape, Strategy
from bert_fast.config import BalanceConfig
from bert_fast.config.choices import STRATEGIES, find
from bert_fast.errors import UserError

_LOOK_AHEAD = 16  # steps that a strategy may look at before the first


@dataclass(frozen=True)
class Plan:
    """The samples of one step.

    Ranks are real ones; each has the micro-batches of its virtual ranks, one virtual rank after the other.

    ids:            int64 [samples], indices into the store, rank by rank and micro-batch by micro-batch
    starts:         int64 [ranks * micro-batches + 1], where micro-batches start in `ids`
    tokens:         int64 [ranks, micro-batches], tokens that a micro-batch computes, padding of the strategy included
    tokens_squared: int64 [ranks, micro-batches], the sum of squared sequence lengths likewise
    costs:          float64 [ranks], what each rank computes in the cost model's unit, padding included
    useful:         float, what the samples cost in the same unit without any padding
    imbalance:      max over mean of what ranks cost; virtual ranks count as ranks
    layout:         how micro-batches are laid out: "flat", without padding; "longest", padded to their longest sample; "rows"
    rows, num_rows: with layout "rows": the row of each sample in its micro-batch (int64 [samples]), and rows of a micro-batch
    capped:         whether a token cap changed the plan
    """

    step: int
    ids: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    tokens_squared: np.ndarray
    costs: np.ndarray
    useful: float
    imbalance: float
    layout: Literal["flat", "longest", "rows"] = "flat"
    rows: np.ndarray | None = None
    num_rows: int = 0
    capped: bool = False

    def micro_batches(self, rank: int) -> list[slice]:
        """Where a rank's micro-batches lie in `ids` and `rows`."""
        count = self.tokens.shape[1]
        bounds = self.starts[rank * count : (rank + 1) * count + 1].tolist()
        return [slice(a, b) for a, b in pairwise(bounds)]

    def of_rank(self, rank: int) -> np.ndarray:
        """All sample ids of a rank."""
        count = self.tokens.shape[1]
        return self.ids[self.starts[rank * count] : self.starts[(rank + 1) * count]]

    @functools.cached_property
    def checksum(self) -> int:
        """Of which samples are in the step and who gets them, 32 bits: ranks compare it."""
        checksum = zlib.crc32(np.array([self.step, self.num_rows]).tobytes())
        for array in (self.ids, self.starts, self.rows):
            if array is not None:
                checksum = zlib.crc32(np.ascontiguousarray(array, np.int64).data, checksum)
        return checksum

    def counts(self) -> np.ndarray:
        """Samples of each rank, int64 [ranks]."""
        return np.diff(self.starts[:: self.tokens.shape[1]])


class Planner:
    """Plans steps. Two planners with the same arguments give the same plans, at any step, in O(global batch).

    Which samples are in a step depends on the seed, the step and the global batch only, not on the number of ranks, but for
    strategies that say otherwise (`draws_by_rank` in `config.choices.STRATEGIES`).
    """

    def __init__(
        self,
        lengths: np.ndarray,
        config: BalanceConfig,
        cost: CostModel,
        *,
        world_size: int,
        gradient_accumulation_steps: int,
        micro_batch_size: int,
        node_size: int,
        max_seq_len: int,
        seed: int,
        num_steps: int | None = None,
        longest: int | None = None,
        virtual_ranks: int = 1,
        draw: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            lengths: uint16 [N], tokens of every sample of the store; may be memory-mapped. Strategies that draw by length read
                it once, the others only where a step draws from it.
            seed: of the order of samples and of which rank gets what.
            num_steps: steps of the run; a later one is refused.
            longest: the largest length, if the caller knows it; else the table is read for it.
            virtual_ranks: ranks that each of the `world_size` real ones computes. Plans are those of world_size x virtual_ranks
                ranks: real rank r has the `virtual_ranks` from r x virtual_ranks on, and a node those of its real ranks.
            draw: a function of the step that gives the ids of its samples, int64 [global batch], such as
                `balance.sources.SourceDraw.draw`; it takes the place of the strategy's own draw. Which rank gets what is
                still the strategy's. The ids must depend on the step alone.

        Raises:
            UserError: an empty table, a length above `max_seq_len`, fewer samples than one global batch, or settings that the
                strategy cannot keep; a `draw` with a strategy that draws by length and rank.
        """
        choice = STRATEGIES[config.strategy]
        if draw is not None and choice.draws_by_rank:
            raise UserError(
                f"balance.strategy={config.strategy} chooses the samples of a step itself, rank by rank, and these are drawn "
                "source by source; choose a strategy that only assigns them, such as balance.strategy=balanced"
            )
        self._draw = draw
        self._lengths, self._seed, self._num_steps = lengths, seed, num_steps
        num_ranks, ranks_per_node = world_size * virtual_ranks, node_size * virtual_ranks
        shape = StepShape(num_ranks, gradient_accumulation_steps, micro_batch_size, ranks_per_node, max_seq_len)
        self._world_size = world_size
        self._shape, self.global_batch_size = shape, shape.global_batch_size
        self._check(longest)
        self._table, self._unit = cost.table(max_seq_len)
        self._strategy: Strategy = find(STRATEGIES, config.strategy)(config, shape, lengths, seed)
        num_ahead = _LOOK_AHEAD if num_steps is None else min(_LOOK_AHEAD, num_steps)
        self._strategy.prepare(self._samples(step, self.draw(step)) for step in range(num_ahead))

    @property
    def cap(self) -> int | None:
        """The most tokens of a micro-batch, if the strategy keeps such a cap."""
        return self._strategy.cap

    def plan(self, step: int) -> Plan:
        """The plan of step number `step`, from 0.

        Raises:
            UserError: the run has no such step, or the strategy cannot keep a setting in it.
        """
        if self._num_steps is not None and not 0 <= step < self._num_steps:
            raise UserError(f"no plan for step {step}: the run has steps 0 to {self._num_steps - 1} (train.max_steps)")
        ids = self.draw(step)
        samples = self._samples(step, ids)
        assigned = self._strategy.assign(samples)
        lengths, starts = samples.lengths[assigned.samples], assigned.starts
        useful = int(samples.costs.sum()) * self._unit
        computed = lengths.astype(np.int64) if assigned.computed_lengths is None else assigned.computed_lengths
        tokens, squared, costs = (_sums(each, starts) for each in (computed, computed**2, self._table[computed]))
        if assigned.gaps is not None:
            tokens, squared, costs = (
                total + padding.sum(axis=1)
                for total, padding in zip(
                    (tokens, squared, costs), (assigned.gaps, assigned.gaps**2, self._table[assigned.gaps]), strict=True
                )
            )
        rank_costs = costs.reshape(self._shape.num_ranks, -1).sum(axis=1) * self._unit
        real_ranks = (self._world_size, -1)
        return Plan(
            step=step,
            ids=ids[assigned.samples],
            starts=starts,
            tokens=tokens.reshape(real_ranks),
            tokens_squared=squared.reshape(real_ranks),
            costs=rank_costs.reshape(real_ranks).sum(axis=1),
            useful=useful,
            imbalance=imbalance(rank_costs),
            layout=self._strategy.layout,
            rows=assigned.rows,
            num_rows=assigned.num_rows,
            capped=assigned.capped,
        )

    def draw(self, step: int) -> np.ndarray:
        """Ids of the samples of a step as they are drawn, before they are assigned, int64 [global batch]."""
        if self._draw is None:
            return self._strategy.draw(step)
        ids = self._draw(step)
        if len(ids) != self.global_batch_size:
            raise UserError(
                f"step {step}: {len(ids)} samples are drawn, and batch.global_batch_size={self.global_batch_size}; give both "
                "the same number"
            )
        return ids

    def lengths_of(self, plan: Plan) -> np.ndarray:
        """Lengths of the samples of a plan, int64 [samples]."""
        return self._lengths[plan.ids].astype(np.int64)

    def bound(self, plan: Plan) -> float:
        """The imbalance that no plan of the same samples can be below: 1, or more where samples are too coarse.

        Every rank has the same count in it, if the strategy gives it that.
        """
        costs, num_ranks = self._table[self.lengths_of(plan)], self._shape.num_ranks
        return assign.lower_bound(costs, num_ranks, self._strategy.has_equal_counts) / (costs.sum() / num_ranks)

    def _samples(self, step: int, ids: np.ndarray) -> StepSamples:
        lengths = self._lengths[ids]
        return StepSamples(step, lengths, self._table[lengths], np.random.default_rng([self._seed, 1, step]))

    def _check(self, longest: int | None) -> None:
        if not len(self._lengths):
            raise UserError("the length table is empty: the training store has no samples; prepare the data again")
        longest = int(self._lengths.max()) if longest is None else longest
        if longest > self._shape.max_seq_len:
            raise UserError(
                f"the length table holds a sample of {longest} tokens and data.max_seq_len={self._shape.max_seq_len}; raise "
                "it or prepare shorter samples"
            )
        if len(self._lengths) < self.global_batch_size:
            raise UserError(
                f"batch.global_batch_size={self.global_batch_size} is more than the {len(self._lengths)} samples of the "
                "training store; prepare more data or lower the batch"
            )


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of `values` between neighbouring `starts`; whole numbers, so exact."""
    running = np.concatenate([[0], np.cumsum(values)])
    return running[starts[1:]] - running[starts[:-1]]
