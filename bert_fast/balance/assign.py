"""Strategies that deal the samples of one step to ranks: pure functions on NumPy arrays.

Each takes the costs of the step's samples and returns an int64 array [ranks, samples per rank] of indices into them, a
permutation: every sample exactly once, the same number on every rank.
"""

from __future__ import annotations

import heapq

import numpy as np


def in_order(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """Samples as they were drawn (the draw is random already)."""
    return np.arange(len(costs)).reshape(num_ranks, -1)


def snake(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """Sort by cost, longest first, and deal over the ranks, every second row in reverse."""
    rows = np.argsort(-costs, kind="stable").reshape(-1, num_ranks)
    rows[1::2] = rows[1::2, ::-1]
    return np.ascontiguousarray(rows.T)


def karmarkar_karp(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """Largest differencing with equal counts (Karmarkar and Karp 1982; equal-size form of Michiels et al. 2003).

    The sorted samples are cut into rows of one sample a rank. A row is a partial solution, its spread the difference
    between its dearest and cheapest rank. The two rows of largest spread are merged, dearest on cheapest, until one is
    left. O(n log n) with every merge vectorised over ranks.
    """
    order = np.argsort(-costs, kind="stable").reshape(-1, num_ranks)
    heap: list[tuple[float, int, np.ndarray, np.ndarray]] = []
    for number, row in enumerate(order):
        sums = costs[row]
        heapq.heappush(heap, (float(sums[-1] - sums[0]), number, sums, row[:, None]))
    number = len(order)
    while len(heap) > 1:
        _, _, sums_a, members_a = heapq.heappop(heap)
        _, _, sums_b, members_b = heapq.heappop(heap)
        sums = sums_a + sums_b[::-1]
        members = np.concatenate([members_a, members_b[::-1]], axis=1)
        falling = np.argsort(-sums, kind="stable")
        sums = sums[falling]
        heapq.heappush(heap, (float(sums[-1] - sums[0]), number, sums, members[falling]))
        number += 1
    return heap[0][3]


def node_snake(costs: np.ndarray, num_ranks: int, node_size: int) -> np.ndarray:
    """The paper's local presorting: `costs` come rank by rank; each node sorts its ranks' samples and snake-deals them.

    Samples never leave their node.
    """
    per_rank = len(costs) // num_ranks
    nodes = np.arange(len(costs)).reshape(num_ranks // node_size, node_size * per_rank)
    return np.concatenate([node[snake(costs[node], node_size)] for node in nodes])


def micro_batches(costs: np.ndarray, accumulation: int) -> np.ndarray:
    """Split one rank's samples into micro-batches of equal count: int64 [accumulation, samples of a micro-batch]."""
    return snake(costs, accumulation)
