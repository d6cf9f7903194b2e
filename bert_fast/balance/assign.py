"""Algorithms that assign the samples of one step to ranks: pure functions on NumPy arrays.

Those with equal counts take the costs of the step's samples (any numbers, [N]) and return int64 [ranks, N / ranks]: indices
into them, every sample exactly once. Those with free counts return int64 [slots, width] where -1 marks an empty place.

Every rank computes the assignment for itself, and all must find the same one, on any processor. So the planner hands over whole
numbers as costs (their sums do not depend on the order of adding), and all sorts are stable.
"""

from __future__ import annotations

import heapq

import numpy as np

from bert_fast.balance.packing import pack
from bert_fast.integers import ceil_div

EMPTY = -1
REFINE_MS = 20.0  # the default budget of `refine`
# What refinement costs, measured on a core of an EPYC (scripts/benchmarks/balance/imbalance.py --budget): pairs of places that
# it looks at in a millisecond; the fixed cost of a sweep, and that of a slot in it, as so many pairs.
_PAIRS_PER_MS, _PAIRS_PER_SWEEP, _PAIRS_PER_SLOT = 500_000, 50_000, 25
_PARTNERS = 2  # cheap slots that a costly one is compared with in a sweep, or as many as make up for its fixed cost
_PATIENCE = 12  # sweeps without a swap, each with other partners, after which there is none
_WORTH = 2e-5  # of the mean that a millisecond must take from the costliest slot: 1 us in a step of 50 ms


def descending(costs: np.ndarray) -> np.ndarray:
    """Indices of `costs`, costliest first, equals in their order; int64 [N]."""
    return np.argsort(-costs, kind="stable")


def in_order(costs: np.ndarray, num_ranks: int) -> np.ndarray:
    """Samples as they were drawn (the draw is random already)."""
    return np.arange(len(costs)).reshape(num_ranks, -1)


def round_robin(costs: np.ndarray, num_ranks: int, order: np.ndarray | None = None) -> np.ndarray:
    """Sort all samples, costliest first, and assign one per rank, round after round (NVIDIA's exchange padding, as a plan).

    The first rank gets the costliest sample of every round.
    """
    order = descending(costs) if order is None else order
    return np.ascontiguousarray(order.reshape(-1, num_ranks).T)


def snake(costs: np.ndarray, num_ranks: int, order: np.ndarray | None = None) -> np.ndarray:
    """Sort by cost, costliest first, and assign over the ranks, every second row in reverse."""
    order = descending(costs) if order is None else order
    rows = order.reshape(-1, num_ranks).copy()
    rows[1::2] = rows[1::2, ::-1]
    return np.ascontiguousarray(rows.T)


def snake_rows(costs: np.ndarray, parts: int) -> np.ndarray:
    """`snake` of every row of `costs` [rows, n] over `parts`: indices into the row, int64 [rows, parts, n / parts]."""
    order = np.argsort(-costs, axis=1, kind="stable").reshape(len(costs), -1, parts)
    order[:, 1::2] = order[:, 1::2, ::-1]
    return order.transpose(0, 2, 1)


def node_snake(costs: np.ndarray, num_ranks: int, node_size: int) -> np.ndarray:
    """The paper's local presorting: `costs` come rank by rank; each node sorts its ranks' samples and assigns them in a
    snake.

    Samples never leave their node.
    """
    by_node = costs.reshape(num_ranks // node_size, -1)
    first = np.arange(len(by_node))[:, None, None] * by_node.shape[1]
    return (snake_rows(by_node, node_size) + first).reshape(num_ranks, -1)


def karmarkar_karp(costs: np.ndarray, num_ranks: int, order: np.ndarray | None = None) -> np.ndarray:
    """Largest differencing with equal counts (Karmarkar and Karp 1982; equal-size form of Michiels et al. 2003).

    The sorted samples are cut into rows of one sample per rank. A row is a partial solution, its spread the difference
    between its costliest and cheapest rank. The two rows of largest spread are merged, costliest on cheapest, until one is
    left. O(n log n) with every merge vectorised over ranks; exact for two samples per rank.
    """
    rows = (descending(costs) if order is None else order).reshape(-1, num_ranks)
    heap: list[tuple[float, int, np.ndarray, np.ndarray]] = []
    for number, row in enumerate(rows):
        sums = costs[row]
        heapq.heappush(heap, (sums[-1] - sums[0], number, sums, row[:, None]))
    number = len(rows)
    while len(heap) > 1:
        _, _, sums_a, members_a = heapq.heappop(heap)
        _, _, sums_b, members_b = heapq.heappop(heap)
        sums = sums_a + sums_b[::-1]
        members = np.concatenate([members_a, members_b[::-1]], axis=1)
        by_sum = descending(sums)
        sums = sums[by_sum]
        heapq.heappush(heap, (sums[-1] - sums[0], number, sums, members[by_sum]))
        number += 1
    return heap[0][3]


def longest_first(costs: np.ndarray, num_slots: int, order: np.ndarray | None = None) -> np.ndarray:
    """Greedy with free counts (Graham 1969, LPT): the costliest sample left goes to the slot with the least cost so far.

    Vectorised: as many samples at once as go to different slots in the sequential algorithm, too, whose result this is.

    Returns:
        int64 [N], the slot of every sample.
    """
    order = descending(costs) if order is None else order
    sums = np.zeros(num_slots, costs.dtype)
    slot_of = np.empty(len(costs), np.int64)
    start = 0
    while start < len(order):
        by_sum = np.argsort(sums, kind="stable")[: len(order) - start]
        items = order[start : start + len(by_sum)]
        # Slot k of this round is the least loaded until a slot that was served earlier in the round is again.
        least_served = np.minimum.accumulate(sums[by_sum] + costs[items])
        again = np.flatnonzero(sums[by_sum[1:]] > least_served[:-1])
        count = int(again[0]) + 1 if len(again) else len(by_sum)
        slot_of[items[:count]] = by_sum[:count]
        sums[by_sum[:count]] += costs[items[:count]]
        start += count
    return slot_of


def grid_of(slot_of: np.ndarray, num_slots: int, spare: int = 0) -> np.ndarray:
    """Samples by slot, int64 [slots, most samples of a slot + `spare`], filled up with EMPTY."""
    counts = np.bincount(slot_of, minlength=num_slots)
    by_slot = np.argsort(slot_of, kind="stable")
    places = np.arange(len(slot_of)) - np.repeat(np.cumsum(counts) - counts, counts)
    grid = np.full((num_slots, int(counts.max()) + spare), EMPTY)
    grid[slot_of[by_slot], places] = by_slot
    return grid


def refine(
    costs: np.ndarray,
    grid: np.ndarray,
    budget_ms: float = REFINE_MS,
    *,
    weights: np.ndarray | None = None,
    cap: int | None = None,
) -> np.ndarray:
    """Lower the costliest slots by swapping one place with one of a cheap slot, many slots at a time, until it no longer pays.

    A swap with an EMPTY place moves a sample. Slots keep their counts where the grid has no EMPTY places. It ends at the
    bound (the mean, or the costliest sample), where no swap is left, where a tenth of the budget has lowered the costliest slot
    by less than `_WORTH` per millisecond, or with the budget. Milliseconds are not measured but counted, as steps of known
    cost: every rank stops at the same swap.

    Args:
        grid: int64 [slots, width], not changed.
        budget_ms: milliseconds of one core for 16,384 samples or fewer, in proportion for more.
        weights, cap: swaps that would bring the `weights` (tokens) of a slot above `cap` are not made.

    Returns:
        The new grid.
    """
    grid = grid.copy()
    num_slots, width = grid.shape
    half, fewest = num_slots // 2, min(_PARTNERS, num_slots // 2)
    values = _with_empty(costs)[grid]
    sums = values.sum(axis=1)
    mean = sums.sum() / num_slots
    floor = max(mean, costs.max())
    loads = None
    # Sums only fall, so where even the cheapest tokens cannot fill a slot up to the cap there is nothing to watch.
    if weights is not None and cap is not None and sums.max() / (costs / weights).min() > cap:
        loads = _with_empty(weights)[grid]
    budget = budget_ms * _PAIRS_PER_MS * max(1.0, len(costs) / 16_384)
    work, check, last, shift, idle = 0.0, budget / 10, (0.0, sums.max(), num_slots), 0, 0
    while half and work < budget and idle < _PATIENCE and (top := sums.max()) > floor:
        ascending = np.argsort(sums, kind="stable")
        level = (top + floor) / 2
        above = num_slots - int(np.searchsorted(sums[ascending], level, side="right"))
        if work >= check:
            worth = _WORTH * mean * (work - last[0]) / _PAIRS_PER_MS
            # Many slots may cost as much as the costliest: then fewer of them are progress, if there is enough to gain
            if last[1] - top < worth and (above > 0.9 * last[2] or level - floor < 4 * worth):
                break
            check, last = work + budget / 10, (work, top, above)
        above = min(above, max(1, half // fewest), max(1, int(budget / 16) // (fewest * width**2)))
        partners = min(half // above, max(fewest, _PAIRS_PER_SWEEP // (above * width**2)))
        costly = ascending[::-1][:above]
        cheap = ascending[(np.arange(above * partners) + shift) % half].reshape(above, partners)
        shift += max(1, int(half * 0.618))
        work += _PAIRS_PER_SWEEP + _PAIRS_PER_SLOT * num_slots + above * partners * width**2
        # After moving d from costly to cheap, the costlier of the two has half of (both sums + |difference - 2 d|).
        difference = sums[costly][:, None] - sums[cheap]
        left = np.abs(
            (difference[:, :, None] - 2 * values[costly][:, None, :])[:, :, :, None] + 2 * values[cheap][:, :, None, :]
        )
        left += (sums[costly][:, None] + sums[cheap])[:, :, None, None]
        if loads is not None:
            moved = (
                loads[costly][:, None, :, None] - loads[cheap][:, :, None, :]
            )  # weight from the costly to the cheap slot
            over = (loads[cheap].sum(axis=2)[:, :, None, None] + moved > cap) | (
                loads[costly].sum(axis=1)[:, None, None, None] - moved > cap
            )
            left[over] = 2 * top
        left = left.reshape(above, -1)
        best = left.argmin(axis=1)
        gains = np.flatnonzero(left[np.arange(above), best] < 2 * sums[costly])
        idle = 0 if len(gains) else idle + 1
        partner, place = np.divmod(best[gains], width**2)
        a, b = np.divmod(place, width)
        x, y = costly[gains], cheap[gains, partner]
        for table in (grid, values) if loads is None else (grid, values, loads):
            table[x, a], table[y, b] = table[y, b], table[x, a].copy()
        given = values[y, b] - values[x, a]
        sums[x] -= given
        sums[y] += given
    return grid


def balanced(
    costs: np.ndarray, num_ranks: int, order: np.ndarray | None = None, budget_ms: float = REFINE_MS
) -> np.ndarray:
    """Karmarkar-Karp, then `refine`, but for two samples per rank: there it is exact."""
    grid = karmarkar_karp(costs, num_ranks, order)
    return refine(costs, grid, budget_ms) if grid.shape[1] > 2 else grid


def lower_bound(costs: np.ndarray, num_ranks: int, equal_counts: bool = True) -> float:
    """What the costliest rank costs at least, however the samples are assigned.

    It is the mean, or the costliest sample, or, of the (k - 1) ranks + 1 costliest samples, k that one rank must have, the
    cheapest such, with the cheapest others to fill up an equal count.
    """
    mean, costliest_first = costs.sum() / num_ranks, np.sort(costs)[::-1]
    per_rank = len(costs) // num_ranks if equal_counts else ceil_div(len(costs), num_ranks)
    running = np.concatenate([[0], np.cumsum(costliest_first)])
    cheapest = np.concatenate([[0], np.cumsum(costliest_first[::-1])])
    counts = np.arange(1, per_rank + 1)
    ends = (counts - 1) * num_ranks + 1
    bounds = running[ends] - running[ends - counts]
    if equal_counts:
        bounds = bounds + cheapest[per_rank - counts]
        if per_rank == 2:  # the costliest samples lie apart, each with one at least as costly as the next cheapest
            bounds = np.append(bounds, costliest_first[:num_ranks] + costliest_first[::-1][:num_ranks])
    return float(max(mean, bounds.max()))


def balanced_free(
    costs: np.ndarray,
    num_slots: int,
    order: np.ndarray | None = None,
    *,
    tokens: np.ndarray,
    cap: int,
    budget_ms: float = REFINE_MS,
) -> tuple[np.ndarray, bool]:
    """Any number of samples per slot (at least one, where there are enough).

    The better of LPT and Karmarkar-Karp (with many samples per slot, equal counts are no hindrance), the token cap, `refine`.

    Args:
        tokens: int64 [N], lengths. No slot gets more than `cap` of them.

    Returns:
        int64 [slots, width] with EMPTY places, and whether the cap changed the assignment.

    Raises:
        ValueError: the samples do not fit under the cap.
    """
    slot_of = longest_first(costs, num_slots, order)
    if len(costs) % num_slots == 0:
        equal = karmarkar_karp(costs, num_slots, order)
        if costs[equal].sum(axis=1).max() < np.bincount(slot_of, costs, num_slots).max():
            slot_of[equal] = np.arange(num_slots)[:, None]
    loads = np.bincount(slot_of, tokens, num_slots).astype(np.int64)
    capped = bool(loads.max() > cap)
    if capped:
        slot_of = _under_cap(tokens, slot_of, loads, cap)
    return refine(costs, grid_of(slot_of, num_slots, spare=1), budget_ms, weights=tokens, cap=cap), capped


def _under_cap(tokens: np.ndarray, slot_of: np.ndarray, loads: np.ndarray, cap: int) -> np.ndarray:
    """Move samples, shortest first, from slots above the cap to the slots with most room; else assign all anew by best fit.

    Loops over the samples that are moved, which are few.
    """
    moved, loads = slot_of.copy(), loads.copy()
    for slot in np.flatnonzero(loads > cap):
        members = np.flatnonzero(moved == slot)
        for sample in members[np.argsort(tokens[members], kind="stable")]:
            if loads[slot] <= cap:
                break
            target = int(loads.argmin())
            if loads[target] + tokens[sample] > cap:
                return _best_fit(tokens, len(loads), cap)
            moved[sample] = target
            loads[target] += tokens[sample]
            loads[slot] -= tokens[sample]
    return moved


def _best_fit(tokens: np.ndarray, num_slots: int, cap: int) -> np.ndarray:
    """The slot of every sample, as full as they get; then every slot left empty gets one sample of the fullest."""
    slot_of, used = pack(tokens, cap, depth=len(tokens))
    if used > num_slots:
        raise ValueError(f"{tokens.sum()} tokens do not fit into {num_slots} slots of {cap}")
    for slot in range(used, num_slots):
        slot_of[np.flatnonzero(slot_of == np.bincount(slot_of).argmax())[0]] = slot
    return slot_of


def _with_empty(values: np.ndarray) -> np.ndarray:
    """`values` with a zero at index EMPTY (the last)."""
    return np.append(values, np.zeros(1, values.dtype))
