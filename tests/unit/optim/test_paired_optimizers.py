"""1-bit LAMB and 0/1 Adam against plain statements of their papers, in fp64, number by number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from bert_fast.communication.zero_one import ZeroOne, zero_one
from bert_fast.config import OptimizerConfig
from bert_fast.optim.build import build_optimizer
from bert_fast.optim.onebit import TakesMomentum
from bert_fast.optim.zero_one import ZeroOneAdam
from bert_fast.parts import declare_parts

LR, BETAS, EPS, DECAY = 0.02, (0.9, 0.98), 1e-6, 0.1
EXACT = 5


def gradients(shape: tuple[int, ...], count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * (1 + 2 * (number % 4 == 3)) for number in range(count)]


def plain_onebit_lamb(start: np.ndarray, given: list[np.ndarray], parts: list[int]) -> np.ndarray:
    """`given`: gradients, and after EXACT of them momenta."""
    beta1, beta2 = BETAS
    w, m, v = start.astype(np.float64), np.zeros_like(start, np.float64), np.zeros_like(start, np.float64)
    edges = np.cumsum([0, *parts])
    ratios, factors = [0.0] * len(parts), [1.0] * len(parts)
    fresh = v
    for t, g in enumerate(given, start=1):
        if t <= EXACT:
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
            frozen = fresh = v
        else:
            reconstructed = (g - beta1 * m) / (1 - beta1)
            fresh = beta2 * fresh + (1 - beta2) * reconstructed**2
            m = g
        denominator = np.sqrt(frozen / (1 - beta2 ** min(t, EXACT))) + EPS
        adam = m / (1 - beta1**t) / denominator
        update = adam + DECAY * w
        for i, (low, high) in enumerate(itertools.pairwise(edges)):
            norm = np.linalg.norm(update[low:high])
            if t <= EXACT:
                ratio = np.linalg.norm(w[low:high]) / norm
                ratios[i] = 0.9 * ratios[i] + 0.1 * ratio
            else:
                quotient = (denominator / (np.sqrt(fresh / (1 - beta2**t)) + EPS))[low:high].max()
                share = min(1.0, np.linalg.norm(adam[low:high]) / norm)
                wanted = min(max(quotient * share + 1 - share, 0.5), 4.0)
                factors[i] = min(max(wanted, 0.9 * factors[i]), 1.1 * factors[i])
                ratio = ratios[i] / (1 - 0.9**EXACT) * factors[i]
            w[low:high] -= LR * ratio * update[low:high]
    return w


def test_onebit_lamb_is_the_plain_statement() -> None:
    parts = [3, 3, 2]
    parameter = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    declare_parts(parameter, parts)
    start = parameter.detach().numpy().copy()
    settings = OptimizerConfig(name="onebit_lamb", lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY)
    optimizer = build_optimizer([("layers.0.matrix", parameter)], settings)
    assert isinstance(optimizer, TakesMomentum)
    done = 0
    optimizer.takes_momentum = lambda: done >= EXACT
    given = gradients((8, 6), 40, 1)
    given[EXACT:] = [0.3 * g for g in given[EXACT:]]
    for g in given:
        parameter.grad = g.clone()
        optimizer.step()
        done += 1
    factors = optimizer.state[parameter]["factor"]
    assert not torch.equal(factors, torch.ones_like(factors)), "the factor must have had something to follow"
    expected = plain_onebit_lamb(start, [g.numpy().astype(np.float64) for g in given], parts)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=2e-5, atol=2e-6)


class Ranks:
    """Ranks with a tensor each, whose momentum is averaged without loss."""

    def __init__(self, count: int, wire: ZeroOne) -> None:
        self.wire, self.step_number = wire, 0
        start = torch.randn(7, generator=torch.Generator().manual_seed(3))
        self.parameters = [nn.Parameter(start.clone()) for _ in range(count)]
        settings = OptimizerConfig(
            name="zero_one_adam", lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY
        )
        self.optimizers = [build_optimizer([("layers.0.matrix", p)], settings) for p in self.parameters]
        for optimizer in self.optimizers:
            assert isinstance(optimizer, ZeroOneAdam)
            optimizer.kind = lambda: wire.kind_of(self.step_number)

    def step(self, lr: float, given: list[torch.Tensor]) -> None:
        kind = self.wire.kind_of(self.step_number)
        messages = []
        for optimizer, parameter, gradient in zip(self.optimizers, self.parameters, given, strict=True):
            assert isinstance(optimizer, ZeroOneAdam)
            for group in optimizer.param_groups:
                group["lr"] = lr
            message = gradient.clone()
            if kind == "synced":
                message = (1 - BETAS[0]) * message + BETAS[0] * optimizer.state[parameter]["exp_avg"]
                local = optimizer.local_sum(parameter)
                if local is not None:
                    rate = optimizer.rate()
                    message = (rate * message + local) / (optimizer.summed_rates + rate)
            messages.append(message)
        if kind != "local":
            messages = [torch.stack(messages).mean(0)] * len(messages)
        for optimizer, parameter, message in zip(self.optimizers, self.parameters, messages, strict=True):
            parameter.grad = message.clone()
            optimizer.step()
        self.step_number += 1


def plain_zero_one(
    start: np.ndarray, given: list[list[np.ndarray]], kinds: list[str], rates: list[float]
) -> np.ndarray:
    """The weights of all ranks after the last exchange, with each rank's own weights in between."""
    beta1, beta2 = BETAS
    count = len(given[0])
    weights = [start.astype(np.float64) for _ in range(count)]
    synced = start.astype(np.float64)
    m = [np.zeros_like(synced) for _ in range(count)]
    u = [np.zeros_like(synced) for _ in range(count)]
    v, learned, rate_sum, left = np.zeros_like(synced), 0, 0.0, 1.0
    for t, (gs, kind, lr) in enumerate(zip(given, kinds, rates, strict=True), start=1):
        rate, decay = lr / (1 - beta1**t), 1 - lr * DECAY
        left *= decay
        if kind == "exact":
            g = np.mean(gs, axis=0)
            v, learned, gs = beta2 * v + (1 - beta2) * g**2, learned + 1, [g] * count
        m = [beta1 * mine + (1 - beta1) * g for mine, g in zip(m, gs, strict=True)]
        u = [total + rate * mine for total, mine in zip(u, m, strict=True)]
        rate_sum += rate
        denominator = np.sqrt(v / (1 - beta2**learned)) + EPS
        if kind == "local":
            weights = [decay * w - rate * mine / denominator for w, mine in zip(weights, m, strict=True)]
            continue
        mean = np.mean(u, axis=0)
        synced = synced * left - mean / denominator
        m, u, weights = [mean / rate_sum] * count, [np.zeros_like(synced)] * count, [synced] * count
        rate_sum, left = 0.0, 1.0
    return np.stack(weights)


def numbers(count: int, ranks: int) -> Iterator[list[torch.Tensor]]:
    of_each = [gradients((7,), count, 10 + rank) for rank in range(ranks)]
    for number in range(count):
        yield [mine[number] for mine in of_each]


@pytest.mark.parametrize("count", [23, 24, 26])
def test_zero_one_adam_is_the_plain_statement(count: int) -> None:
    wire = zero_one(torch.float32, 1.0, exact_steps=8, var_update_scaler=2, local_step_scaler=4, local_step_clipper=4)
    kinds = [wire.kind_of(step) for step in range(count)]
    assert set(kinds) == {"exact", "synced", "local"}
    ranks = Ranks(3, wire)
    start = ranks.parameters[0].detach().numpy().copy()
    given = list(numbers(count, 3))
    rates = [LR * (1 + math.sin(step)) for step in range(count)]
    for lr, mine in zip(rates, given, strict=True):
        ranks.step(lr, mine)
    expected = plain_zero_one(start, [[g.numpy().astype(np.float64) for g in gs] for gs in given], kinds, rates)
    found = np.stack([p.detach().numpy() for p in ranks.parameters])
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    assert (kinds[-1] == "local") == (not np.array_equal(found[0], found[1]))


def test_when_the_second_moment_learns_and_when_steps_are_local() -> None:
    wire = zero_one(torch.float32, 1.0, exact_steps=20, var_update_scaler=3, local_step_scaler=4, local_step_clipper=4)
    assert [step for step in range(20) if wire.kind_of(step) == "exact"] == [0, 1, 2, 4, 6, 8, 12, 16]
    assert [step - 20 for step in range(20, 44) if wire.kind_of(step) == "synced"] == [
        *(0, 1, 2, 3), *(5, 7), *(11, 15, 19, 23)
    ]  # fmt: skip
    never = zero_one(torch.float32, 1.0, exact_steps=2, local_step_clipper=1)
    assert {never.kind_of(step) for step in range(2, 5000)} == {"synced"}
