"""LAMB with one trust ratio for several tensors, against a plain fp64 statement."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.build import build_optimizer, has_decay
from bert_fast.optim.lamb import Lamb
from bert_fast.parts import declare_parts

BETAS, EPS, DECAY = (0.83, 0.925), 1e-6, 0.0166629
SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.word.weight": (7, 4), "embeddings.norm.bias": (4,), "layers.1.qkv.weight": (6, 4), "layers.1.qkv.bias": (6,),
    "layers.10.up.weight": (5, 4), "layers.10.output_norm.weight": (4,), "heads.decoder_bias": (7,),
}  # fmt: skip
GROUPS = {
    "group": {
        "embeddings": ["embeddings.word.weight", "embeddings.norm.bias"],
        "first": ["layers.1.qkv.weight", "layers.1.qkv.bias"],
        "tenth": ["layers.10.up.weight", "layers.10.output_norm.weight"],
        "heads": ["heads.decoder_bias"],
    },
    "global": {"all": list(SHAPES)},
}


class PlainLamb:
    """Algorithm 2 of arXiv 1904.00962 with a flat vector of all tensors of a group in the place of a layer."""

    def __init__(self, weights: dict[str, np.ndarray], groups: dict[str, list[str]]) -> None:
        self.weights = {name: w.copy() for name, w in weights.items()}
        self.first = {name: np.zeros_like(w) for name, w in weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in weights.items()}
        self.groups, self.count = groups, 0
        self.ratios: list[float] = []

    def step(self, gradients: dict[str, np.ndarray], lr: float) -> None:
        self.count += 1
        self.ratios = []
        for names in self.groups.values():
            updates = {name: self._update(name, gradients[name]) for name in names}
            weight_square = sum(float(x) ** 2 for name in names for x in self.weights[name].ravel())
            update_square = sum(float(x) ** 2 for name in names for x in updates[name].ravel())
            self.ratios.append((weight_square / update_square) ** 0.5 if weight_square * update_square > 0 else 1.0)
            for name in names:
                self.weights[name] = self.weights[name] - lr * self.ratios[-1] * updates[name]

    def _update(self, name: str, g: np.ndarray) -> np.ndarray:
        self.first[name] = BETAS[0] * self.first[name] + (1 - BETAS[0]) * g
        self.second[name] = BETAS[1] * self.second[name] + (1 - BETAS[1]) * g * g
        first = self.first[name] / (1 - BETAS[0] ** self.count)
        second = self.second[name] / (1 - BETAS[1] ** self.count)
        decay: np.ndarray = DECAY * self.weights[name] if has_decay(name) else 0.0 * g
        return first / (np.sqrt(second) + EPS) + decay


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (1 + number) * rng.standard_normal(shape) for number, (name, shape) in enumerate(SHAPES.items())}


def make_lamb(
    weights: dict[str, np.ndarray], trust: Any, dtype: torch.dtype = torch.float64
) -> tuple[Lamb, dict[str, nn.Parameter]]:
    parameters = {name: nn.Parameter(torch.tensor(w, dtype=dtype)) for name, w in weights.items()}
    for name in ("layers.1.qkv.weight", "layers.1.qkv.bias"):
        declare_parts(parameters[name], (2, 2, 2))
    config = OptimizerConfig(
        name="lamb", trust=trust, lr=0.01, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY
    )
    optimizer = build_optimizer(parameters.items(), config)
    assert isinstance(optimizer, Lamb)
    return optimizer, parameters


@pytest.mark.parametrize("trust", ["group", "global"])
def test_wide_trust_ratios_equal_the_plain_statement_over_200_steps(trust: str) -> None:
    rng = np.random.default_rng(1)
    optimizer, parameters = make_lamb(random_weights(), trust)
    plain = PlainLamb(random_weights(), GROUPS[trust])
    for step in range(200):
        lr = 0.02 * (step + 1) / 200
        gradients = {name: rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3) for name, shape in SHAPES.items()}
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        plain.step(gradients, lr)
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach().numpy(), plain.weights[name], rtol=1e-10, atol=1e-10)
    assert min(abs(ratio - 1.0) for ratio in plain.ratios) > 1e-3, "a ratio of one would prove nothing"
    assert len(set(plain.ratios)) == len(plain.ratios) == len(GROUPS[trust])


@pytest.mark.parametrize("trust", ["group", "global"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_that_found_inf_leaves_everything_bit_identical(trust: str, dtype: torch.dtype) -> None:
    optimizer, parameters = make_lamb(random_weights(), trust, dtype)

    def step(found_inf: float, bad: float) -> None:
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
            parameter.grad.view(-1)[0] *= bad
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()

    def snapshot() -> list[torch.Tensor]:
        states = (value.clone() for p in parameters.values() for value in optimizer.state[p].values())
        return [*(p.detach().clone() for p in parameters.values()), *states]

    step(0.0, 1.0)
    before = snapshot()
    step(1.0, float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    step(0.0, 1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))


@pytest.mark.parametrize("trust", ["group", "global"])
def test_weights_of_zero_take_a_ratio_of_one(trust: str) -> None:
    optimizer, parameters = make_lamb({name: np.zeros(shape) for name, shape in SHAPES.items()}, trust)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    for parameter in parameters.values():
        np.testing.assert_allclose(parameter.detach(), -0.01 * 0.5 / (0.5 + EPS), rtol=1e-12)


@pytest.mark.parametrize("trust", ["group", "global"])
def test_parameters_without_gradient_take_no_part(trust: str) -> None:
    """Neither in the norms nor in the update; and without any gradient nothing happens."""
    optimizer, parameters = make_lamb(random_weights(), trust)
    optimizer.step()
    only = parameters["layers.10.up.weight"]
    only.grad = torch.ones_like(only)
    optimizer.step()
    plain = PlainLamb(random_weights(), {"alone": ["layers.10.up.weight"]})
    plain.step({"layers.10.up.weight": np.ones(SHAPES["layers.10.up.weight"])}, 0.01)
    for name, parameter in parameters.items():
        np.testing.assert_allclose(parameter.detach().numpy(), plain.weights[name], rtol=1e-12)
