"""The plan of any step from the length table, the seed and the step number alone, without communication."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.cost import CostModel, imbalance
from bert_fast.balance.packing import pack
from bert_fast.balance.permutation import EpochOrder
from bert_fast.balance.strata import Strata
from bert_fast.config import BalanceConfig
from bert_fast.errors import UserError

_LOOK_AHEAD = 16  # steps that are packed to find out how many rows a micro-batch needs

EQUAL_COUNT_STRATEGIES = ("random", "pad_to_longest", "exchange", "exchange_snake", "stratified_presort", "balanced")


@dataclass(frozen=True)
class Plan:
    """The samples of one step.

    ids:            int64 [samples], indices into the store, rank by rank and micro-batch by micro-batch
    starts:         int64 [ranks * accumulation + 1], where micro-batches start in `ids`
    tokens:         int64 [ranks, accumulation], tokens that a micro-batch computes, padding of the strategy included
    tokens_squared: int64 [ranks, accumulation], the sum of squared sequence lengths likewise
    costs:          float64 [ranks], what each rank computes in the cost model's unit, padding included
    useful:         float, what the samples cost in the same unit without any padding
    imbalance:      max over mean of `costs`
    rows, num_rows: `packed` only: the row of each sample in its micro-batch (int64 [samples]), and rows of a micro-batch
    capped:         `balanced_free` only: whether the token cap changed the plan
    """

    step: int
    ids: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    tokens_squared: np.ndarray
    costs: np.ndarray
    useful: float
    imbalance: float
    rows: np.ndarray | None = None
    num_rows: int = 0
    capped: bool = False

    def micro_batches(self, rank: int) -> list[slice]:
        """Where a rank's micro-batches lie in `ids` and `rows`."""
        accumulation = self.tokens.shape[1]
        bounds = self.starts[rank * accumulation : (rank + 1) * accumulation + 1].tolist()
        return [slice(a, b) for a, b in pairwise(bounds)]

    def of_rank(self, rank: int) -> np.ndarray:
        """All sample ids of a rank."""
        accumulation = self.tokens.shape[1]
        return self.ids[self.starts[rank * accumulation] : self.starts[(rank + 1) * accumulation]]

    @functools.cached_property
    def checksum(self) -> int:
        """Of which samples are in the step and who gets them, 32 bits: ranks compare it."""
        found = zlib.crc32(np.array([self.step, self.num_rows]).tobytes())
        for array in (self.ids, self.starts, self.rows):
            found = found if array is None else zlib.crc32(np.ascontiguousarray(array, np.int64), found)
        return found

    def counts(self) -> np.ndarray:
        """Samples of each rank, int64 [ranks]."""
        return np.diff(self.starts[:: self.tokens.shape[1]])


class Planner:
    """Plans steps. Two planners with the same arguments give the same plans, at any step, in O(global batch).

    Which samples are in a step depends on the seed, the step and the global batch only (under `stratified_presort` on the
    batch of a rank, too), not on the number of ranks.
    """

    def __init__(
        self, lengths: np.ndarray, config: BalanceConfig, cost: CostModel, *,
        world_size: int, gradient_accumulation_steps: int, micro_batch_size: int, node_size: int, max_seq_len: int, seed: int,
        num_steps: int | None = None, longest: int | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            lengths: uint16 [N], tokens of every sample of the store; may be memory-mapped. `stratified_presort` reads it
                once, the other strategies only where a step draws from it.
            seed: of the order of samples and of the dealing.
            num_steps: steps of the run; a later one is refused.
            longest: the largest length, if the caller knows it; else the table is read for it.

        Raises:
            UserError: an empty table, a length above `max_seq_len`, fewer samples than one global batch, strata too small
                for it, or a token cap that a step cannot keep.
        """
        self._lengths, self._config, self._seed, self._num_steps = lengths, config, seed, num_steps
        self._world, self._accumulation, self._local, self._node = (
            world_size,
            gradient_accumulation_steps,
            micro_batch_size,
            node_size,
        )
        self._max_seq_len = max_seq_len
        self.global_batch_size = world_size * gradient_accumulation_steps * micro_batch_size
        self.cap = config.max_tokens or micro_batch_size * max_seq_len
        self._check(longest)
        self._table, self._unit = cost.table(max_seq_len)
        if config.strategy == "stratified_presort":
            bounds = _bounds(config, max_seq_len)
            counts = None if config.strata_counts is None else np.array(config.strata_counts)
            self._strata = Strata(
                lengths, bounds, counts, gradient_accumulation_steps * micro_batch_size, world_size, seed
            )
        else:
            self._order = EpochOrder(len(lengths), (seed, 0))
        self._num_rows = self._rows_needed() if config.strategy == "packed" else 0
        if config.strategy == "balanced_free":
            self._check_cap()

    def plan(self, step: int) -> Plan:
        """The plan of step number `step`, from 0.

        Raises:
            UserError: the run has no such step.
        """
        if self._num_steps is not None and not 0 <= step < self._num_steps:
            raise UserError(f"no plan for step {step}: the run has steps 0 to {self._num_steps - 1} (train.max_steps)")
        ids = self.draw(step)
        lengths = self._lengths[ids]
        labels = np.random.default_rng([self._seed, 1, step])  # no rank always gets the costliest samples
        if self._config.strategy == "packed":
            return self._packed(step, ids, lengths, labels)
        if self._config.strategy == "balanced_free":
            return self._free(step, ids, lengths, labels)
        return self._equal(step, ids, lengths, labels)

    def lengths_of(self, plan: Plan) -> np.ndarray:
        """Lengths of the samples of a plan, int64 [samples]."""
        return self._lengths[plan.ids].astype(np.int64)

    def bound(self, plan: Plan) -> float:
        """The imbalance that no plan of the same samples can be below: 1, or more where samples are too coarse.

        Every rank the same count, but for `balanced_free` and `packed`, whose counts are free.
        """
        costs = self._table[self.lengths_of(plan)]
        equal = self._config.strategy in EQUAL_COUNT_STRATEGIES
        return assign.lower_bound(costs, self._world, equal) / (costs.sum() / self._world)

    # ---- strategies -------------------------------------------------------------------------------------------------

    def _equal(self, step: int, ids: np.ndarray, lengths: np.ndarray, labels: np.random.Generator) -> Plan:
        """Every rank the same count."""
        costs, world, strategy = self._table[lengths], self._world, self._config.strategy
        if strategy == "stratified_presort":
            ranks = assign.node_snake(costs, world, self._node)
            nodes = ranks.reshape(world // self._node, self._node, -1)
            mixed = labels.permuted(np.tile(np.arange(self._node), (len(nodes), 1)), axis=1)  # ranks stay on their node
            ranks = np.take_along_axis(nodes, mixed[:, :, None], axis=1).reshape(world, -1)
        elif strategy in ("random", "pad_to_longest"):
            ranks = assign.in_order(costs, world)
        else:
            order = _longest_first(lengths)
            if strategy == "balanced":
                ranks = assign.balanced(costs, world, order, self._config.refine_ms)
            else:
                ranks = {"exchange": assign.round_robin, "exchange_snake": assign.snake}[strategy](costs, world, order)
            ranks = ranks[labels.permutation(world)]
        if self._accumulation > 1 and strategy != "pad_to_longest":
            split = assign.snake_rows(costs[ranks], self._accumulation).reshape(world, -1)
            ranks = np.take_along_axis(ranks, split, axis=1)
        place = ranks.reshape(-1)
        starts = np.arange(0, self.global_batch_size + 1, self._local)
        return self._finish(step, ids[place], starts, lengths[place])

    def _free(self, step: int, ids: np.ndarray, lengths: np.ndarray, labels: np.random.Generator) -> Plan:
        """Any count: samples are dealt to the micro-batches of all ranks, and those to ranks."""
        costs, slots = self._table[lengths], self._world * self._accumulation
        tokens, order = lengths.astype(np.int64), _longest_first(lengths)
        try:
            budget_ms = self._config.refine_ms
            grid, capped = assign.balanced_free(costs, slots, order, tokens=tokens, cap=self.cap, budget_ms=budget_ms)
        except ValueError as error:
            if self.cap < self._local * self._max_seq_len:
                raise UserError(f"step {step}: {error}; raise balance.max_tokens or lower the batch") from None
            grid, capped = assign.balanced(costs, slots, order, self._config.refine_ms), True  # keeps this cap always
        sums = np.append(costs, 0)[grid].sum(axis=1)
        grid = grid[self._slots_to_ranks(sums, labels)]
        taken = grid != assign.EMPTY
        place = grid[taken]
        starts = np.concatenate([[0], np.cumsum(taken.sum(axis=1))])
        return self._finish(step, ids[place], starts, lengths[place], capped=capped)

    def _packed(self, step: int, ids: np.ndarray, lengths: np.ndarray, labels: np.random.Generator) -> Plan:
        """Rows, the same number in every micro-batch. All have the same tokens, so attention is what is balanced."""
        row_of, needed = self._pack(lengths)
        slots = self._world * self._accumulation
        num_rows = max(self._num_rows, -(-needed // slots))
        long = lengths.astype(np.int64)
        gaps = self._max_seq_len - np.bincount(row_of, long, slots * num_rows).astype(np.int64)
        squared = np.bincount(row_of, long**2, slots * num_rows).astype(np.int64) + gaps**2
        rows = assign.karmarkar_karp(squared, slots)  # [slots, rows of a micro-batch]
        rows = rows[self._slots_to_ranks(squared[rows].sum(axis=1), labels)]
        new_row = np.empty(slots * num_rows, np.int64)
        new_row[rows.reshape(-1)] = np.arange(slots * num_rows)
        row_of = new_row[row_of]
        place = np.argsort(row_of, kind="stable")
        row_of = row_of[place]
        starts = np.searchsorted(row_of, np.arange(0, slots * num_rows + 1, num_rows))
        return self._finish(
            step, ids[place], starts, lengths[place], rows=row_of % num_rows, num_rows=num_rows, gaps=gaps[rows]
        )

    def _pack(self, lengths: np.ndarray) -> tuple[np.ndarray, int]:
        config = self._config
        return pack(lengths, self._max_seq_len, config.max_samples_per_pack, config.pack_order, _longest_first(lengths))

    def _slots_to_ranks(self, sums: np.ndarray, labels: np.random.Generator) -> np.ndarray:
        """Deal micro-batches to ranks evenly: int64 [ranks * accumulation], rank by rank, with mixed rank labels."""
        return assign.karmarkar_karp(sums, self._world)[labels.permutation(self._world)].reshape(-1)

    def _finish(
        self, step: int, ids: np.ndarray, starts: np.ndarray, lengths: np.ndarray, *,
        rows: np.ndarray | None = None, num_rows: int = 0, gaps: np.ndarray | None = None, capped: bool = False,
    ) -> Plan:  # fmt: skip
        """Sums by micro-batch and rank, with the padding that the strategy computes."""
        shape = (self._world, self._accumulation)
        long = lengths.astype(np.int64)
        tokens, squared, costs = (_sums(each, starts) for each in (long, long**2, self._table[lengths]))
        useful = int(costs.sum()) * self._unit
        if self._config.strategy == "pad_to_longest":
            longest = long.reshape(-1, self._local).max(axis=1)
            tokens, squared, costs = (self._local * each for each in (longest, longest**2, self._table[longest]))
        elif gaps is not None:
            tokens, squared, costs = (
                total + padding.sum(axis=1)
                for total, padding in ((tokens, gaps), (squared, gaps**2), (costs, self._table[gaps]))
            )
        rank_costs = costs.reshape(shape).sum(axis=1) * self._unit
        return Plan(
            step, ids, starts, tokens.reshape(shape), squared.reshape(shape), rank_costs, useful, imbalance(rank_costs),
            rows, num_rows, capped,
        )  # fmt: skip

    # ---- what a step draws, and checks ------------------------------------------------------------------------------

    def draw(self, step: int) -> np.ndarray:
        """Ids of the samples of a step as they are drawn, before dealing, int64 [global batch]."""
        if self._config.strategy == "stratified_presort":
            return self._strata.draw(step)
        return self._order.take(step * self.global_batch_size, self.global_batch_size)

    def _check(self, longest: int | None) -> None:
        if not len(self._lengths):
            raise UserError("the length table is empty: the training store has no samples; prepare the data again")
        longest = int(self._lengths.max()) if longest is None else longest
        if longest > self._max_seq_len:
            raise UserError(
                f"the length table holds a sample of {longest} tokens and data.max_seq_len={self._max_seq_len}; raise it "
                "or prepare shorter samples"
            )
        if len(self._lengths) < self.global_batch_size:
            raise UserError(
                f"batch.global_batch_size={self.global_batch_size} is more than the {len(self._lengths)} samples of the training "
                "store; prepare more data or lower the batch"
            )

    def _check_cap(self) -> None:
        """Refuse a token cap that the first steps do not keep with room for longer ones.

        The default, the tokens of a full equal-count micro-batch, can always be kept.
        """
        if self.cap >= self._local * self._max_seq_len:
            return
        slots = self._world * self._accumulation
        totals = [int(self._lengths[self.draw(step)].sum(dtype=np.int64)) for step in range(self._steps_ahead())]
        expected = float(np.mean(totals)) / slots
        most = expected + 4 * float(np.std(totals)) / slots
        if most > self.cap:
            raise UserError(
                f"balance.max_tokens={self.cap} is too few: a micro-batch has {expected:.0f} tokens on average and up to "
                f"{most:.0f} in some steps; set balance.max_tokens to at least {int(1.1 * most) + 1} or lower the batch"
            )
        for step in range(self._steps_ahead()):
            self.plan(step)

    def _rows_needed(self) -> int:
        """Rows of a micro-batch that hold the first steps and, most likely, all."""
        if self._config.num_packs is not None:
            return self._config.num_packs
        needed = [self._pack(self._lengths[self.draw(step)])[1] for step in range(self._steps_ahead())]
        most = max(needed) + (max(needed) - min(needed))
        return -(-most // (self._world * self._accumulation))

    def _steps_ahead(self) -> int:
        return _LOOK_AHEAD if self._num_steps is None else min(_LOOK_AHEAD, self._num_steps)


def _bounds(config: BalanceConfig, max_seq_len: int) -> np.ndarray:
    """Upper length bounds of the strata."""
    if config.strata is not None:
        return np.array(config.strata)
    return np.arange(1, config.num_strata + 1) * max_seq_len // config.num_strata


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """Indices by falling length, and so by falling cost; 16-bit keys are sorted by radix."""
    return np.argsort(np.uint16(65535) - lengths.astype(np.uint16, copy=False), kind="stable")


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of `values` between neighbouring `starts`; whole numbers, so exact."""
    running = np.concatenate([[0], np.cumsum(values)])
    return running[starts[1:]] - running[starts[:-1]]
