"""The plan of any step from the length table, the seed and the step number alone, without communication."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bert_fast.balance import assign
from bert_fast.balance.cost import CostModel, imbalance
from bert_fast.balance.permutation import EpochOrder
from bert_fast.config import BalanceConfig
from bert_fast.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The samples of one step.

    ids:       int64 [ranks, accumulation, local batch], indices into the store
    costs:     float64 [ranks], what each rank's samples cost in the planner's unit
    imbalance: max over mean of `costs`
    """

    step: int
    ids: np.ndarray
    costs: np.ndarray
    imbalance: float


class Planner:
    """Plans steps. Two planners with the same arguments give the same plans, at any step, in O(global batch)."""

    def __init__(
        self, lengths: np.ndarray, config: BalanceConfig, cost: CostModel, *,
        world_size: int, accumulation: int, local_batch: int, node_size: int, max_seq_len: int, seed: int,
    ) -> None:  # fmt: skip
        """
        Args:
            lengths: uint16 [N], tokens of every sample of the store; may be memory-mapped.
            seed: of the order of samples and of the dealing.

        Raises:
            UserError: fewer samples than one global batch, or strata too small for it.
        """
        self._lengths, self._cost, self._config, self._seed = lengths, cost, config, seed
        self._world, self._accumulation, self._local, self._node = world_size, accumulation, local_batch, node_size
        self._per_rank = accumulation * local_batch
        self.global_batch = world_size * self._per_rank
        if len(lengths) < self.global_batch:
            raise UserError(
                f"batch.global_batch={self.global_batch} is more than the {len(lengths)} samples of the training store; "
                "prepare more data or lower the batch"
            )
        self._draw = self._stratified_draw if config.strategy == "stratified_presort" else self._uniform_draw
        if config.strategy == "stratified_presort":
            self._strata = Strata(lengths, config.num_strata, self._per_rank, max_seq_len, seed, world_size)
        else:
            self._order = EpochOrder(len(lengths), (seed, 0))

    def plan(self, step: int) -> Plan:
        """The plan of step number `step`, from 0."""
        ids = self._draw(step)
        costs = self._cost(self._lengths[ids])
        rng = np.random.default_rng([self._seed, 1, step])
        if self._config.strategy == "balanced":
            ranks = assign.karmarkar_karp(costs, self._world)
        elif self._config.strategy == "stratified_presort":
            ranks = assign.node_snake(costs, self._world, self._node)
        else:
            ranks = assign.in_order(costs, self._world)
        if self._config.strategy == "balanced":  # no rank always gets the longest sample
            ranks = ranks[rng.permutation(self._world)]
        elif self._config.strategy == "stratified_presort":
            ranks = self._shuffle_inside_nodes(ranks, rng)
        if self._accumulation > 1:
            split = [row[assign.micro_batches(costs[row], self._accumulation)] for row in ranks]
            grid = np.stack(split)
        else:
            grid = ranks[:, None, :]
        rank_costs = costs[ranks].sum(axis=1)
        return Plan(step, ids[grid], rank_costs, imbalance(rank_costs))

    def _uniform_draw(self, step: int) -> np.ndarray:
        return self._order.take(step * self.global_batch, self.global_batch)

    def _stratified_draw(self, step: int) -> np.ndarray:
        return self._strata.draw(step)

    def _shuffle_inside_nodes(self, ranks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        nodes = ranks.reshape(self._world // self._node, self._node, -1)
        return np.concatenate([node[rng.permutation(self._node)] for node in nodes])


class Strata:
    """The paper's draw (arXiv 2402.02447): each rank takes a fixed count from each length stratum."""

    def __init__(
        self, lengths: np.ndarray, num_strata: int, per_rank: int, max_seq_len: int, seed: int, world_size: int
    ) -> None:
        self._world = world_size
        stratum_of = np.minimum((lengths.astype(np.int64) - 1) * num_strata // max_seq_len, num_strata - 1)
        sizes = np.bincount(stratum_of, minlength=num_strata)
        self.counts = largest_remainder(sizes / sizes.sum(), per_rank)
        by_stratum = np.argsort(stratum_of, kind="stable")
        self._members = np.split(by_stratum, np.cumsum(sizes)[:-1])
        for stratum, (size, count) in enumerate(zip(sizes, self.counts, strict=True)):
            if size < count * world_size:
                raise UserError(
                    f"balance.strategy=stratified_presort: stratum {stratum} of {num_strata} has {size} samples and a "
                    f"step takes {count * world_size} of them; lower balance.num_strata or the batch"
                )
        self._orders = [
            EpochOrder(int(size), (seed, 2, stratum)) if count else None
            for stratum, (size, count) in enumerate(zip(sizes, self.counts, strict=True))
        ]

    def draw(self, step: int) -> np.ndarray:
        """Sample ids of a step, rank by rank, int64."""
        columns = []
        for members, order, count in zip(self._members, self._orders, self.counts, strict=True):
            if order is not None:
                number = int(count) * self._world
                columns.append(members[order.take(step * number, number)].reshape(self._world, -1))
        return np.concatenate(columns, axis=1).reshape(-1)


def largest_remainder(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that add up to `total`, as near to `shares` (which add up to 1) as largest remainders bring them."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(-(exact - counts), kind="stable")[:missing]] += 1
    return counts
