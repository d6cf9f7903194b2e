"""Steps made ahead in a background thread."""

from __future__ import annotations

import threading
import time

import pytest

from bert_fast.data.loader import Prefetcher
from bert_fast.errors import UserError


def test_prefetcher_gives_results_in_order_whatever_they_take() -> None:
    def make(step: int) -> int:
        time.sleep(0.002 * (step % 3))
        return step * step

    prefetcher = Prefetcher(make, start=5, end=25, depth=3)
    assert [prefetcher.next() for _ in range(20)] == [n * n for n in range(5, 25)]
    prefetcher.close()


def test_prefetcher_works_ahead_but_not_far() -> None:
    made: list[int] = []
    prefetcher = Prefetcher(lambda step: made.append(step) or step, start=0, end=1000, depth=2)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert made == [0, 1, 2], "two in the queue, one in hand"
    assert prefetcher.next() == 0
    prefetcher.close()


def test_prefetcher_passes_an_exception_on_in_its_turn() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise UserError("store is truncated")
        return step

    prefetcher = Prefetcher(make, start=0, end=10, depth=4)
    assert [prefetcher.next(), prefetcher.next()] == [0, 1]
    with pytest.raises(UserError, match="store is truncated"):
        prefetcher.next()
    prefetcher.close()


@pytest.mark.parametrize("depth", [1, 5])
def test_prefetcher_closes_while_it_waits_for_room(depth: int) -> None:
    before = set(threading.enumerate())
    prefetcher = Prefetcher(lambda step: step, start=0, end=10**9, depth=depth)
    prefetcher.next()
    time.sleep(0.15)  # the queue is full again and the thread waits
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 2
    assert set(threading.enumerate()) <= before
