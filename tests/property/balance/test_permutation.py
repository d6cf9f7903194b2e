"""The computed permutation and the endless order made of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_fast.balance.permutation import EpochOrder, Permutation


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
