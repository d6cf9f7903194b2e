"""What a run comes to: where its curve crosses an accuracy, and the value that a search minimises."""

from __future__ import annotations

import json
import math

import pytest
from support.tuning import outcome_of

from tuning.outcome import CurvePoint, Outcome, crossing, levels


def test_crossings_lie_between_two_evaluations() -> None:
    points = [(100.0, 0.1), (200.0, 0.3), (300.0, 0.2), (400.0, 0.4)]
    assert crossing(points, 0.2) == pytest.approx(150)
    assert crossing(points, 0.3) == 200
    assert crossing(points, 0.35) == pytest.approx(375)
    assert crossing(points, 0.05) == 100, "nothing to interpolate from before the first evaluation"
    assert crossing(points, 0.41) is None
    assert crossing([], 0.1) is None


def test_an_accuracy_that_is_not_finite_is_none() -> None:
    assert outcome_of([0.1, math.nan, 0.2]).best == 0.2
    assert outcome_of([math.nan]).best == 0.0
    assert outcome_of([0.1, math.nan, 0.3]).to(0.2) is None or outcome_of([0.1, math.nan, 0.3]).to(0.2) > 0


def test_a_run_to_the_target_counts_its_samples() -> None:
    outcome = outcome_of([0.1, 0.2, 0.4])
    assert outcome.value(0.3, 10_000) == (pytest.approx(4000), False)
    assert outcome.value(0.3, 10_000, "seconds") == (pytest.approx(2.5), False)


def test_a_run_that_misses_the_target_is_worse_than_all_that_reach_it_and_the_nearer_the_better() -> None:
    cap = 6400
    late = outcome_of([0.1, 0.2, 0.25, 0.3]).value(0.3, cap)[0]
    near, far, none = (outcome_of([best / 2, best]).value(0.3, cap) for best in (0.29, 0.15, 0.0))
    assert late <= cap < near[0] < far[0] < none[0] == 2 * cap
    assert near == (pytest.approx(cap * (1 + 0.01 / 0.3)), True)


def test_a_run_beyond_the_cap_is_not_better_for_it() -> None:
    beyond = Outcome([CurvePoint(9000, 1.0, 0.15)], 100, 9000, 1.0, 1.0, 1.0)
    assert beyond.value(0.3, 6400) == (pytest.approx(9000 * 1.5), True)


def test_the_record_is_plain_and_has_samples_to_each_level() -> None:
    assert levels(0.3) == [0.27, 0.291, 0.3]
    assert levels(0.72) == [0.27, 0.3, 0.6984, 0.72]
    record = outcome_of([0.2, 0.4]).record(0.3, 6400)
    assert json.loads(json.dumps(record)) == record
    assert record["samples_to"] == {"0.27": 2160, "0.291": pytest.approx(2328), "0.3": pytest.approx(2400)}
    assert record["curve"] == [[1600, 1.0, 0.2], [3200, 2.0, 0.4]]
    assert (record["value"], record["censored"]) == (pytest.approx(2400), False)
