"""The bucket planner against brute force, its peers and the lower bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_fast.communication.plan import (
    Link,
    best_uniform,
    exact_plan,
    fit_link,
    lower_bound,
    merge_rule,
    tabulate_link,
    timeline,
    uniform_ends,
)  # fmt: skip
from scripts.benchmarks.bucket_planner import random_timeline as random_case


def brute_force(ready: np.ndarray, sizes: np.ndarray, link: Link) -> float:
    inner = range(1, len(ready))
    cuts = itertools.chain.from_iterable(itertools.combinations(inner, k) for k in range(len(ready)))
    return min(timeline(ready, sizes, [*cut, len(ready)], link).exposed_s for cut in cuts)


def test_exact_is_brute_force_on_500_small_cases() -> None:
    for seed in range(500):
        ready, sizes, link = random_case(seed, most=8)
        assert exact_plan(ready, sizes, link).exposed_s == pytest.approx(brute_force(ready, sizes, link), rel=1e-12)


def test_never_worse_than_its_peers_on_2000_timelines() -> None:
    better = 0
    for seed in range(2000):
        ready, sizes, link = random_case(seed)
        ours = exact_plan(ready, sizes, link)
        peers = [
            merge_rule(ready, sizes, link),
            *(timeline(ready, sizes, uniform_ends(sizes, cap), link) for cap in (0, 1e6, 25 * 2**20, np.inf)),
        ]
        if seed % 20 == 0:
            peers.append(best_uniform(ready, sizes, link)[0])
        best = min(plan.finish_s[-1] for plan in peers)
        assert ours.finish_s[-1] <= best * (1 + 1e-12)
        assert ours.exposed_s >= lower_bound(ready, sizes, link) - 1e-12
        better += ours.finish_s[-1] < best * (1 - 1e-6)
    assert better > 500


@given(st.integers(0, 10_000), st.floats(0, 5e6), st.floats(1e5, 2e7))
def test_bucket_limits_are_kept(seed: int, least: float, most: float) -> None:
    ready, sizes, link = random_case(seed, most=20)
    if least > most / 2:
        least = 0.0
    try:
        plan = exact_plan(ready, sizes, link, min_bytes=least, max_bytes=most)
    except ValueError:
        assert least > 0
        return
    edges = [0, *plan.ends]
    for number, (a, b) in enumerate(itertools.pairwise(edges)):
        assert sizes[a:b].sum() <= most or b == a + 1
        assert sizes[a:b].sum() >= least - 1e-6 or number == len(plan.ends) - 1
    assert plan.exposed_s >= exact_plan(ready, sizes, link).exposed_s - 1e-12


def test_timeline_by_hand() -> None:
    plan = timeline(np.array([1.0, 2.0, 3.0]), np.array([10.0, 10.0, 20.0]), [1, 3], Link(0.5, 20.0))
    assert plan.starts_s == (1.0, 3.0)
    assert plan.finish_s == (2.0, 5.0)
    assert plan.exposed_s == 2.0


def test_a_cheap_link_sends_at_once_and_a_slow_start_sends_together() -> None:
    ready, sizes = np.arange(1.0, 9.0), np.full(8, 1e6)
    assert exact_plan(ready, sizes, Link(1e-6, 1e9)).exposed_s == pytest.approx(1e-6 + 1e-3)
    assert exact_plan(ready, sizes, Link(1e-6, 1e9)).ends == (7, 8), "no more buckets than it takes"
    assert exact_plan(ready, sizes, Link(100.0, 1e9)).ends == (8,)


def test_ready_times_that_fall_are_taken_as_running_maxima() -> None:
    ready, sizes, link = np.array([1.0, 3.0, 2.0]), np.ones(3), Link(0.1, 10.0)
    assert exact_plan(ready, sizes, link) == exact_plan(np.array([1.0, 3.0, 3.0]), sizes, link)


def test_link_is_fitted_to_times() -> None:
    rng = np.random.default_rng(0)
    sizes = np.repeat([1e3, 1e5, 1e6, 1e7], 5)
    times = (2e-3 + sizes / 25e6) * (1 + 0.02 * rng.standard_normal(20))
    link = fit_link(sizes, times)
    assert link.latency_s == pytest.approx(2e-3, rel=0.05)
    assert link.bytes_per_s == pytest.approx(25e6, rel=0.05)
    for bad in (([1e6], [1.0]), ([1e6, 1e6], [1.0, 1.0]), ([1e5, 1e6], [1.0, 0.0]), ([1e3, 1e8], [1.0, 1e-6])):
        with pytest.raises(ValueError, match="a link is fitted to|do not grow"):
            fit_link(*bad)


def test_table_rises_and_goes_on_beyond_its_ends() -> None:
    link = tabulate_link([1e3, 1e4, 1e5, 1e6], [2.0, 1.0, 3.0, 12.0])
    np.testing.assert_allclose(link(np.array([1e3, 1e4, 1e5, 1e6, 2e6])), [1.5, 1.5, 3.0, 12.0, 22.0])
    grid = link(np.geomspace(1, 1e8, 200))
    assert (np.diff(grid) >= 0).all()
    assert (grid >= 0).all()
