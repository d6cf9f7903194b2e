"""The two clocks of a run: MLPerf's, which is never paused, and that of throughput, which is."""

from __future__ import annotations

import pytest

from bert_fast.train import clock as clock_module
from bert_fast.train.clock import Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """`now[0]` is what time.perf_counter says."""
    seconds = [100.0]
    monkeypatch.setattr(clock_module.time, "perf_counter", lambda: seconds[0])
    return seconds


def test_clock_is_never_paused_and_training_is(now: list[float]) -> None:
    clock = Clock()
    now[0] = 150.0  # before run_start: counts for nothing
    clock.start()
    now[0] += 10
    with clock.pause("evaluation"):
        now[0] += 3
    now[0] += 2
    with clock.pause("checkpoint"):
        now[0] += 4
    with clock.pause("evaluation"):
        now[0] += 1
    assert clock.elapsed == 20
    assert clock.training == 12
    assert clock.paused == {"evaluation": 4, "checkpoint": 4}


def test_clock_counts_a_pause_that_ends_in_an_error(now: list[float]) -> None:
    clock = Clock()
    clock.start()

    def evaluate() -> None:
        with clock.pause("evaluation"):
            now[0] += 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert clock.paused == {"evaluation": 3}


def test_clock_of_a_resumed_run_goes_on(now: list[float]) -> None:
    first = Clock()
    first.start()
    now[0] += 10
    with first.pause("evaluation"):
        now[0] += 2
    state = first.state_dict()
    now[0] += 1000  # the time between the sessions is nobody's
    second = Clock()
    second.start()
    second.load_state_dict(state)
    now[0] += 5
    assert second.elapsed == 17
    assert second.training == 15
    with second.pause("evaluation"):
        now[0] += 1
    assert second.paused == {"evaluation": 3}
    assert state["paused"] == {"evaluation": 2}, "the loaded state is a copy"
