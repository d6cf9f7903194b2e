"""Averages of weights against plain statements of them; what they leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bert_fast.config import AveragingConfig
from bert_fast.config.choices import AVERAGES
from bert_fast.memory.estimate import average_copies
from bert_fast.optim.averaging import WeightAverage, build_average

SHAPES = ((3, 4), (5,))
SKIPPED = (4, 9, 10)  # steps, counted from 1
YES, NO = torch.tensor(True), torch.tensor(False)


def made(parameters: list[torch.Tensor], **settings: Any) -> WeightAverage:
    average = build_average(parameters, AveragingConfig(**settings))
    assert average is not None
    return average


def walk(num_steps: int) -> list[list[np.ndarray]]:
    """Weights after each step, float64; those of a skipped step are the ones before it."""
    rng = np.random.default_rng(0)
    weights, steps = [rng.standard_normal(shape) for shape in SHAPES], []
    for number in range(1, num_steps + 1):
        if number not in SKIPPED:
            weights = [w + 0.3 * rng.standard_normal(w.shape) for w in weights]
        steps.append(weights)
    return steps


def follow(
    average: WeightAverage, parameters: list[torch.Tensor], steps: list[list[np.ndarray]], first: int = 1
) -> None:
    for number, weights in enumerate(steps, start=first):
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(torch.tensor(weight))
        average.after_step(number, NO if number in SKIPPED else YES)
        for parameter, weight in zip(parameters, weights, strict=True):
            np.testing.assert_array_equal(parameter.numpy(), weight, "an update changes no weight")


def averaged_steps(num_steps: int, every: int, start: int) -> list[int]:
    """Steps after which the average is updated."""
    return [n for n in range(1, num_steps + 1) if n > start and (n - start) % every == 0 and n not in SKIPPED]


def plain(method: str, weights: list[np.ndarray], decay: float, keep: int) -> np.ndarray:
    """The average of the weights that were taken up, in order."""
    if method == "last":
        return np.mean(weights[-keep:], axis=0)
    mean = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        share = min(decay, (1 + n) / (10 + n))
        mean = share * mean + (1 - share) * weight
    return mean


@pytest.mark.parametrize(("every", "start"), [(1, 0), (3, 0), (1, 7), (2, 5)])
@pytest.mark.parametrize("method", list(AVERAGES))
def test_an_average_equals_its_plain_statement(method: str, every: int, start: int) -> None:
    parameters = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    settings = {"decay": 0.6} if method == "exponential" else {"keep": 4}
    average = made(parameters, method=method, every_steps=every, start_step=start, **settings)
    steps = walk(30)
    for end in (start, 2, 3, 13, 30):
        again = made(parameters, method=method, every_steps=every, start_step=start, **settings)
        follow(again, parameters, steps[:end])
        taken = averaged_steps(end, every, start)
        assert again.count == len(taken)
        again.write_evaluated_weights()
        for index, parameter in enumerate(parameters):
            weights = [steps[n - 1][index] for n in taken]
            expected = plain(method, weights, 0.6, 4) if taken else steps[end - 1][index] if end else parameter
            np.testing.assert_allclose(parameter.numpy(), expected, rtol=1e-12, atol=1e-12)
    assert average.count == 0


@pytest.mark.parametrize("method", list(AVERAGES))
def test_it_goes_on_from_what_a_checkpoint_holds(method: str) -> None:
    parameters = [torch.zeros(shape) for shape in SHAPES]
    steps = [[w.astype(np.float32) for w in weights] for weights in walk(20)]
    whole = made(parameters, method=method)
    follow(whole, parameters, steps[:11])
    resumed = made(parameters, method=method)
    assert resumed.rows() == []
    resumed.restore_count(whole.count)
    assert [len(row) for row in resumed.rows()] == [2] * (1 if method == "exponential" else 5)
    for theirs, ours in zip(whole.rows(), resumed.rows(), strict=True):
        for old, new in zip(theirs, ours, strict=True):
            assert not torch.equal(old, new)
            new.copy_(old)
    results = []
    for average in (whole, resumed):
        follow(average, parameters, steps[11:], first=12)
        average.write_evaluated_weights()
        results.append([parameter.clone() for parameter in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", list(AVERAGES))
def test_a_skipped_step_changes_no_bit(method: str) -> None:
    parameters = [torch.randn(shape) for shape in SHAPES]
    average = made(parameters, method=method)
    for number in range(1, 4):
        average.after_step(number, YES)
        parameters[0].add_(0.5)
    before = [[tensor.clone() for tensor in row] for row in average.rows()]
    average.after_step(4, NO)
    assert average.count == 3
    for old, new in zip(before, average.rows(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("method", list(AVERAGES))
def test_a_rank_that_updates_nothing(method: str) -> None:
    average = made([], method=method)
    average.after_step(1, YES)
    average.write_evaluated_weights()
    assert average.count == 1
    assert not any(average.rows())


@pytest.mark.parametrize("method", list(AVERAGES))
def test_the_memory_of_an_average_is_known_before(method: str) -> None:
    parameters = [torch.zeros(shape) for shape in SHAPES]
    config = AveragingConfig(method=method)
    average = made(parameters, method=method)
    average.restore_count(100)
    held = sum(tensor.numel() for row in average.rows() for tensor in row)
    assert held == average_copies(config) * sum(parameter.numel() for parameter in parameters)


def test_none_is_none() -> None:
    assert build_average([torch.zeros(2)], AveragingConfig()) is None
    assert average_copies(AveragingConfig()) == 0
