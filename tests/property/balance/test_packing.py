"""Packing into rows: against a sample-by-sample version, and how full rows get."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.lengths import MAX_LEN, make_lengths

from bert_fast.balance.lengths import wikipedia_like
from bert_fast.balance.packing import pack


def plain_pack(lengths: np.ndarray, row_length: int, depth: int, first: str) -> int:
    """Number of rows when samples are placed one by one, longest first."""
    rooms: list[int] = []
    filled: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fits = [row for row, room in enumerate(rooms) if room >= length and filled[row] < depth]
        if fits:
            best = min(fits, key=lambda row: rooms[row] if first == "longest" else -rooms[row])
        else:
            best = len(rooms)
            rooms.append(row_length)
            filled.append(0)
        rooms[best] -= length
        filled[best] += 1
    return len(rooms)


@given(st.integers(1, 150), st.integers(1, 6), st.sampled_from(["longest", "shortest"]), st.integers(0, 1000))
def test_rows_hold_every_sample_within_length_and_depth(count: int, depth: int, first: str, seed: int) -> None:
    lengths = make_lengths(count, seed)
    row_of, num_rows = pack(lengths, MAX_LEN, depth, first)
    assert row_of.shape == (count,)
    assert set(row_of) == set(range(num_rows))
    assert np.bincount(row_of, lengths).max() <= MAX_LEN
    assert np.bincount(row_of).max() <= depth
    if depth == 1:
        assert num_rows == count


@pytest.mark.parametrize("first", ["longest", "shortest"])
@pytest.mark.parametrize("depth", [2, 3, 12])
def test_as_few_rows_as_one_by_one(first: str, depth: int) -> None:
    """Whole groups at once may fill rows in another order than one by one, but about as well."""
    for seed in range(10):
        lengths = make_lengths(400, seed)
        found, plain = pack(lengths, MAX_LEN, depth, first)[1], plain_pack(lengths, MAX_LEN, depth, first)
        assert abs(found / plain - 1) < 0.02


@pytest.mark.parametrize(("depth", "share"), [(2, 0.805), (3, 0.894), (4, 0.939), (12, 0.996)])
def test_rows_are_as_full_as_published(depth: int, share: float) -> None:
    """Efficiencies of Krell et al. (arXiv 2107.02027) for Wikipedia."""
    lengths = wikipedia_like(200_000)
    _, num_rows = pack(lengths, 512, depth, "shortest")
    assert lengths.sum() / (512 * num_rows) == pytest.approx(share, abs=0.01)


def test_a_known_order_changes_nothing() -> None:
    lengths = make_lengths(300)
    order = np.argsort(-lengths.astype(int), kind="stable")
    np.testing.assert_array_equal(pack(lengths, MAX_LEN, 3)[0], pack(lengths, MAX_LEN, 3, order=order)[0])
