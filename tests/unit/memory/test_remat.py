"""Plans of rematerialization against brute force, against a plain quadratic form, and against what is known in closed form."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest

from bert_fast.memory.remat import (
    BudgetTooSmallError,
    Chain,
    Plan,
    Segment,
    Stage,
    fastest_within,
    keep_all,
    least_peak,
    make_plan,
    pareto,
    peak_of,
    recompute_runs,
)


def random_chain(rng: random.Random, longest: int = 8) -> Chain:
    """Few sizes, so that equal ones are frequent; every kind of bytes may be absent."""
    scale = rng.choice([2, 5, 40])
    grows = rng.random() < 0.5
    stages = tuple(
        Stage(
            f"stage {k}",
            output_bytes=rng.randint(0, scale),
            saved_bytes=rng.choice([0, rng.randint(0, 3 * scale)]),
            forward_s=rng.randint(1, 6) * 1e-3,
            temporary_bytes=rng.randint(0, scale),
            gradient_bytes=rng.randint(0, scale) if grows else 0,
        )
        for k in range(rng.randint(1, longest))
    )
    return Chain(stages, rng.randint(0, scale))


def every_plan(chain: Chain) -> Iterator[Plan]:
    n = len(chain.stages)
    for kept in itertools.product([False, True], repeat=n):
        runs = [
            [kept[k] or k == 0 or kept[k - 1] or cut for k, cut in enumerate(cuts)]
            for cuts in itertools.product([False, True], repeat=n)
        ]
        for starts in {tuple(each) for each in runs}:
            begins = [k for k in range(n) if starts[k]]
            yield make_plan(
                chain, [Segment(begin, end, not kept[begin]) for begin, end in itertools.pairwise([*begins, n])]
            )


def front_of(plans: Iterator[Plan]) -> list[tuple[int, float]]:
    """Peak and time of those that no other one beats."""
    front: list[tuple[int, float]] = []
    for peak, time in sorted({(plan.peak_bytes, round(plan.recompute_s, 9)) for plan in plans}):
        if not front or time < front[-1][1]:
            front.append((peak, time))
    return front


@pytest.mark.parametrize("seed", range(30))
def test_both_objectives_equal_brute_force(seed: int) -> None:
    """3,000 chains: 100 of each seed. Every budget between the least peak and that of keeping all has its best plan."""
    rng = random.Random(seed)
    for _ in range(100):
        chain = random_chain(rng, 6)
        front = front_of(every_plan(chain))
        least, curve = least_peak(chain), pareto(chain)
        assert least.peak_bytes == front[0][0]
        assert least.peak_bytes == peak_of(chain, least.segments)
        assert [(plan.peak_bytes, round(plan.recompute_s, 9)) for plan in curve] == front
        assert all(plan.peak_bytes == peak_of(chain, plan.segments) for plan in curve)
        for budget in range(front[0][0] - 1, front[-1][0] + 2):
            allowed = [time for peak, time in front if peak <= budget]
            if allowed:
                assert round(fastest_within(curve, budget).recompute_s, 9) == min(allowed)
            else:
                with pytest.raises(BudgetTooSmallError) as caught:
                    fastest_within(curve, budget)
                assert caught.value.least_bytes == front[0][0]


def quadratic(chain: Chain) -> int:
    """M(0) by its recurrence as it stands, from the definition of B."""
    stages, n = chain.stages, len(chain.stages)
    inputs = [chain.input_bytes, *(stage.output_bytes for stage in stages)]
    least = [0] * (n + 1)
    for i in reversed(range(n)):
        inside, best = 0, math.inf
        for j in range(i + 1, n + 1):
            k = j - 1
            held = sum(stages[q].saved_bytes for q in range(i, j)) + sum(inputs[i + 1 : k + 1]) + inputs[k + 1]
            grown = sum(stage.gradient_bytes for stage in stages[k:])
            inside = max(inside, held + stages[k].temporary_bytes + grown)
            best = min(best, max(inside, least[j]))
        least[i] = inputs[i] + int(best)
    return least[0]


def test_the_linear_form_equals_the_quadratic_one() -> None:
    rng = random.Random(1)
    for _ in range(300):
        chain = random_chain(rng, 40)
        assert least_peak(chain).peak_bytes == quadratic(chain)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 91, 92, 100, 1000, 10_000, 100_000])
def test_equal_stages_have_a_peak_in_closed_form(n: int) -> None:
    """Boundaries and temporaries of 1: with a peak of p the first segment has p - 2 stages, and the rest p - 1 bytes."""
    chain = Chain(tuple(Stage("", 1, 0, temporary_bytes=1) for _ in range(n)), 1)
    p = next(p for p in itertools.count(3) if (p - 1) * (p - 2) // 2 >= n)
    assert least_peak(chain).peak_bytes == p
    assert p <= math.sqrt(2 * n) + 2.5
    if n >= 100:  # Chen's segments of equal length
        length = math.isqrt(n)
        assert p < recompute_runs(chain, [*range(length, n, length)]).peak_bytes


def test_no_plan_of_equal_runs_is_below() -> None:
    rng = random.Random(2)
    for _ in range(200):
        chain = random_chain(rng, 60)
        n, peak = len(chain.stages), least_peak(chain).peak_bytes
        for length in {1, 2, max(1, math.isqrt(n)), n}:
            ends = [*range(length, n, length)]
            assert peak <= recompute_runs(chain, ends).peak_bytes
            assert peak <= recompute_runs(chain, [*ends, n]).peak_bytes
        assert peak <= keep_all(chain).peak_bytes


def test_at_most_one_more_forward_pass() -> None:
    rng = random.Random(3)
    for _ in range(50):
        chain = random_chain(rng, 40)
        for plan in (least_peak(chain), *pareto(chain)):
            assert plan.recompute_s <= chain.forward_s + 1e-12
            assert sorted(set(plan.recomputed)) == plan.recomputed


def test_fewer_points_are_still_plans() -> None:
    chain = random_chain(random.Random(4), 30)
    whole, few = pareto(chain), pareto(chain, max_points=4)
    assert few[0].peak_bytes >= whole[0].peak_bytes
    assert few[-1].recompute_s == 0
    for plan in few:
        assert plan.peak_bytes == peak_of(chain, plan.segments)
        assert plan.recompute_s >= fastest_within(whole, plan.peak_bytes).recompute_s - 1e-12


def test_segments_that_are_not_the_chains_are_refused() -> None:
    chain = Chain((Stage("a", 1, 1), Stage("b", 1, 1)))
    for segments in (
        [Segment(0, 1, True)],
        [Segment(1, 2, True)],
        [Segment(0, 2, False)],
        [Segment(0, 0, True), Segment(0, 2, True)],
    ):
        with pytest.raises(ValueError, match="segment|Segment"):
            make_plan(chain, segments)
    with pytest.raises(ValueError, match="needs a stage"):
        Chain(())
