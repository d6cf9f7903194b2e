"""Properties of the planner and its parts, over made-up lengths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.balance import assign
from bert_fast.balance.cost import CostModel, imbalance
from bert_fast.balance.permutation import EpochOrder, Permutation
from bert_fast.balance.planner import Plan, Planner, Strata, largest_remainder
from bert_fast.config import BalanceConfig
from bert_fast.errors import UserError

COST = CostModel(1.0, 0.01)
STRATEGIES = ("random", "stratified_presort", "balanced")
MAX_LEN = 128


def make_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Like real stores: a third at full length, the rest uniform."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, MAX_LEN + 1, count)
    lengths[rng.random(count) < 0.3] = MAX_LEN
    return lengths.astype(np.uint16)


def make_planner(
    lengths: np.ndarray,
    strategy: str,
    *,
    world: int = 4,
    accumulation: int = 2,
    local: int = 3,
    node: int = 2,
    seed: int = 0,
) -> Planner:
    return Planner(
        lengths, BalanceConfig(strategy=strategy, num_strata=2), COST, world_size=world, accumulation=accumulation,
        local_batch=local, node_size=node, max_seq_len=MAX_LEN, seed=seed,
    )  # fmt: skip


def costs_of(count: int, seed: int) -> np.ndarray:
    return COST(make_lengths(count, seed))


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, int]:
    node = draw(st.integers(1, 4))
    return {
        "world": node * draw(st.integers(1, 4)),
        "accumulation": draw(st.integers(1, 3)),
        "local": draw(st.integers(1, 6)),
        "node": node,
        "seed": draw(st.integers(0, 2**31)),
    }


# ---- permutations ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.tuples(st.integers(0, 2**32), st.integers(0, 2**32)))
def test_permutation_is_a_bijection(size: int, key: tuple[int, int]) -> None:
    values = Permutation(size, key)(np.arange(size))
    assert values.dtype == np.int64
    np.testing.assert_array_equal(np.sort(values), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 2000])
def test_permutation_is_a_bijection_at_powers_of_two(size: int) -> None:
    np.testing.assert_array_equal(np.sort(Permutation(size, (1, 2))(np.arange(size))), np.arange(size))


@given(st.integers(50, 2000), st.data())
def test_any_stretch_of_a_permutation_is_that_of_the_whole(size: int, data: st.DataObject) -> None:
    permutation = Permutation(size, (7,))
    start = data.draw(st.integers(0, size - 1))
    places = np.arange(start, min(size, start + 20))
    np.testing.assert_array_equal(permutation(places), permutation(np.arange(size))[places])


def test_permutation_depends_on_its_key() -> None:
    orders = [Permutation(1000, key)(np.arange(1000)) for key in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 20


def test_permutation_spreads_evenly() -> None:
    """Of many keys every image of place 0 is about as frequent (chi-squared over 20 cells, 99.99 % quantile)."""
    images = [int(Permutation(20, (key,))(np.array([0]))[0]) for key in range(2000)]
    counts = np.bincount(images, minlength=20)
    assert ((counts - 100) ** 2 / 100).sum() < 52


def test_known_permutation() -> None:
    """A resumed or repeated run depends on these numbers staying as they are, on every machine."""
    assert Permutation(10, (1, 2, 3))(np.arange(10)).tolist() == [0, 6, 9, 4, 2, 3, 1, 8, 5, 7]


@given(st.integers(1, 60), st.integers(0, 300), st.integers(1, 100))
def test_epoch_order_has_no_replacement_inside_an_epoch(size: int, start: int, count: int) -> None:
    order = EpochOrder(size, (5,))
    taken = order.take(start, count)
    assert len(taken) == count
    epochs = (start + np.arange(count)) // size
    for epoch in np.unique(epochs):
        mine = taken[epochs == epoch]
        assert len(np.unique(mine)) == len(mine)
    whole = order.take(0, start + count)
    np.testing.assert_array_equal(whole[start:], taken)


def test_epochs_have_different_orders() -> None:
    order = EpochOrder(500, (5,))
    a, b = order.take(0, 500), order.take(500, 500)
    np.testing.assert_array_equal(np.sort(a), np.sort(b))
    assert (a == b).sum() < 15


# ---- dealing --------------------------------------------------------------------------------------------------------

DEALS = {
    "in_order": assign.in_order,
    "snake": assign.snake,
    "karmarkar_karp": assign.karmarkar_karp,
    "node_snake": lambda costs, ranks: assign.node_snake(costs, ranks, 1 if ranks % 2 else 2),
}


@pytest.mark.parametrize("name", DEALS)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_every_deal_is_a_permutation_with_equal_counts(name: str, ranks: int, per_rank: int, seed: int) -> None:
    grid = DEALS[name](costs_of(ranks * per_rank, seed), ranks)
    assert grid.shape == (ranks, per_rank)
    assert np.issubdtype(grid.dtype, np.integer)
    np.testing.assert_array_equal(np.sort(grid.ravel()), np.arange(ranks * per_rank))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 1000))
def test_deals_do_not_change_their_input(ranks: int, per_rank: int, seed: int) -> None:
    costs = costs_of(ranks * per_rank, seed)
    before = costs.copy()
    for deal in DEALS.values():
        deal(costs, ranks)
    np.testing.assert_array_equal(costs, before)


def test_snake_by_hand() -> None:
    costs = np.array([5.0, 9, 1, 7, 3, 8])  # falling: 1 5 3 0 4 2
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
    for deal in DEALS.values():
        value = imbalance_of(costs, deal(costs, ranks))
        assert 1 - 1e-12 <= value <= ranks + 1e-12


def test_karmarkar_karp_is_mostly_better_than_the_snake_and_much_better_than_chance() -> None:
    rng = np.random.default_rng(0)
    better, ratios = 0, []
    for seed in range(200):
        ranks, per_rank = int(rng.integers(2, 17)), int(rng.integers(2, 17))
        costs = costs_of(ranks * per_rank, seed)
        excess = [
            imbalance_of(costs, deal(costs, ranks)) - 1
            for deal in (assign.karmarkar_karp, assign.snake, assign.in_order)
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
    """Pairs are dealt optimally (longest with shortest); larger groups stay within a known bound (Michiels et al.)."""
    ratios = []
    for seed in range(15):
        costs = costs_of(ranks * per_rank, seed)
        found, best = imbalance_of(costs, assign.karmarkar_karp(costs, ranks)), best_imbalance(costs, ranks)
        assert found >= best - 1e-12
        ratios.append(found / best)
    bound = {2: 1.0, 3: 4 / 3, 4: 19 / 12}[per_rank]  # 2 - sum(i! for i < k) / k!
    assert max(ratios) <= bound + 1e-12
    assert np.mean(ratios) < 1.02


@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 100))
def test_micro_batches_split_a_rank_evenly(accumulation: int, local: int, seed: int) -> None:
    grid = assign.micro_batches(costs_of(accumulation * local, seed), accumulation)
    assert grid.shape == (accumulation, local)
    np.testing.assert_array_equal(np.sort(grid.ravel()), np.arange(accumulation * local))


def test_cost_model_is_the_formula() -> None:
    lengths = np.array([1, 2, 512], np.uint16)  # 512 squared does not fit 16 bits
    np.testing.assert_allclose(CostModel(3.0, 0.5)(lengths), [3.5, 8.0, 3 * 512 + 0.5 * 512**2], rtol=0)


# ---- plans ----------------------------------------------------------------------------------------------------------

LENGTHS = make_lengths(1000)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(shapes(), st.integers(0, 40))
def test_a_plan_holds_every_sample_once_and_the_same_number_on_every_rank(
    strategy: str, shape: dict[str, int], step: int
) -> None:
    planner = make_planner(LENGTHS, strategy, **shape)
    plan = planner.plan(step)
    assert plan.ids.shape == (shape["world"], shape["accumulation"], shape["local"])
    assert planner.global_batch == plan.ids.size
    assert plan.ids.min() >= 0
    assert plan.ids.max() < len(LENGTHS)
    if strategy != "stratified_presort" and (step + 1) * plan.ids.size <= len(LENGTHS):
        assert len(np.unique(plan.ids)) == plan.ids.size
    costs = COST(LENGTHS[plan.ids]).sum(axis=(1, 2))
    np.testing.assert_allclose(plan.costs, costs, rtol=1e-12)
    assert plan.imbalance == pytest.approx(costs.max() / costs.mean(), rel=1e-12)
    assert plan.imbalance >= 1 - 1e-12
    assert plan.step == step


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(shapes(), st.integers(0, 10**7))
def test_a_fresh_planner_gives_the_same_plan_at_any_step(strategy: str, shape: dict[str, int], step: int) -> None:
    """Resume is O(1): no state is carried from step to step, and far steps cost no more than near ones."""
    used = make_planner(LENGTHS, strategy, **shape)
    for other in (0, 1, step + 3):
        used.plan(other)
    a, b = used.plan(step), make_planner(LENGTHS, strategy, **shape).plan(step)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.costs, b.costs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seed_and_step_change_the_plan(strategy: str) -> None:
    plans = [make_planner(LENGTHS, strategy, seed=seed).plan(step).ids for seed in (0, 1) for step in (0, 1)]
    for a, b in itertools.combinations(plans, 2):
        assert set(a.ravel()) != set(b.ravel())


@pytest.mark.parametrize("strategy", ["random", "balanced"])
def test_an_epoch_holds_every_sample_once_across_step_borders(strategy: str) -> None:
    """1,000 samples in steps of 24: the 42nd step begins in one epoch and ends in the next."""
    planner = make_planner(LENGTHS, strategy)
    counts = np.zeros(1000, int)
    for step in range(41):
        np.add.at(counts, planner.plan(step).ids.ravel(), 1)
    assert counts.max() == 1
    np.add.at(counts, planner.plan(41).ids.ravel(), 1)
    assert counts.min() == 1, "the 16 samples left of the first epoch are in step 41"
    assert counts.sum() == 1008
    assert counts.max() == 2
    for step in range(42, 125):
        np.add.at(counts, planner.plan(step).ids.ravel(), 1)
    assert set(counts) == {3}


@given(shapes(), st.integers(0, 200))
def test_the_global_batch_of_balanced_is_that_of_random(shape: dict[str, int], step: int) -> None:
    """Balancing deals the same samples: the mathematics of a step does not change."""
    a, b = (make_planner(LENGTHS, strategy, **shape).plan(step) for strategy in ("balanced", "random"))
    np.testing.assert_array_equal(np.sort(a.ids.ravel()), np.sort(b.ids.ravel()))
    assert a.imbalance <= b.imbalance + 1e-12 or a.ids.shape[1] * a.ids.shape[2] == 1 or a.imbalance < 1.5


def test_the_global_batch_does_not_depend_on_ranks_or_accumulation() -> None:
    plans = [
        make_planner(
            LENGTHS, "balanced", world=world, accumulation=accumulation, local=24 // world // accumulation, node=1
        ).plan(9)
        for world, accumulation in ((1, 1), (2, 1), (4, 2), (8, 3))
    ]
    assert len({tuple(sorted(plan.ids.ravel())) for plan in plans}) == 1


def mean_imbalance(strategy: str, steps: int = 60) -> float:
    planner = make_planner(LENGTHS, strategy, world=8, accumulation=1, local=8, node=4)
    return float(np.mean([planner.plan(step).imbalance for step in range(steps)]))


def test_strategies_are_ordered_as_expected() -> None:
    random, stratified, balanced = (mean_imbalance(strategy) for strategy in STRATEGIES)
    assert balanced < 1.01 < stratified < random
    assert random > 1.15


def test_no_rank_always_gets_the_dearest_samples() -> None:
    for strategy in ("balanced", "stratified_presort"):
        planner = make_planner(LENGTHS, strategy)
        dearest = [int(planner.plan(step).costs.argmax()) for step in range(200)]
        assert min(np.bincount(dearest, minlength=4)) > 20, strategy


def test_micro_batches_of_a_rank_are_even() -> None:
    planner = make_planner(LENGTHS, "balanced", world=2, accumulation=4, local=8, node=2)
    for step in range(10):
        costs = COST(LENGTHS[planner.plan(step).ids]).sum(-1)
        assert (costs.max(1) / costs.mean(1)).max() < 1.1


def test_more_than_the_store_holds_is_an_error() -> None:
    make_planner(make_lengths(24), "random")
    with pytest.raises(
        UserError, match=r"batch\.global_batch=24 is more than the 23 samples .*prepare more data or lower"
    ):
        make_planner(make_lengths(23), "random")


def test_lengths_may_be_memory_mapped(tmp_path) -> None:
    np.save(tmp_path / "lengths.npy", LENGTHS)
    mapped = np.load(tmp_path / "lengths.npy", mmap_mode="r")
    for strategy in STRATEGIES:
        a: Plan = make_planner(mapped, strategy).plan(3)
        np.testing.assert_array_equal(a.ids, make_planner(LENGTHS, strategy).plan(3).ids)


# ---- strata ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12).filter(lambda x: sum(x) > 0.01), st.integers(0, 500))
def test_largest_remainder_adds_up_and_stays_near(weights: list[float], total: int) -> None:
    shares = np.array(weights) / sum(weights)
    counts = largest_remainder(shares, total)
    assert counts.sum() == total
    assert (np.abs(counts - shares * total) < 1 + 1e-6).all()
    assert (counts >= 0).all()


def test_largest_remainder_of_the_paper() -> None:
    """Counts of the paper's 4 strata of Wikipedia (local batch 16: 6/3/2/5, 12: 4/2/2/4), from shares that give both."""
    shares = np.array([0.357, 0.193, 0.140, 0.310])
    assert largest_remainder(shares, 16).tolist() == [6, 3, 2, 5]
    assert largest_remainder(shares, 12).tolist() == [4, 2, 2, 4]


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(4, 12), st.integers(0, 50), st.integers(0, 30))
def test_every_rank_draws_a_fixed_count_from_each_stratum(
    num_strata: int, world: int, per_rank: int, seed: int, step: int
) -> None:
    strata = Strata(LENGTHS, num_strata, per_rank, MAX_LEN, seed, world)
    stratum_of = np.minimum((LENGTHS.astype(int) - 1) * num_strata // MAX_LEN, num_strata - 1)
    shares = np.bincount(stratum_of, minlength=num_strata) / len(LENGTHS)
    np.testing.assert_array_equal(strata.counts, largest_remainder(shares, per_rank))
    drawn = strata.draw(step)
    assert len(np.unique(drawn)) == len(drawn) or step > 0
    for rank in drawn.reshape(world, per_rank):
        np.testing.assert_array_equal(np.bincount(stratum_of[rank], minlength=num_strata), strata.counts)


def test_strata_are_of_equal_width() -> None:
    """Four strata of 128 tokens each for a maximum of 512, their upper ends inside."""
    lengths = np.array([1, 128, 129, 256, 257, 384, 385, 512] * 8, np.uint16)
    strata = Strata(lengths, 4, 8, 512, seed=0, world_size=1)
    assert strata.counts.tolist() == [2, 2, 2, 2]
    for members, expected in zip(strata._members, ({1, 128}, {129, 256}, {257, 384}, {385, 512}), strict=True):
        assert set(lengths[members].tolist()) == expected


def test_a_stratum_is_used_up_before_it_repeats() -> None:
    strata = Strata(LENGTHS, 2, 10, MAX_LEN, seed=0, world_size=2)
    size, count = len(strata._members[0]), int(strata.counts[0]) * 2
    steps = size // count
    drawn = np.concatenate([strata.draw(step) for step in range(steps)])
    mine = drawn[np.isin(drawn, strata._members[0])]
    assert len(np.unique(mine)) == len(mine) == steps * count


def test_a_stratum_too_small_for_a_step_says_the_mend() -> None:
    lengths = np.full(100, 100, np.uint16)
    lengths[:19] = 5
    with pytest.raises(
        UserError, match=r"stratum 0 of 2 has 19 samples and a step takes 20 .*lower balance\.num_strata or the batch"
    ):
        Planner(
            lengths, BalanceConfig(strategy="stratified_presort", num_strata=2), COST, world_size=4, accumulation=1,
            local_batch=25, node_size=4, max_seq_len=MAX_LEN, seed=0,
        )  # fmt: skip


def test_the_stratified_draw_stays_on_its_node() -> None:
    """Which samples a node gets does not depend on lengths inside the step: presorting is local."""
    planner = make_planner(LENGTHS, "stratified_presort", world=4, node=2)
    drawn = planner._draw(5).reshape(2, -1)
    ids = planner.plan(5).ids.reshape(2, -1)
    for node in range(2):
        assert sorted(drawn[node]) == sorted(ids[node])
