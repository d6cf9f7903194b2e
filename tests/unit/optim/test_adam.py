"""Adam with L2 and NAdam with decoupled decay against plain statements of their papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.bucketwise import BucketwiseOptimizer
from bert_fast.optim.build import build_optimizer, has_decay

BETA1, BETA2, EPS, DECAY = 0.83, 0.925, 1e-6, 0.0166629
SHAPES: dict[str, tuple[int, ...]] = {"weight": (7, 5), "other.weight": (3,), "bias": (5,), "norm.weight": (4,)}


class Plain:
    """One number after the other in fp64."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = {name: w.copy() for name, w in weights.items()}
        self.first = {name: np.zeros_like(w) for name, w in weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in weights.items()}
        self.count, self.product = 0, 1.0

    def adam(self, gradients: dict[str, np.ndarray], lr: float) -> None:
        """Algorithm 1 of arXiv 1412.6980, with the gradient of DECAY / 2 * |w|^2 in the gradient."""
        self.count += 1
        for name, gradient in gradients.items():
            self._moments(name, gradient + (DECAY if has_decay(name) else 0.0) * self.weights[name])
            first = self.first[name] / (1 - BETA1**self.count)
            second = self.second[name] / (1 - BETA2**self.count)
            self.weights[name] = self.weights[name] - lr * first / (np.sqrt(second) + EPS)

    def nadamw(self, gradients: dict[str, np.ndarray], lr: float) -> None:
        """Dozat's algorithm 2 with his schedule of the momentum, and weights that decay by themselves."""
        self.count += 1
        mu = BETA1 * (1 - 0.5 * 0.96 ** (0.004 * self.count))
        mu_next = BETA1 * (1 - 0.5 * 0.96 ** (0.004 * (self.count + 1)))
        self.product *= mu
        for name, gradient in gradients.items():
            self._moments(name, gradient)
            ahead = mu_next * self.first[name] / (1 - self.product * mu_next)
            first = ahead + (1 - mu) * gradient / (1 - self.product)
            second = self.second[name] / (1 - BETA2**self.count)
            decayed = self.weights[name] * (1 - lr * (DECAY if has_decay(name) else 0.0))
            self.weights[name] = decayed - lr * first / (np.sqrt(second) + EPS)

    def _moments(self, name: str, gradient: np.ndarray) -> None:
        self.first[name] = BETA1 * self.first[name] + (1 - BETA1) * gradient
        self.second[name] = BETA2 * self.second[name] + (1 - BETA2) * gradient * gradient


def random_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def make(name: str) -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
    parameters = {each: nn.Parameter(torch.tensor(w)) for each, w in random_weights().items()}
    config = OptimizerConfig(name=name, lr=1.0, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY)
    return build_optimizer(parameters.items(), config), parameters


# NAdam's product of momenta is a float32 in torch
@pytest.mark.parametrize(("name", "rounding"), [("adam", 1e-11), ("nadamw", 3e-7)])
def test_weights_equal_the_plain_statement_over_200_steps(name: str, rounding: float) -> None:
    rng = np.random.default_rng(1)
    optimizer, parameters = make(name)
    plain = Plain(random_weights())
    for step in range(200):
        lr = 0.01 * (step + 1) / 200
        gradients = {each: rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3) for each, shape in SHAPES.items()}
        for each, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[each])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        getattr(plain, name)(gradients, lr)
        for each, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach().numpy(), plain.weights[each], rtol=rounding, atol=rounding)
    assert all(np.abs(plain.weights[each] - random_weights()[each]).max() > 1e-3 for each in SHAPES)


@pytest.mark.parametrize("name", ["adamw", "adam", "nadamw"])
def test_updates_by_bucket_are_those_of_a_whole_step(name: str) -> None:
    torch.manual_seed(0)
    whole, by_bucket = make(name), make(name)
    tensors = list(by_bucket[1].values())
    buckets = BucketwiseOptimizer(by_bucket[0], [tensors[2:], tensors[:2]])
    for _ in range(10):
        for one, other in zip(whole[1].values(), tensors, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        whole[0].step()
        for number in range(2):
            buckets.step(number)
    assert all(torch.equal(a, b) for a, b in zip(whole[1].values(), tensors, strict=True))
