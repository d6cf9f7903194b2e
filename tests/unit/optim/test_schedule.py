"""The learning rate over steps: warm-up and every decay against plain statements."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bert_fast.config import ScheduleConfig
from bert_fast.config.choices import DECAYS
from bert_fast.config.load import load_config
from bert_fast.optim.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[3]


def plain_schedule(num_steps: int, base: float, s: ScheduleConfig) -> np.ndarray:
    """Rates of updates 0 ... num_steps - 1, as arrays: warm-up branch, decay branch, which of them."""
    first = 0 if s.counting == "reference" or s.start_warmup_step == 0 else 1
    count = np.arange(num_steps, dtype=np.float64) + first
    since = count - s.start_warmup_step
    warmup = base * np.maximum(since, 0) / max(s.warmup_steps, 1)
    left = 1 - np.clip(count, 0, s.total_steps) / s.total_steps
    return np.where(since < s.warmup_steps, warmup, s.end_lr + (base - s.end_lr) * left**s.power)


@pytest.mark.parametrize(
    "values",
    [
        {"total_steps": 100},
        {"total_steps": 100, "warmup_steps": 10},
        {"total_steps": 100, "warmup_steps": 10, "end_lr": 2e-5, "power": 0.5},
        {"total_steps": 179, "warmup_steps": 82, "start_warmup_step": -16, "end_lr": 0.0000494549100544884},
        {"total_steps": 600, "warmup_steps": 290, "start_warmup_step": -100, "power": 1.0},
        {"total_steps": 700, "warmup_steps": 200_330, "start_warmup_step": -200_000},
        {"total_steps": 50, "warmup_steps": 10, "start_warmup_step": 5, "power": 2.0},
        {"total_steps": 10, "warmup_steps": 40},
        {"total_steps": 179, "warmup_steps": 82, "start_warmup_step": -16, "counting": "reference"},
        {"total_steps": 50, "warmup_steps": 10, "start_warmup_step": 5, "counting": "reference"},
        {"total_steps": 100, "warmup_steps": 10, "counting": "reference"},
    ],
)
def test_schedule_equals_the_plain_statement(values: dict[str, Any]) -> None:
    schedule = ScheduleConfig.model_validate(values)
    base = 0.00039299421615882676
    rates = [learning_rate(step, base, schedule) for step in range(900)]
    np.testing.assert_allclose(rates, plain_schedule(900, base, schedule), rtol=1e-12, atol=1e-18)


def test_schedule_by_hand() -> None:
    schedule = ScheduleConfig(total_steps=10, warmup_steps=4, end_lr=0.1)
    rates = [learning_rate(step, 1.0, schedule) for step in range(13)]
    assert rates[:4] == [0.0, 0.25, 0.5, 0.75]
    assert rates[4] == pytest.approx(0.9 * 0.6 + 0.1)
    assert rates[9] == pytest.approx(0.9 * 0.1 + 0.1)
    assert rates[10:] == [0.1] * 3


def test_schedule_of_the_published_adam_run_with_mlperfs_decay() -> None:
    """82 warm-up steps from step -16: the first update is on its way up already, the 179th at the end value."""
    end = 0.0000494549100544884
    schedule = ScheduleConfig(total_steps=179, warmup_steps=82, start_warmup_step=-16, end_lr=end)
    base = 0.00039299421615882676
    assert learning_rate(0, base, schedule) == pytest.approx(base * 17 / 82)
    assert learning_rate(64, base, schedule) == pytest.approx(base * 81 / 82)
    assert learning_rate(65, base, schedule) == pytest.approx(end + (base - end) * (1 - 66 / 179))
    assert learning_rate(178, base, schedule) == pytest.approx(end)
    assert learning_rate(298, base, schedule) == end


def test_warm_up_that_starts_later_than_zero_without_steps() -> None:
    assert learning_rate(0, 1.0, ScheduleConfig(total_steps=10, start_warmup_step=5)) == 0.0


def test_the_submissions_are_one_update_ahead_of_the_reference() -> None:
    """By hand: warm-up over 10 steps from step -4, decay over 40."""
    both = {
        counting: ScheduleConfig(total_steps=40, warmup_steps=10, start_warmup_step=-4, counting=counting)
        for counting in ("nvidia", "reference")
    }
    rates = {name: [learning_rate(step, 1.0, schedule) for step in range(42)] for name, schedule in both.items()}
    assert ScheduleConfig(total_steps=40).counting == "nvidia"
    assert rates["reference"][:7] == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1 - 6 / 40])
    assert rates["reference"][39:] == pytest.approx([1 / 40, 0.0, 0.0])
    assert rates["nvidia"][:41] == rates["reference"][1:]


# ---- other decays ---------------------------------------------------------------------------------------------------


def plain_decay(count: int, base: float, s: ScheduleConfig) -> float:
    """The rate of an update after the warm-up, case by case."""
    first = s.warmup_steps if s.decay_from == "warmup_end" else 0
    if count <= first:
        done = 0.0
    elif count >= s.total_steps:
        done = 1.0
    else:
        done = (count - first) / (s.total_steps - first)
    if s.decay == "polynomial":
        return s.end_lr + (base - s.end_lr) * (1 - done) ** s.power
    if s.decay == "cosine":
        return s.end_lr + (base - s.end_lr) * math.cos(math.pi * done / 2) ** 2
    if s.decay == "linear_to_zero":
        return base - base * done
    if s.decay == "warmup_stable_decay":
        length = s.total_steps // 10 if s.decay_steps is None else s.decay_steps
        if count <= s.total_steps - length:
            return base
        return (
            s.end_lr if count >= s.total_steps else base + (s.end_lr - base) * (count - s.total_steps + length) / length
        )
    if s.decay == "steps":
        for milestone in s.milestones:
            if count >= milestone:
                base = base * s.gamma
    return base


CASES: list[dict[str, Any]] = [
    {"decay": "polynomial", "power": 2.0, "end_lr": 0.01, "decay_from": "warmup_end"},
    {"decay": "cosine", "end_lr": 0.01},
    {"decay": "cosine", "decay_from": "warmup_end"},
    {"decay": "linear_to_zero"},
    {"decay": "linear_to_zero", "decay_from": "warmup_end"},
    {"decay": "warmup_stable_decay", "end_lr": 0.02},
    {"decay": "warmup_stable_decay", "decay_steps": 33},
    {"decay": "warmup_stable_decay", "decay_steps": 100},
    {"decay": "steps", "milestones": [5, 40, 41, 99, 120], "gamma": 0.5},
    {"decay": "constant"},
]


@pytest.mark.parametrize("values", CASES)
@pytest.mark.parametrize("start", [0, -6])
def test_every_decay_equals_its_plain_statement(values: dict[str, Any], start: int) -> None:
    schedule = ScheduleConfig(total_steps=100, warmup_steps=20, start_warmup_step=start, **values)
    for step in range(130):
        count = step + 1 if start else step
        since = count - start
        expected = 0.3 * since / 20 if since < 20 else plain_decay(count, 0.3, schedule)
        assert learning_rate(step, 0.3, schedule) == pytest.approx(expected, rel=1e-12, abs=1e-15), step


def test_every_decay_has_a_case() -> None:
    assert {case["decay"] for case in CASES} == set(DECAYS)


def test_short_decays_have_a_step() -> None:
    """A tenth of a few steps is one step at least."""
    schedule = ScheduleConfig(total_steps=4, decay="warmup_stable_decay")
    assert [learning_rate(step, 1.0, schedule) for step in range(6)] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["bert_large_1024xa100_adam", "bert_large_1368xa100_adam"])
def test_the_published_adam_points_decay_from_the_end_of_the_warm_up(name: str) -> None:
    """Ten steps: the base rate is kept from the end of the warm-up, which is at count 66, up to count 82, and a line leads
    to the end rate at count 179. Update number n, from 0, has count n + 1."""
    config = load_config(ROOT / f"configs/{name}.yaml")
    base, end = 0.00039299421615882676, 0.0000494549100544884
    assert (config.optimizer.lr, config.schedule.end_lr) == (base, end)
    by_count = {
        1: base * 17 / 82,
        40: base * 56 / 82,
        65: base * 81 / 82,
        66: base,
        82: base,
        83: base - (base - end) / 97,
        131: base - (base - end) * 49 / 97,
        178: base - (base - end) * 96 / 97,
        179: end,
        250: end,
    }
    found = {count: learning_rate(count - 1, config.optimizer.lr, config.schedule) for count in by_count}
    assert found == pytest.approx(by_count, rel=1e-12)


def test_a_later_warm_up_is_not_cut_by_the_decay() -> None:
    """An offset above 0 makes the warm-up end later, and `decay_from: warmup_end` begins there."""
    schedule = ScheduleConfig(
        warmup_steps=4, start_warmup_step=4, total_steps=12, decay_from="warmup_end", counting="reference"
    )
    rates = [learning_rate(step, 1.0, schedule) for step in range(13)]
    assert rates == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0]
