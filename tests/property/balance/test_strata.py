"""The paper's stratified draw, against a plain version with member lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.lengths import MAX_LEN, make_lengths

from bert_fast.balance.permutation import EpochOrder
from bert_fast.balance.strata import Strata, largest_remainder
from bert_fast.errors import UserError

LENGTHS = make_lengths(1000)


def equal_width(num_strata: int, max_len: int = MAX_LEN) -> np.ndarray:
    return np.arange(1, num_strata + 1) * max_len // num_strata


def members_of(lengths: np.ndarray, bounds: np.ndarray) -> list[np.ndarray]:
    """Ids of the samples of each stratum."""
    stratum_of = np.searchsorted(bounds, lengths)
    return [np.flatnonzero(stratum_of == stratum) for stratum in range(len(bounds))]


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


@settings(max_examples=40)
@given(
    st.integers(1, 5), st.integers(1, 4), st.integers(4, 12), st.integers(0, 50), st.integers(0, 30),
    st.integers(60, 1000),
)  # fmt: skip
def test_draw_is_that_of_member_lists(
    num_strata: int, world: int, per_rank: int, seed: int, step: int, count: int
) -> None:
    """Any table size: also such as end inside a block of the index, or before the first one ends."""
    lengths, bounds = LENGTHS[:count], equal_width(num_strata)
    members = members_of(lengths, bounds)
    counts = largest_remainder(np.array([len(m) for m in members]) / count, per_rank)
    if any(len(m) < c * world for m, c in zip(members, counts, strict=True)):
        with pytest.raises(UserError, match="stratum"):
            Strata(lengths, bounds, None, per_rank, world, seed)
        return
    strata = Strata(lengths, bounds, None, per_rank, world, seed)
    np.testing.assert_array_equal(strata.counts, counts)
    expected = [
        mine[EpochOrder(len(mine), (seed, 2, stratum)).take(step * c * world, c * world)].reshape(world, -1)
        for stratum, (mine, c) in enumerate(zip(members, counts.tolist(), strict=True))
        if c
    ]
    np.testing.assert_array_equal(strata.draw(step), np.concatenate(expected, axis=1).ravel())


def test_bounds_are_inside_their_stratum_and_counts_may_be_given() -> None:
    lengths = np.array([1, 128, 129, 256, 257, 384, 385, 512] * 8, np.uint16)
    strata = Strata(lengths, np.array([128, 256, 384, 512]), np.array([3, 0, 4, 1]), 8, 1, seed=0)
    for step in range(10):
        drawn = lengths[strata.draw(step)]
        assert np.histogram(drawn, [0, 129, 257, 385, 513])[0].tolist() == [3, 0, 4, 1]


def test_a_stratum_is_used_up_before_it_repeats() -> None:
    bounds = equal_width(2)
    strata = Strata(LENGTHS, bounds, None, 10, 2, seed=0)
    first = members_of(LENGTHS, bounds)[0]
    count = int(strata.counts[0]) * 2
    steps = len(first) // count
    drawn = np.concatenate([strata.draw(step) for step in range(steps)])
    mine = drawn[np.isin(drawn, first)]
    assert len(np.unique(mine)) == len(mine) == steps * count


def test_a_stratum_too_small_for_a_step_says_the_mend() -> None:
    lengths = np.full(100, 100, np.uint16)
    lengths[:19] = 5
    with pytest.raises(
        UserError,
        match=r"stratum 0 of 2 \(up to 64 tokens\) has 19 samples and a step takes 20 .*fewer strata or a smaller",
    ):
        Strata(lengths, equal_width(2), None, 25, 4, seed=0)
