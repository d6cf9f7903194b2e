"""The draw of pairs: weights, epochs, no two of a group in a batch, any step from the seed alone; and in a planner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from support.lengths import COST, MAX_LEN, make_lengths

from bert_fast.balance.planner import Planner
from bert_fast.balance.sources import SourceDraw
from bert_fast.config import BalanceConfig
from bert_fast.config.choices import STRATEGIES
from bert_fast.errors import UserError

SOURCES = [(0, 40, 3.0), (40, 200, 1.0), (240, 100, 0.5)]
ALONE = np.arange(340, dtype=np.uint32)  # every pair is a group of its own


def pairs_drawn(draw: SourceDraw, source: int, batches: int) -> list[np.ndarray]:
    """The first batches of a source."""
    found: list[np.ndarray] = []
    step = 0
    while len(found) < batches:
        if draw.source(step) == source:
            found.append(draw.draw(step))
        step += 1
    return found


def test_all_pairs_of_a_step_are_of_one_source() -> None:
    draw = SourceDraw(SOURCES, ALONE, 8, seed=1)
    seen = Counter()
    for step in range(300):
        ids = draw.draw(step)
        assert (ids.dtype, ids.shape) == (np.int64, (8,))
        first, num, _ = SOURCES[draw.source(step)]
        assert ids.min() >= first
        assert ids.max() < first + num
        assert len(set(ids.tolist())) == 8
        seen[draw.source(step)] += 1
    assert set(seen) == {0, 1, 2}


def test_every_cycle_has_exactly_its_steps_of_each_source() -> None:
    draw = SourceDraw(SOURCES, ALONE, 4, seed=3)
    assert draw.cycle == 1000
    assert draw.slots.tolist() == [667, 222, 111]  # 666.67, 222.2, 111.1
    orders = []
    for cycle in range(3):
        order = [draw.source(step) for step in range(cycle * 1000, (cycle + 1) * 1000)]
        assert np.bincount(order).tolist() == draw.slots.tolist()
        orders.append(order)
    assert orders[0] != orders[1] != orders[2], "cycles are shuffled each for itself"


@pytest.mark.parametrize(
    ("weights", "slots"),
    [([1], [1000]), ([1e-9, 1.0], [1, 999]), ([1e-9, 1e-9, 2.0, 1.0], [1, 1, 665, 333]), ([2.0, 1.0, 1.0], [500, 250, 250])],
)  # fmt: skip
def test_a_source_has_at_least_a_step(weights: list[float], slots: list[int]) -> None:
    sources = [(10 * n, 10, weight) for n, weight in enumerate(weights)]
    found = SourceDraw(sources, ALONE, 4, seed=0).slots
    assert found.sum() == 1000
    assert np.abs(found - slots).max() <= 1
    assert found.tolist()[0] == slots[0]


def test_a_cycle_holds_more_sources_than_it_usually_has_steps() -> None:
    sources = [(2 * n, 2, 1.0) for n in range(150)]
    draw = SourceDraw(sources, np.arange(300), 2, seed=0)
    assert draw.cycle == 1500
    assert draw.slots.tolist() == [10] * 150


@pytest.mark.parametrize("batch", [8, 10, 40])
def test_an_epoch_has_every_pair_once(batch: int) -> None:
    """Source 0 has 40 pairs: whole batches in an epoch."""
    draw = SourceDraw(SOURCES, ALONE, batch, seed=5)
    per_epoch = 40 // batch
    batches = pairs_drawn(draw, 0, 3 * per_epoch)
    epochs = [np.concatenate(batches[n : n + per_epoch]).tolist() for n in range(0, len(batches), per_epoch)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(40))
    assert epochs[0] != epochs[1] != epochs[2]


def test_where_epochs_meet_in_a_batch_no_pair_is_twice_and_all_come() -> None:
    draw = SourceDraw([(0, 50, 1.0)], ALONE, 16, seed=2)
    counts = np.zeros(50, int)
    for step in range(200):
        ids = draw.draw(step)
        assert len(np.unique(ids)) == 16
        np.add.at(counts, ids, 1)
    assert counts.min() >= 50  # 64 epochs
    assert counts.sum() == 3200


def test_no_two_pairs_of_a_group_are_in_a_batch() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 400).astype(np.uint32)  # few groups of many pairs
    sources = [(0, 300, 1.0), (300, 100, 1.0)]
    draw = SourceDraw(sources, groups, 30, seed=4)
    seen = set()
    for step in range(200):
        ids = draw.draw(step)
        assert len(set(groups[ids].tolist())) == 30
        first, num, _ = sources[draw.source(step)]
        assert first <= ids.min() <= ids.max() < first + num
        seen |= set(ids.tolist())
    assert seen == set(range(400))
    natural = [len(np.unique(groups[rng.permutation(300)[:30]])) for _ in range(50)]
    assert max(natural) < 30, "without the rule batches would have had duplicates"


def test_a_source_with_just_enough_groups() -> None:
    groups = np.repeat(np.arange(8), [93, 1, 1, 1, 1, 1, 1, 1])
    draw = SourceDraw([(0, 100, 1.0)], groups, 8, seed=0)
    for step in range(20):
        assert sorted(groups[draw.draw(step)].tolist()) == list(range(8))


def test_a_step_needs_no_history() -> None:
    groups = (np.arange(340) // 2).astype(np.uint32)
    steps = [*range(30), 1999, 2000, 123_456_789]
    first = SourceDraw(SOURCES, groups, 8, seed=7)
    expected = {step: first.draw(step).tolist() for step in steps}
    for step in reversed(steps):
        assert SourceDraw(SOURCES, groups, 8, seed=7).draw(step).tolist() == expected[step]
    again = SourceDraw(SOURCES, groups, 8, seed=7)
    assert [again.draw(step).tolist() for step in reversed(steps)] == [expected[step] for step in reversed(steps)]
    other = SourceDraw(SOURCES, groups, 8, seed=8)
    assert [other.draw(step).tolist() for step in steps] != list(expected.values())
    assert [other.source(step) for step in range(1000)] != [first.source(step) for step in range(1000)]


def test_groups_may_be_memory_mapped(tmp_path: object) -> None:
    path = f"{tmp_path}/groups.npy"
    np.save(path, ALONE)
    mapped = np.load(path, mmap_mode="r")
    assert SourceDraw(SOURCES, mapped, 8, 1).draw(5).tolist() == SourceDraw(SOURCES, ALONE, 8, 1).draw(5).tolist()


@pytest.mark.parametrize(
    ("sources", "batch", "message"),
    [
        ([], 2, "^there is no source to draw pairs from; "),
        ([(0, 40, 1.0), (40, 10, 0.0)], 2, "^source little: weight 0; give a number above 0"),
        ([(0, 40, float("nan")), (40, 10, 1.0)], 2, "^source big: weight nan; "),
        ([(0, 40, 1.0), (40, 10, 1.0)], 6, "^source little: its 10 pairs are 5 groups .* fewer than the 6 pairs of a batch"),
    ],
)  # fmt: skip
def test_draws_that_cannot_be(sources: list[tuple[int, int, float]], batch: int, message: str) -> None:
    groups = np.concatenate([np.arange(40), 40 + np.arange(10) // 2])
    with pytest.raises(UserError, match=message):
        SourceDraw(sources, groups, batch, seed=0, names=["big", "little"][: len(sources)])


# ---- in a planner ---------------------------------------------------------------------------------------------------


def planner_of(strategy: str, world: int, draw: Callable[[int], np.ndarray] | None) -> Planner:
    config = BalanceConfig(strategy=strategy)
    return Planner(
        make_lengths(340), config, COST, world_size=world, gradient_accumulation_steps=1, micro_batch_size=24 // world,
        node_size=1, max_seq_len=MAX_LEN, seed=0, draw=draw,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if not STRATEGIES[name].draws_by_rank])
def test_a_plan_assigns_what_is_drawn(strategy: str) -> None:
    draw = SourceDraw(SOURCES, ALONE, 24, seed=0)
    for step in (0, 1, 17, 5000):
        for world in (1, 2, 4):
            planner = planner_of(strategy, world, draw.draw)
            assert planner.draw(step).tolist() == draw.draw(step).tolist()
            assert sorted(planner.plan(step).ids.tolist()) == sorted(draw.draw(step).tolist())


def test_without_a_draw_the_strategy_draws() -> None:
    assert planner_of("balanced", 2, None).draw(0).tolist() != SourceDraw(SOURCES, ALONE, 24, seed=0).draw(0).tolist()


def test_a_strategy_that_draws_by_rank_is_refused() -> None:
    draw = SourceDraw(SOURCES, ALONE, 24, seed=0)
    with pytest.raises(UserError, match=r"^balance\.strategy=stratified_presort chooses the samples .*=balanced$"):
        planner_of("stratified_presort", 2, draw.draw)


def test_a_draw_of_another_size_is_refused() -> None:
    draw = SourceDraw(SOURCES, ALONE, 16, seed=0)
    with pytest.raises(UserError, match=r"^step 3: 16 samples are drawn, and batch\.global_batch_size=24"):
        planner_of("balanced", 2, draw.draw).plan(3)
