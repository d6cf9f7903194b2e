"""The sharded variant's planner against brute force, and its delays against a simulation of both passes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bert_fast.communication.plan import exact_plan, uniform_ends
from bert_fast.communication.plan_sharded import ShardedTimes, delays, sharded_plan
from scripts.benchmarks.bucket_planner import random_timeline as random_case


def random_times(seed: int, most: int) -> ShardedTimes:
    ready, sizes, scatter = random_case(seed, most)
    rng = np.random.default_rng(seed + 10_000)
    gather = type(scatter)(scatter.latency_s * rng.uniform(0.5, 2), scatter.bytes_per_s * rng.uniform(0.3, 2))
    needed = (ready[-1] - ready) * rng.uniform(0.2, 0.8)
    return ShardedTimes(ready, needed, sizes, sizes * rng.choice([1.0, 2.0]), scatter, gather)


def simulate(times: ShardedTimes, ends: tuple[int, ...]) -> tuple[float, float]:
    """Walk through backward, then through forward unit by unit."""
    edges, now = [0, *ends], 0.0
    for begin, end in itertools.pairwise(edges):
        now = max(now, times.ready_s[end - 1]) + float(times.scatter(times.sizes[begin:end].sum()))
    arrival, clock = {}, 0.0
    for begin, end in reversed(list(itertools.pairwise(edges))):
        clock += float(times.gather(times.weight_sizes[begin:end].sum()))
        arrival.update(dict.fromkeys(range(begin, end), clock))
    delay = 0.0
    for unit in reversed(range(len(times.sizes))):
        delay = max(delay, arrival[unit] - times.needed_s[unit])
    return now - times.ready_s[-1], delay


def all_plans(n: int) -> list[tuple[int, ...]]:
    return [(*cut, n) for k in range(n) for cut in itertools.combinations(range(1, n), k)]


def test_delays_are_those_of_a_simulation() -> None:
    for seed in range(50):
        times = random_times(seed, 7)
        for ends in all_plans(len(times.sizes)):
            assert delays(times, ends) == pytest.approx(simulate(times, ends), rel=1e-9, abs=1e-12)


def test_near_brute_force_on_300_small_cases() -> None:
    over = []
    for seed in range(300):
        times = random_times(seed, 9)
        best = min(sum(delays(times, ends)) for ends in all_plans(len(times.sizes)))
        compute = times.ready_s[-1] + times.needed_s.max()
        over.append((compute + sum(delays(times, sharded_plan(times)))) / (compute + best))
    assert min(over) >= 1 - 1e-12
    assert np.mean(np.array(over) < 1 + 1e-9) > 0.95, "mostly the best there is"
    assert max(over) < 1.05


def test_never_worse_than_its_starts() -> None:
    for seed in range(100):
        times = random_times(seed, 40)
        ours = sum(delays(times, sharded_plan(times)))
        n = len(times.sizes)
        for other in (
            exact_plan(times.ready_s, times.sizes, times.scatter).ends, (n,), tuple(range(1, n + 1)),
            tuple(uniform_ends(times.sizes, 3e6)),
        ):  # fmt: skip
            assert ours <= sum(delays(times, other)) * (1 + 1e-9)


def test_bounds_of_sizes_hold() -> None:
    for seed in range(40):
        times = random_times(seed, 30)
        limit = 3 * times.sizes.max()
        ends = sharded_plan(times, min_bytes=0.0, max_bytes=limit)
        for begin, end in itertools.pairwise([0, *ends]):
            assert end - begin == 1 or times.sizes[begin:end].sum() <= limit
