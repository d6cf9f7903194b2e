"""Schedule-free AdamW against a plain statement of the paper, with our schedule's rates."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.optim.build import RunOptimizer, build_optimizer

pytest.importorskip("schedulefree")

BETA1, BETA2, EPS, DECAY = 0.9, 0.95, 1e-6, 0.1


class PlainScheduleFree:
    """arXiv 2405.15682, algorithm 1: three sequences, each by its own line. In numpy, float64."""

    def __init__(self, weights: np.ndarray, decay: float) -> None:
        self.x, self.z, self.decay = weights.copy(), weights.copy(), decay
        self.second = np.zeros_like(weights)
        self.count, self.largest, self.sum = 0, 0.0, 0.0

    @property
    def y(self) -> np.ndarray:
        return (1 - BETA1) * self.z + BETA1 * self.x

    def step(self, gradient: np.ndarray, lr: float) -> None:
        y = self.y
        self.count += 1
        self.second = BETA2 * self.second + (1 - BETA2) * gradient**2
        denominator = np.sqrt(self.second / (1 - BETA2**self.count)) + EPS
        self.z = self.z - lr * (gradient / denominator + self.decay * y)
        self.largest = max(self.largest, lr)
        self.sum += self.largest**2
        share = self.largest**2 / self.sum if self.sum else 0.0
        self.x = (1 - share) * self.x + share * self.z


def config() -> OptimizerConfig:
    return OptimizerConfig(name="schedule_free", beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY)


def step(optimizer: RunOptimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def test_it_equals_the_paper_over_100_steps_with_a_warm_up_from_zero() -> None:
    rng = np.random.default_rng(0)
    start = {"weight": rng.standard_normal((4, 3)), "bias": rng.standard_normal(4)}
    parameters = {name: nn.Parameter(torch.tensor(w)) for name, w in start.items()}
    optimizer = build_optimizer(parameters.items(), config())
    plain = {name: PlainScheduleFree(w, DECAY if name == "weight" else 0.0) for name, w in start.items()}
    for number in range(100):
        lr = 0.02 * min(1.0, number / 10)
        for name, parameter in parameters.items():
            gradient = rng.standard_normal(parameter.shape)
            parameter.grad = torch.tensor(gradient)
            plain[name].step(gradient, lr)
        step(optimizer, lr)
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach(), plain[name].y, rtol=1e-10, atol=1e-11)
            np.testing.assert_allclose(optimizer.state[parameter]["z"], plain[name].z, rtol=1e-10, atol=1e-11)
    optimizer.write_evaluated_weights()
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach(), plain[name].x, rtol=1e-9, atol=1e-10)
        assert np.abs(plain[name].x - plain[name].y).max() > 1e-3


def test_before_the_first_step_the_weights_are_evaluated_as_they_are() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([("weight", weight)], config())
    optimizer.write_evaluated_weights()
    assert weight.tolist() == [1.0, 1.0, 1.0]
    weight.grad = torch.ones(3)
    step(optimizer, 0.1)  # the package refuses a step where it believes to be evaluated


def test_without_its_package_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(
        UserError,
        match=r"needs the package schedulefree, .* not installed; python -m pip install -c constraints.txt schedulefree$",
    ):
        build_optimizer([("weight", nn.Parameter(torch.ones(3)))], config())


def test_beta1_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer\.beta1=0: .*; set beta1 above 0"):
        build_optimizer([("weight", nn.Parameter(torch.ones(3)))], OptimizerConfig(name="schedule_free", beta1=0.0))
