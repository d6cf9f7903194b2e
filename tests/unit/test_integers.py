"""Shared integer arithmetic, against plain loops and the published generator."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bert_fast.integers import (
    SPLITMIX64,
    ceil_div,
    mix64,
    round_up,
    segment_ids,
    segment_positions,
    segment_ranges,
)


@given(st.integers(0, 1000), st.integers(1, 50))
def test_rounding(value: int, step: int) -> None:
    multiples = range(0, value + step + 1, step)
    assert round_up(value, step) == min(each for each in multiples if each >= value)
    assert ceil_div(value, step) == len(range(0, value, step))


def test_mix64_is_that_of_splitmix64() -> None:
    """The first outputs of the published generator for the seed 1234567."""
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * SPLITMIX64[0]
    assert mix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 5)), max_size=8))
def test_segments(segments: list[tuple[int, int]]) -> None:
    starts, counts = (np.array([each[n] for each in segments], np.int64) for n in (0, 1))
    expected = [(n, place, start + place) for n, (start, count) in enumerate(segments) for place in range(count)]
    found = zip(segment_ids(counts), segment_positions(counts), segment_ranges(starts, counts), strict=True)
    assert [tuple(map(int, each)) for each in found] == expected
