"""Muon against a plain fp64 statement of its paper, and against torch.optim.Muon; AdamW for what is no matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bert_fast.config import ModelConfig, OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.model.bert import BertForPretraining
from bert_fast.optim.bucketwise import BucketwiseOptimizer
from bert_fast.optim.build import has_decay
from bert_fast.optim.muon import Muon, build, orthogonalized
from bert_fast.parts import declare_parts

BETAS, EPS, DECAY, MOMENTUM = (0.85, 0.93), 1e-8, 0.05, 0.9
SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.word.weight": (9, 4), "embeddings.norm.bias": (4,), "layers.0.qkv.weight": (12, 4), "layers.0.qkv.bias": (12,),
    "layers.0.attention_out.weight": (4, 4), "layers.0.up.weight": (8, 4), "layers.1.down.weight": (4, 8),
    "layers.1.output_norm.weight": (4,), "heads.transform.weight": (4, 4),
}  # fmt: skip
MATRICES = {name for name in SHAPES if name.startswith("layers.") and len(SHAPES[name]) == 2}


def plain_orthogonalized(matrix: np.ndarray, steps: int) -> np.ndarray:
    """Jordan's iteration on one matrix, written with its own inner products."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / max(math.sqrt(sum(float(value) ** 2 for value in x.ravel())), 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * (square @ x) + 2.0315 * (square @ (square @ x))
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class PlainMuon:
    """One tensor at a time: momentum, orthogonalization of each of its parts, decay; AdamW for the others."""

    def __init__(self, weights: dict[str, np.ndarray], parts: dict[str, int], nesterov: bool, adjust_lr: str) -> None:
        self.weights = {name: w.copy() for name, w in weights.items()}
        self.first = {name: np.zeros_like(w) for name, w in weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in weights.items()}
        self.parts, self.nesterov, self.adjust_lr, self.count = parts, nesterov, adjust_lr, 0

    def step(self, gradients: dict[str, np.ndarray], lr: float, matrix_lr: float) -> None:
        self.count += 1
        for name, g in gradients.items():
            if name in MATRICES:
                self._matrix(name, g, matrix_lr)
            else:
                self._other(name, g, lr)

    def _matrix(self, name: str, g: np.ndarray, lr: float) -> None:
        self.first[name] = MOMENTUM * self.first[name] + (1 - MOMENTUM) * g
        update = MOMENTUM * self.first[name] + (1 - MOMENTUM) * g if self.nesterov else self.first[name]
        moved = []
        for part in np.split(update, self.parts.get(name, 1)):
            rows, columns = part.shape
            factor = 0.2 * math.sqrt(max(rows, columns))
            if self.adjust_lr == "original":
                factor = math.sqrt(max(1.0, rows / columns))
            moved.append(factor * plain_orthogonalized(part, 5))
        self.weights[name] = self.weights[name] - lr * DECAY * self.weights[name] - lr * np.concatenate(moved)

    def _other(self, name: str, g: np.ndarray, lr: float) -> None:
        self.first[name] = BETAS[0] * self.first[name] + (1 - BETAS[0]) * g
        self.second[name] = BETAS[1] * self.second[name] + (1 - BETAS[1]) * g * g
        first = self.first[name] / (1 - BETAS[0] ** self.count)
        second = self.second[name] / (1 - BETAS[1] ** self.count)
        decay = DECAY if has_decay(name) else 0.0
        self.weights[name] = self.weights[name] * (1 - lr * decay) - lr * first / (np.sqrt(second) + EPS)


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def make_muon(
    weights: dict[str, np.ndarray], dtype: torch.dtype = torch.float64, **changes: Any
) -> tuple[Muon, dict[str, nn.Parameter]]:
    parameters = {name: nn.Parameter(torch.tensor(w, dtype=dtype)) for name, w in weights.items()}
    for name, parameter in parameters.items():
        if "qkv" in name:
            declare_parts(parameter, (len(parameter) // 3,) * 3)
    settings = {"lr": 0.01, "newton_schulz_dtype": "fp64", **changes}
    config = OptimizerConfig(
        name="muon", beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY, momentum=MOMENTUM, **settings
    )
    return build(parameters.items(), config), parameters


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """As a training step does."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def flat(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([value.ravel() for value in values])


@pytest.mark.parametrize(
    ("nesterov", "adjust_lr", "muon_lr"),
    [(True, "match_rms_adamw", None), (False, "original", 0.03), (True, "original", None)],
)
def test_muon_equals_the_plain_statement_over_200_steps(nesterov: bool, adjust_lr: str, muon_lr: float | None) -> None:
    rng = np.random.default_rng(1)
    optimizer, parameters = make_muon(random_weights(), nesterov=nesterov, adjust_lr=adjust_lr, muon_lr=muon_lr)
    plain = PlainMuon(random_weights(), {"layers.0.qkv.weight": 3}, nesterov, adjust_lr)
    for step in range(200):
        lr = 0.01 * (step + 1) / 200
        gradients = {name: rng.standard_normal(shape) * 10.0 ** rng.integers(-5, 2) for name, shape in SHAPES.items()}
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        set_lr(optimizer, lr)
        optimizer.step()
        plain.step(gradients, lr, lr if muon_lr is None else 3 * lr)
        found = flat([p.detach().numpy() for p in parameters.values()])
        np.testing.assert_allclose(found, flat(list(plain.weights.values())), rtol=1e-10, atol=1e-10)
    distances = [np.linalg.norm(plain.weights[name] - random_weights()[name]) for name in SHAPES]
    assert min(distances) > 0.05, "weights that stay prove nothing"


@pytest.mark.parametrize("shape", [(16, 32), (32, 16), (24, 24)])
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
def test_muon_in_bf16_is_torchs(shape: tuple[int, int], adjust_lr: str) -> None:
    """To rounding: torch multiplies one matrix at a time."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    config = OptimizerConfig(
        name="muon", lr=0.02, weight_decay=0.1, momentum=0.9, newton_schulz_dtype="bf16", adjust_lr=adjust_lr
    )
    optimizer = build([("layers.3.up.weight", ours)], config)
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust_lr)
    for _ in range(20):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        torchs.step()
    distance = (theirs - 1.0).norm()
    assert (ours - theirs).norm() < 3e-3 * distance


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_singular_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Of two matrices of far apart scales at once; the coefficients let singular values end between 0.5 and 1.5."""
    torch.manual_seed(1)
    matrices = [torch.randn(shape, dtype=torch.float64), 1e-4 * torch.randn(shape, dtype=torch.float64)]
    found = orthogonalized(matrices, 8, dtype)
    assert (found.dtype, found.shape) == (dtype, (2, *shape))
    values = torch.linalg.svdvals(found.double())
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_a_matrix_of_zeros_stays() -> None:
    assert torch.equal(orthogonalized([torch.zeros(3, 4)], 5, torch.float32), torch.zeros(1, 3, 4))


# ---- which parameters are matrices -----------------------------------------------------------------------------------


def test_the_encoders_matrices_are_chosen_by_name() -> None:
    model = BertForPretraining(
        ModelConfig(vocab_size=20, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, max_positions=8)
    )
    optimizer = build(model.named_parameters(), OptimizerConfig(name="muon", weight_decay=0.25, lr=0.5, muon_lr=2.0))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, decayed, plain = optimizer.param_groups
    assert [names[id(p)] for p in matrices["params"]] == [
        f"layers.{layer}.{name}.weight" for layer in range(2) for name in ("qkv", "attention_out", "up", "down")
    ]
    assert {names[id(p)].split(".")[0] for p in decayed["params"]} == {"embeddings", "heads"}
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    assert len({id(p) for group in optimizer.param_groups for p in group["params"]}) == len(names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 0.5, 0.5]
    set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.1, 0.1]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"^optimizer\.name=muon: layers\.7\.up\.weight has .*; set [^\n]*=adamw$"):
        build([("layers.7.up.weight", nn.Parameter(torch.zeros(shape)))], OptimizerConfig(name="muon"))


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_format_follows_from_the_hardware(
    has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bert_fast.optim.muon.cpu_has_bf16", lambda: has_bf16)
    optimizer, _ = make_muon(random_weights(), newton_schulz_dtype="auto")
    assert optimizer.param_groups[0]["newton_schulz_dtype"] == dtype
    optimizer, _ = make_muon(random_weights(), newton_schulz_dtype="fp64")
    assert optimizer.param_groups[0]["newton_schulz_dtype"] == torch.float64


# ---- steps in parts, steps that are skipped, steps after a checkpoint -------------------------------------------------


def snapshot(optimizer: Muon, parameters: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    states = (value.clone() for p in parameters.values() for value in optimizer.state[p].values())
    return [*(p.detach().clone() for p in parameters.values()), *states]


def randomize_gradients(parameters: dict[str, nn.Parameter]) -> None:
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("name", ["fp32", "fp64"])
def test_updates_by_bucket_are_those_of_a_whole_step(name: str) -> None:
    """To the rounding of products in other batches."""
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[name]
    whole, by_bucket = (make_muon(random_weights(), dtype, newton_schulz_dtype=name) for _ in range(2))
    tensors = list(by_bucket[1].values())
    buckets = BucketwiseOptimizer(by_bucket[0], [tensors[6:], tensors[3:6], tensors[:3]])
    for _ in range(10):
        randomize_gradients(whole[1])
        for one, other in zip(whole[1].values(), tensors, strict=True):
            assert one.grad is not None
            other.grad = one.grad.clone()
        whole[0].step()
        for number in range(3):
            buckets.step(number)
    rounding = 1e-5 if dtype == torch.float32 else 1e-13
    for expected, found in zip(snapshot(*whole), snapshot(*by_bucket), strict=True):
        torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_that_found_inf_leaves_everything_bit_identical(bad: float, dtype: torch.dtype) -> None:
    optimizer, parameters = make_muon(random_weights(), dtype)

    def step(found_inf: float, value: float | None = None) -> None:
        randomize_gradients(parameters)
        for parameter in parameters.values():
            if value is not None:
                parameter.grad.view(-1)[0] = value  # type: ignore[union-attr]
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()

    for _ in range(3):
        step(0.0)
    before = snapshot(optimizer, parameters)
    step(1.0, bad)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, parameters), strict=True))
    step(0.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, parameters), strict=True))


def test_a_first_step_that_found_inf_changes_no_weight() -> None:
    optimizer, parameters = make_muon(random_weights())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for name, weight in random_weights().items():
        assert np.array_equal(parameters[name].detach().numpy(), weight)


def test_found_inf_of_zero_is_no_other_step_than_none() -> None:
    results = []
    for found_inf in (None, torch.tensor(0.0)):
        torch.manual_seed(3)
        optimizer, parameters = make_muon(random_weights())
        optimizer.found_inf = found_inf
        for _ in range(20):
            randomize_gradients(parameters)
            optimizer.step()
        results.append(snapshot(optimizer, parameters))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_state_dict_continues_bit_for_bit() -> None:
    def train(optimizer: Muon, parameters: dict[str, nn.Parameter], steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            randomize_gradients(parameters)
            optimizer.step()

    whole, half = make_muon(random_weights()), make_muon(random_weights())
    train(*whole, range(10))
    train(*half, range(5))
    resumed = make_muon({name: p.detach().numpy() for name, p in half[1].items()})
    resumed[0].load_state_dict(half[0].state_dict())
    train(*resumed, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(*whole), snapshot(*resumed), strict=True))
    for name, parameter in whole[1].items():
        expected = ["momentum_buffer"] if name in MATRICES else ["step", "exp_avg", "exp_avg_sq"]
        assert list(whole[0].state[parameter]) == expected
