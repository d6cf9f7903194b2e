"""Which rank is called slow, and which is not."""

from __future__ import annotations

import time

import numpy as np
import pytest

from bert_fast.report.stragglers import StragglerTally, losses, text


def noisy(ranks: int, steps: int, seed: int = 0, spread: float = 0.03) -> np.ndarray:
    return 0.1 * (1 + spread * np.random.default_rng(seed).standard_normal((ranks, steps)))


def test_loss_is_charged_to_the_last_of_each_step() -> None:
    found = losses(np.array([[1.0, 1.0, 4.0], [1.0, 3.0, 1.0], [4.0, 2.0, 1.0]]))
    assert found.slowest.tolist() == [1, 1, 1]
    assert found.lost_s.tolist() == pytest.approx([2.0, 1.0, 2.0])  # maximum less mean of the step
    assert found.lost_s.sum() == pytest.approx(5.0)


def test_slow_rank_is_found_among_noise() -> None:
    tally = StragglerTally()
    for seed in range(20):
        table = noisy(16, 10, seed)
        table[3] *= 1.1
        tally.add(table)
    first, second = tally.worst(2)
    assert (first.rank, first.is_slow, second.is_slow) == (3, True, False)
    assert first.share > 0.8
    assert first.excess == pytest.approx(0.1 * 15 / 16, abs=0.01)
    said = text([first, second], [f"node-{rank // 4:02d}" for rank in range(16)])
    assert said.startswith("slow: rank 3 (node-00) is the last in ")
    assert "\n" not in said


@pytest.mark.parametrize(("ranks", "intervals"), [(2, 100), (16, 50), (1024, 3)])
def test_equal_ranks_are_not_called_slow(ranks: int, intervals: int) -> None:
    for trial in range(20):
        tally = StragglerTally()
        for index in range(intervals):
            tally.add(noisy(ranks, 10, 1000 * trial + index, 0.1))
        worst = tally.worst(ranks)
        assert not any(one.is_slow for one in worst)
        assert text(worst) == "slow: no rank stands out"


def test_more_often_last_by_little_is_not_slow() -> None:
    table = noisy(4, 500, spread=0.01)
    table[1] *= 1.015
    assert losses(table).worst(1)[0].rank == 1
    assert not losses(table).worst(1)[0].is_slow


def test_one_step_is_chance() -> None:
    table = np.full((8, 1), 0.1)
    table[5] = 0.2
    assert not losses(table).worst(1)[0].is_slow


def test_rank_that_was_given_more_work_is_not_slow() -> None:
    table, costs = noisy(8, 200), np.ones(8)
    costs[2] = 1.5
    table[2] *= 1.5
    assert losses(table).worst(1)[0].is_slow
    assert not any(one.is_slow for one in losses(table, costs).worst(8))
    assert not any(one.is_slow for one in losses(table, np.tile(costs[:, None], 200)).worst(8))
    table[6] *= 1.2
    assert [one.rank for one in losses(table, costs).worst(8) if one.is_slow] == [6]


def test_rank_that_waits_for_data_is_late() -> None:
    data = np.full(8, 0.2)
    data[4] = 4.0
    worst = losses(noisy(8, 200), data_wait=data).worst(1)[0]
    assert (worst.rank, worst.is_slow) == (4, True)
    assert worst.data_excess == pytest.approx(worst.excess, rel=0.2)
    assert "most of it waiting for data" in text([worst])


def test_rank_that_waits_for_others_is_not_the_one_they_wait_for() -> None:
    table, exposed = noisy(4, 200), np.full(4, 2.0)
    table[0] *= 1.2
    exposed[0] = 0.1
    assert losses(table, exposed=exposed).worst(1)[0].is_slow
    exposed[0] = 5.0
    assert not losses(table, exposed=exposed).worst(1)[0].is_slow


def test_tally_of_parts_is_that_of_the_whole() -> None:
    table, tally = noisy(6, 30), StragglerTally()
    for part in np.split(table, 3, axis=1):
        tally.add(part)
    for mine, whole in zip(tally.worst(6), losses(table).worst(6), strict=True):
        assert mine == pytest.approx(whole)


def test_edges() -> None:
    assert StragglerTally().worst(3) == []
    assert losses(np.zeros((4, 5))).worst(3) == []
    assert losses(np.ones((1, 5))).worst(3) == []
    table = noisy(4, 5)
    table[2, 1] = np.nan
    assert losses(table).steps == 4
    assert losses(np.full((2, 1), np.nan)).worst(1) == []
    with pytest.raises(ValueError, match="ranks, steps"):
        losses(np.ones(3))
    tally = StragglerTally()
    tally.add(table)
    with pytest.raises(ValueError, match="4 ranks"):
        tally.add(noisy(5, 5))


def test_cheap_for_many_ranks() -> None:
    table, tally = noisy(4096, 10), StragglerTally()
    taken = []
    for _ in range(20):
        start = time.perf_counter()
        tally.add(table)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 5e-3
