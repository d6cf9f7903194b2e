"""Properties of the algorithms that assign samples to ranks, and plain versions of the fast ones."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lengths import MAX_LEN, costs_of, make_lengths

from bert_fast.balance import assign
from bert_fast.balance.cost import CostModel, imbalance

ALGORITHMS = {
    "in_order": assign.in_order,
    "round_robin": assign.round_robin,
    "snake": assign.snake,
    "karmarkar_karp": assign.karmarkar_karp,
    "balanced": assign.balanced,
    "node_snake": lambda costs, ranks: assign.node_snake(costs, ranks, 1 if ranks % 2 else 2),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_every_deal_is_a_permutation_with_equal_counts(name: str, ranks: int, per_rank: int, seed: int) -> None:
    grid = ALGORITHMS[name](costs_of(ranks * per_rank, seed), ranks)
    assert grid.shape == (ranks, per_rank)
    assert np.issubdtype(grid.dtype, np.integer)
    np.testing.assert_array_equal(np.sort(grid.ravel()), np.arange(ranks * per_rank))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_deals_do_not_change_their_input(ranks: int, per_rank: int, seed: int) -> None:
    costs = costs_of(ranks * per_rank, seed)
    before = costs.copy()
    for assign_all in ALGORITHMS.values():
        assign_all(costs, ranks)
    np.testing.assert_array_equal(costs, before)


def test_snake_by_hand() -> None:
    costs = np.array([5.0, 9, 1, 7, 3, 8])  # descending: 1 5 3 0 4 2
    assert assign.snake(costs, 2).tolist() == [[1, 0, 4], [5, 3, 2]]
    assert assign.snake(costs, 3).tolist() == [[1, 2], [5, 4], [3, 0]]


def test_node_snake_stays_on_its_node() -> None:
    costs = costs_of(4 * 6, 3)
    grid = assign.node_snake(costs, 4, 2)
    assert set(grid[:2].ravel()) == set(range(12))
    assert set(grid[2:].ravel()) == set(range(12, 24))
    np.testing.assert_array_equal(grid[:2], assign.snake(costs[:12], 2))


def imbalance_of(costs: np.ndarray, grid: np.ndarray) -> float:
    return imbalance(costs[grid].sum(axis=1))


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 10_000))
def test_imbalance_is_at_least_one(ranks: int, per_rank: int, seed: int) -> None:
    costs = costs_of(ranks * per_rank, seed)
    for assign_all in ALGORITHMS.values():
        value = imbalance_of(costs, assign_all(costs, ranks))
        assert 1 - 1e-12 <= value <= ranks + 1e-12


def test_karmarkar_karp_is_mostly_better_than_the_snake_and_much_better_than_chance() -> None:
    rng = np.random.default_rng(0)
    better, ratios = 0, []
    for seed in range(200):
        ranks, per_rank = int(rng.integers(2, 17)), int(rng.integers(2, 17))
        costs = costs_of(ranks * per_rank, seed)
        excess = [
            imbalance_of(costs, assign_all(costs, ranks)) - 1
            for assign_all in (assign.karmarkar_karp, assign.snake, assign.in_order)
        ]
        better += excess[0] <= excess[1] + 1e-12
        ratios.append((excess[0] + 1e-9) / (excess[2] + 1e-9))
    assert better >= 190
    assert np.median(ratios) < 0.05


def best_imbalance(costs: np.ndarray, ranks: int) -> float:
    """The smallest possible: every equal-count partition is tried."""
    per_rank = len(costs) // ranks

    def smallest_maximum(left: frozenset[int], ranks_left: int) -> float:
        if ranks_left == 0:
            return 0.0
        first = min(left)  # ranks are interchangeable: the first sample goes to the first open rank
        best = float("inf")
        for others in itertools.combinations(sorted(left - {first}), per_rank - 1):
            mine = costs[[first, *others]].sum()
            if mine < best:
                best = min(best, max(mine, smallest_maximum(left - {first, *others}, ranks_left - 1)))
        return best

    return smallest_maximum(frozenset(range(len(costs))), ranks) / (costs.sum() / ranks)


@pytest.mark.parametrize(("ranks", "per_rank"), [(2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2)])
def test_karmarkar_karp_is_near_the_optimum_on_small_inputs(ranks: int, per_rank: int) -> None:
    """Pairs are assigned optimally (longest with shortest); larger groups stay within a known bound (Michiels et al.)."""
    ratios = []
    for seed in range(15):
        costs = costs_of(ranks * per_rank, seed)
        found, best = imbalance_of(costs, assign.karmarkar_karp(costs, ranks)), best_imbalance(costs, ranks)
        assert found >= best - 1e-12
        ratios.append(found / best)
    bound = {2: 1.0, 3: 4 / 3, 4: 19 / 12}[per_rank]  # 2 - sum(i! for i < k) / k!
    assert max(ratios) <= bound + 1e-12
    assert np.mean(ratios) < 1.02


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_a_known_order_changes_nothing(ranks: int, per_rank: int, seed: int) -> None:
    """The planner sorts by length: an order of descending cost, equals in their order, like the algorithms' own."""
    costs = costs_of(ranks * per_rank, seed)
    order = assign.descending(costs)
    for assign_all in (assign.round_robin, assign.snake, assign.karmarkar_karp, assign.balanced, assign.longest_first):
        np.testing.assert_array_equal(assign_all(costs, ranks), assign_all(costs, ranks, order))


def test_round_robin_by_hand() -> None:
    costs = np.array([5, 9, 1, 7, 3, 8])
    assert assign.round_robin(costs, 2).tolist() == [[1, 3, 4], [5, 0, 2]]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000))
def test_snake_of_rows_is_the_snake_of_every_row(rows: int, parts: int, per_part: int, seed: int) -> None:
    costs = costs_of(rows * parts * per_part, seed).reshape(rows, -1)
    for found, row in zip(assign.snake_rows(costs, parts), costs, strict=True):
        np.testing.assert_array_equal(found, assign.snake(row, parts))


# ---- free counts ----------------------------------------------------------------------------------------------------


def plain_longest_first(costs: np.ndarray, num_slots: int) -> np.ndarray:
    """Graham's LPT sample by sample."""
    heap = [(0, slot) for slot in range(num_slots)]
    slot_of = np.empty(len(costs), np.int64)
    for sample in assign.descending(costs).tolist():
        load, slot = heapq.heappop(heap)
        slot_of[sample] = slot
        heapq.heappush(heap, (load + int(costs[sample]), slot))
    return slot_of


@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 1000))
def test_longest_first_is_the_sequential_algorithm(slots: int, count: int, seed: int) -> None:
    """Loads, not labels: of equally loaded slots either may be served."""
    costs = costs_of(count, seed)
    found, plain = assign.longest_first(costs, slots), plain_longest_first(costs, slots)
    loads = [np.sort(np.bincount(slot_of, costs, slots)) for slot_of in (found, plain)]
    np.testing.assert_array_equal(*loads)


@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 3), st.integers(0, 1000))
def test_grid_holds_every_sample_in_its_slot(slots: int, count: int, spare: int, seed: int) -> None:
    slot_of = np.random.default_rng(seed).integers(0, slots, count)
    grid = assign.grid_of(slot_of, slots, spare)
    assert grid.shape == (slots, np.bincount(slot_of).max() + spare)
    for slot, row in enumerate(grid):
        assert set(row[row != assign.EMPTY]) == set(np.flatnonzero(slot_of == slot))


@given(st.integers(2, 12), st.integers(1, 8), st.integers(0, 1000))
def test_refinement_never_raises_the_costliest(ranks: int, per_rank: int, seed: int) -> None:
    costs = costs_of(ranks * per_rank, seed)
    before = assign.in_order(costs, ranks)
    after = assign.refine(costs, before, budget_ms=0.5)
    np.testing.assert_array_equal(before, assign.in_order(costs, ranks))
    np.testing.assert_array_equal(np.sort(after.ravel()), np.arange(len(costs)))
    assert costs[after].sum(axis=1).max() <= costs[before].sum(axis=1).max()


LAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda rng, n: rng.integers(5, 513, n),
    "a tenth at the maximum": lambda rng, n: np.where(rng.random(n) < 0.1, 512, rng.integers(5, 513, n)),
    "a third at the maximum": lambda rng, n: np.where(rng.random(n) < 1 / 3, 512, rng.integers(5, 513, n)),
    "half at the maximum": lambda rng, n: np.where(rng.random(n) < 0.5, 512, rng.integers(5, 513, n)),
    "four fifths at the maximum": lambda rng, n: np.where(rng.random(n) < 0.8, 512, rng.integers(5, 513, n)),
    "log-normal": lambda rng, n: np.clip(np.exp(rng.normal(4.5, 1, n)), 5, 512).astype(np.int64),
    "two lengths": lambda rng, n: np.where(rng.random(n) < 0.33, 512, 128),
    "all alike": lambda rng, n: np.full(n, 512),
}


@pytest.mark.parametrize("law", LAWS)
def test_balanced_is_near_the_bound_for_any_law_of_lengths(law: str) -> None:
    """1,024 ranks of 16 samples each: within 0.1 % of what no assignment can be below."""
    rng, table = np.random.default_rng(0), CostModel(6_243.0, 1.0).table(512)[0]
    for _ in range(3):
        costs = table[LAWS[law](rng, 16_384)]
        costliest = costs[assign.balanced(costs, 1024)].sum(axis=1).max()
        assert 1 - 1e-12 <= costliest / assign.lower_bound(costs, 1024) <= 1.001


def test_refinement_counts_its_budget_and_does_not_look_at_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same swaps on a fast rank and on a slow one; more budget, fewer or no more cost; none, no swap."""
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("a plan must not depend on a clock"))
    monkeypatch.setattr("time.monotonic", lambda: pytest.fail("a plan must not depend on a clock"))
    costs = costs_of(64 * 16, 5)
    start = assign.snake(costs, 64)
    np.testing.assert_array_equal(assign.refine(costs, start, 0.0), start)
    found = [assign.refine(costs, start, budget) for budget in (0.2, 20.0)]
    np.testing.assert_array_equal(found[1], assign.refine(costs, start, 20.0))
    assert imbalance_of(costs, found[1]) <= imbalance_of(costs, found[0]) < imbalance_of(costs, start)


@pytest.mark.parametrize(("ranks", "per_rank"), [(1, 3), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (4, 2)])
def test_no_deal_is_below_the_bound(ranks: int, per_rank: int) -> None:
    tight = 0
    for seed in range(15):
        costs = costs_of(ranks * per_rank, seed)
        best, bound = best_imbalance(costs, ranks), assign.lower_bound(costs, ranks) * ranks / costs.sum()
        assert 1 - 1e-12 <= bound <= best + 1e-12
        assert assign.lower_bound(costs, ranks, equal_counts=False) <= assign.lower_bound(costs, ranks) + 1e-6
        tight += best < bound * 1.02
    assert tight >= (15 if per_rank == 2 else 1)


def test_the_bound_by_hand() -> None:
    """Three of five long samples on two ranks: one must have two of them."""
    costs = np.array([10, 10, 10, 1, 1, 1])
    assert assign.lower_bound(costs, 2) == 21.0
    assert assign.lower_bound(costs, 2, equal_counts=False) == 20.0
    assert assign.lower_bound(np.array([9, 1, 1, 1]), 2, equal_counts=False) == 9.0
    assert assign.lower_bound(np.array([4, 3, 2, 1]), 2) == 5.0


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1000), st.integers(1, 6))
def test_free_counts_hold_every_sample_once_under_the_cap(slots: int, per_slot: int, seed: int, room: int) -> None:
    count = slots * per_slot
    costs, tokens = costs_of(count, seed), make_lengths(count, seed).astype(np.int64)
    cap = max(MAX_LEN, int(tokens.sum() * (1 + room / 10) / slots))
    try:
        grid, _ = assign.balanced_free(costs, slots, tokens=tokens, cap=cap)
    except ValueError:
        assert cap < tokens.mean() * per_slot + MAX_LEN, "there was room for any way to fill the slots"
        return
    taken = grid[grid != assign.EMPTY]
    np.testing.assert_array_equal(np.sort(taken), np.arange(count))
    assert (np.append(tokens, 0)[grid].sum(axis=1) <= cap).all()
    assert ((grid != assign.EMPTY).sum(axis=1) >= 1).all()


def test_the_cap_bites_and_holds() -> None:
    """Tokens of short samples are cheap where attention is costly: without a cap a slot of them grows long."""
    lengths = np.array([100, 100] + [10] * 60)
    costs = lengths**2
    free, capped = assign.balanced_free(costs, 4, tokens=lengths, cap=10_000)
    assert not capped
    assert np.sort(np.append(lengths, 0)[free].sum(axis=1)).tolist() == [100, 100, 300, 300]
    held, capped = assign.balanced_free(costs, 4, tokens=lengths, cap=220)
    assert capped
    assert np.append(lengths, 0)[held].sum(axis=1).max() <= 220
    with pytest.raises(ValueError, match="800 tokens do not fit into 4 slots of 199"):
        assign.balanced_free(costs, 4, tokens=lengths, cap=199)


@settings(max_examples=20)
@given(st.integers(4, 16), st.integers(2, 4), st.integers(0, 1000))
def test_free_counts_are_no_worse_than_the_greedy(slots: int, per_slot: int, seed: int) -> None:
    costs, tokens = costs_of(slots * per_slot, seed), make_lengths(slots * per_slot, seed).astype(np.int64)
    grid, _ = assign.balanced_free(costs, slots, tokens=tokens, cap=10**6)
    greedy = np.bincount(assign.longest_first(costs, slots), costs, slots)
    assert np.append(costs, 0)[grid].sum(axis=1).max() <= greedy.max()


def test_plans_do_not_depend_on_the_unit_of_cost() -> None:
    """Whole numbers: the same assignment whether cost is in FLOPs or in milliseconds."""
    lengths = make_lengths(96)
    tables = [CostModel(a * unit, b * unit).table(MAX_LEN)[0] for a, b in ((3.0, 0.07),) for unit in (1.0, 1e12, 1e-9)]
    found = [assign.balanced(table[lengths], 12) for table in tables]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
