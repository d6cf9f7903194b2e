"""LAMB against a plain statement of the reference; groups of parameters, and what every optimizer says of its state."""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bert_fast.config import ModelConfig, OptimizerConfig
from bert_fast.config.choices import OPTIMIZERS
from bert_fast.errors import UserError
from bert_fast.model.bert import BertForPretraining
from bert_fast.optim.build import build_optimizer, has_decay
from bert_fast.optim.lamb import Lamb, norms_of
from bert_fast.parts import declare_parts, parts_of

BETAS, EPS, DECAY = (0.83, 0.925), 1e-6, 0.0166629
SHAPES = {"weight": (7, 5), "other.weight": (3,), "bias": (5,), "norm.weight": (4,)}


# ---- LAMB -----------------------------------------------------------------------------------------------------------


class PlainLamb:
    """MLPerf's reference, tensor by tensor: bias-corrected moments, decay in the update, then the trust ratio."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.weights = {name: w.copy() for name, w in weights.items()}
        self.first = {name: np.zeros_like(w) for name, w in weights.items()}
        self.second = {name: np.zeros_like(w) for name, w in weights.items()}
        self.count = 0
        self.ratios: dict[str, float] = {}

    def step(self, gradients: dict[str, np.ndarray], lr: float) -> None:
        self.count += 1
        for name, g in gradients.items():
            self.first[name] = BETAS[0] * self.first[name] + (1 - BETAS[0]) * g
            self.second[name] = BETAS[1] * self.second[name] + (1 - BETAS[1]) * g * g
            unbiased_first = self.first[name] / (1 - BETAS[0] ** self.count)
            unbiased_second = self.second[name] / (1 - BETAS[1] ** self.count)
            update = unbiased_first / (np.sqrt(unbiased_second) + EPS)
            ratio = 1.0
            if has_decay(name):
                update = update + DECAY * self.weights[name]
                norm_w, norm_u = np.linalg.norm(self.weights[name]), np.linalg.norm(update)
                ratio = norm_w / norm_u if norm_w > 0 and norm_u > 0 else 1.0
            self.ratios[name] = ratio
            self.weights[name] = self.weights[name] - lr * ratio * update


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def make_lamb(
    weights: dict[str, np.ndarray], dtype: torch.dtype = torch.float64
) -> tuple[Lamb, dict[str, nn.Parameter]]:
    parameters = {name: nn.Parameter(torch.tensor(w, dtype=dtype)) for name, w in weights.items()}
    config = OptimizerConfig(name="lamb", lr=1.0, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY)
    optimizer = build_optimizer(parameters.items(), config)
    assert isinstance(optimizer, Lamb)
    return optimizer, parameters


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def test_lamb_equals_the_reference_over_200_steps() -> None:
    rng = np.random.default_rng(1)
    optimizer, parameters = make_lamb(random_weights())
    plain = PlainLamb(random_weights())
    for step in range(200):
        lr = 0.02 * (step + 1) / 200
        gradients = {name: rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 3) for name, shape in SHAPES.items()}
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        set_lr(optimizer, lr)
        optimizer.step()
        plain.step(gradients, lr)
        assert plain.ratios["bias"] == plain.ratios["norm.weight"] == 1.0
        assert abs(plain.ratios["weight"] - 1.0) > 1e-3, "a ratio of one would prove nothing"
        found = np.concatenate([p.detach().numpy().ravel() for p in parameters.values()])
        expected = np.concatenate([w.ravel() for w in plain.weights.values()])
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12, err_msg=f"step {step}")


def test_bias_and_norm_take_plain_adam_steps_without_decay() -> None:
    """The groups without decay against torch's Adam."""
    optimizer, parameters = make_lamb(random_weights())
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items() if not has_decay(name)}
    assert set(copies) == {"bias", "norm.weight"}
    adam = torch.optim.Adam(copies.values(), lr=0.01, betas=BETAS, eps=EPS)
    set_lr(optimizer, 0.01)
    for _ in range(50):
        for name, parameter in parameters.items():
            parameter.grad = torch.randn_like(parameter)
            if name in copies:
                copies[name].grad = parameter.grad.clone()
        optimizer.step()
        adam.step()
    for name, copy in copies.items():
        torch.testing.assert_close(parameters[name], copy, rtol=1e-11, atol=1e-12)


def test_zero_weights_and_zero_updates_take_a_ratio_of_one() -> None:
    weights = {"weight": np.zeros((2, 2)), "other.weight": np.ones(3)}
    optimizer, parameters = make_lamb(weights)
    parameters["weight"].grad = torch.full((2, 2), 0.5, dtype=torch.float64)
    parameters["other.weight"].grad = torch.zeros(3, dtype=torch.float64)
    set_lr(optimizer, 0.1)
    optimizer.step()
    np.testing.assert_allclose(parameters["weight"].detach(), -0.1 * 0.5 / (0.5 + EPS), rtol=1e-12)
    # the only update is the decay: its ratio makes it as long as the weights
    np.testing.assert_allclose(parameters["other.weight"].detach(), 0.9, rtol=1e-12)


def snapshot(optimizer: Lamb, parameters: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for p in parameters.values()]
    for parameter in parameters.values():
        tensors += [optimizer.state[parameter][key].clone() for key in ("step", "exp_avg", "exp_avg_sq")]
    return tensors


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_that_found_inf_leaves_everything_bit_identical(bad: float, dtype: torch.dtype) -> None:
    optimizer, parameters = make_lamb(random_weights(), dtype)
    set_lr(optimizer, 0.01)

    def step(found_inf: float, value: float | None = None) -> None:
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
            if value is not None:
                parameter.grad.view(-1)[0] = value
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
    optimizer, parameters = make_lamb(random_weights())
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    set_lr(optimizer, 0.01)
    optimizer.step()
    for name, weight in random_weights().items():
        assert np.array_equal(parameters[name].detach().numpy(), weight)


def test_found_inf_of_zero_is_no_other_step_than_none() -> None:
    results = []
    for found_inf in (None, torch.tensor(0.0, dtype=torch.float64)):
        torch.manual_seed(3)
        optimizer, parameters = make_lamb(random_weights())
        optimizer.found_inf = found_inf
        set_lr(optimizer, 0.01)
        for _ in range(20):
            for parameter in parameters.values():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append(snapshot(optimizer, parameters))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_parameters_without_gradient_are_left_alone() -> None:
    optimizer, parameters = make_lamb(random_weights())
    set_lr(optimizer, 0.01)
    parameters["weight"].grad = torch.ones(7, 5, dtype=torch.float64)
    optimizer.step()
    assert np.array_equal(parameters["bias"].detach().numpy(), random_weights()["bias"])
    assert parameters["bias"] not in optimizer.state


def test_state_dict_continues_bit_for_bit() -> None:
    gradients = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES.values()] for _ in range(10)]

    def train(optimizer: Lamb, parameters: dict[str, nn.Parameter], steps: range) -> None:
        set_lr(optimizer, 0.01)
        for step in steps:
            for parameter, gradient in zip(parameters.values(), gradients[step], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()

    whole, half = make_lamb(random_weights()), make_lamb(random_weights())
    train(*whole, range(10))
    train(*half, range(5))
    resumed = make_lamb({name: p.detach().numpy() for name, p in half[1].items()})
    resumed[0].load_state_dict(half[0].state_dict())
    train(*resumed, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(*whole), snapshot(*resumed), strict=True))


def relative_update(parameter: nn.Parameter, before: torch.Tensor) -> float:
    return ((parameter.detach() - before).norm() / before.norm()).item()


@pytest.mark.parametrize("decay", [0.0, 1e-9, 0.1])
def test_layer_adaptation_does_not_depend_on_weight_decay(decay: float) -> None:
    """Adapted tensors move by the learning rate times their norm, whatever the decay; biases and norms never do."""
    torch.manual_seed(0)
    shapes = {"weight": (64, 64), "bias": (64,), "norm.weight": (64,)}
    parameters = {name: nn.Parameter(0.02 * torch.randn(shape)) for name, shape in shapes.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = build_optimizer(parameters.items(), OptimizerConfig(name="lamb", lr=0.004, weight_decay=decay))
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = {name: relative_update(p, before[name]) for name, p in parameters.items()}
    assert moved["weight"] == pytest.approx(0.004, rel=1e-5)
    assert min(moved["bias"], moved["norm.weight"]) > 0.1


# ---- parameters of several parts ------------------------------------------------------------------------------------


def gap_to_one_tensor_each(width: int, dtype: torch.dtype, steps: int, part_scale: tuple[float, ...]) -> float:
    """How far a fused projection ends from its parts trained as tensors of their own, over the distance moved."""
    rng = np.random.default_rng(2)
    start = {f"{name}.weight": rng.normal(0, 0.02 * scale, (width, width)).astype(np.float32).astype(np.float64)
             for name, scale in zip("qkv", part_scale, strict=True)}  # fmt: skip
    plain, fused = PlainLamb(start), nn.Parameter(torch.tensor(np.concatenate(list(start.values())), dtype=dtype))
    declare_parts(fused, (width,) * 3)
    config = OptimizerConfig(name="lamb", lr=1.0, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=DECAY)
    optimizer = build_optimizer([("layers.0.qkv.weight", fused)], config)
    way = rng.standard_normal((3, width, width), dtype=np.float32)  # gradients point somewhere, as real ones do
    for step in range(steps):
        lr = 0.01 * (step + 1) / steps
        noise = rng.standard_normal((3, width, width), dtype=np.float32)
        gradient = (way + 0.5 * noise) * 10.0 ** -np.arange(3)[:, None, None]
        plain.step(dict(zip(plain.weights, gradient.astype(np.float64), strict=True)), lr)
        fused.grad = torch.tensor(gradient.reshape(3 * width, width), dtype=dtype)
        set_lr(optimizer, lr)
        optimizer.step()
    expected = np.concatenate(list(plain.weights.values()))
    distance = np.linalg.norm(expected - np.concatenate(list(start.values())))
    return float(np.linalg.norm(fused.detach().double().numpy() - expected) / distance)


def test_a_fused_projection_has_a_trust_ratio_for_each_part() -> None:
    assert gap_to_one_tensor_each(24, torch.float64, 200, (1.0, 1.0, 0.3)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_fused_projection_of_real_size_is_three_tensors(width: int) -> None:
    """The mini benchmark's and BERT-large's in fp32, 200 steps, against per-tensor LAMB in fp64."""
    assert gap_to_one_tensor_each(width, torch.float32, 200, (1.0, 1.0, 0.3)) < 1e-6


@pytest.mark.parametrize("shape", [(3, 2), (1024, 1), (1500, 700), (3_000_001,)])
def test_norms_are_those_of_double_precision(shape: tuple[int, ...]) -> None:
    """Of updates near one, whose squares round in the same direction: torch's own is wrong by 1e-4 at three million."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape).sign() * 0.97, torch.randn(shape) * 0.02]
    expected = [tensor.double().norm().item() for tensor in tensors]
    assert [norm.item() for norm in norms_of(tensors)] == pytest.approx(expected, rel=2e-6)


def test_the_model_declares_what_it_has_fused() -> None:
    model = tiny_model()
    several = {name: parts_of(p) for name, p in model.named_parameters() if len(parts_of(p)) > 1}
    assert several == {"layers.0.qkv.weight": (8, 8, 8), "layers.0.qkv.bias": (8, 8, 8)}
    assert all(sum(parts_of(p)) == len(p) for p in model.parameters())


@pytest.mark.parametrize("sizes", [(4, 4), (5, 3, 0), (), (9,)])
def test_parts_must_make_up_the_parameter(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not make up the 7 rows"):
        declare_parts(nn.Parameter(torch.zeros(7, 2)), sizes)


# ---- build ----------------------------------------------------------------------------------------------------------


def tiny_model() -> BertForPretraining:
    return BertForPretraining(
        ModelConfig(vocab_size=20, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12, max_positions=8)
    )


@pytest.mark.parametrize("name", ["adamw", "adam", "nadamw", "lamb"])
def test_groups_decay_matrices_only(name: str) -> None:
    model = tiny_model()
    config = OptimizerConfig(name=name, lr=0.5, beta1=0.7, beta2=0.8, eps=1e-3, weight_decay=0.25)
    optimizer = build_optimizer(model.named_parameters(), config)
    decayed, plain = optimizer.param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    assert sorted(names[id(p)] for group in (decayed, plain) for p in group["params"]) == sorted(names.values())
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.25, 0.0)
    for group in (decayed, plain):
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.5, (0.7, 0.8), 1e-3)
    for parameter in decayed["params"]:
        assert parameter.dim() == 2, names[id(parameter)]
    for parameter in plain["params"]:
        assert parameter.dim() == 1, names[id(parameter)]


def test_adamw_is_torchs_with_decoupled_decay() -> None:
    parameters = {name: nn.Parameter(torch.tensor(w)) for name, w in random_weights().items()}
    optimizer = build_optimizer(parameters.items(), OptimizerConfig(lr=0.1, weight_decay=0.5))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, weight in random_weights().items():
        np.testing.assert_allclose(parameters[name].detach(), weight * (0.95 if has_decay(name) else 1.0), rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_says_what_its_state_is(name: str) -> None:
    """What checkpoints and sharding go by. A parameter may have a part of the names, as Muon's matrices have."""
    parameters = {name: nn.Parameter(torch.tensor(w)) for name, w in random_weights().items()}
    parameters["layers.0.up.weight"] = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    if OPTIMIZERS[name].package:
        pytest.importorskip(OPTIMIZERS[name].package)
    class_name = {"pytorch_optimizer": "Lion", "torchao": "AdamW8bit"}.get(name)
    optimizer = build_optimizer(parameters.items(), OptimizerConfig(name=name, class_name=class_name))
    assert optimizer.has_opaque_state or OPTIMIZERS[name].state_values is not None
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = set()
    for parameter in parameters.values() if not optimizer.has_opaque_state else ():
        state = dict(optimizer.state[parameter])
        assert {name: state.pop(name).dtype for name in optimizer.scalar_names} == optimizer.scalar_names
        step = state.pop("step", None)
        assert step is None or step.dtype == optimizer.step_dtype
        assert all(value.shape == parameter.shape for value in state.values())
        found |= {*state} | ({"step"} if step is not None else set())
    if not optimizer.has_opaque_state:
        assert found == {*optimizer.state_names} | ({"step"} if optimizer.step_dtype else set())


def test_apex_that_is_not_installed_says_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_apex(name: str, *args: Any) -> Any:
        if name.split(".")[0] == "apex":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_apex)
    with pytest.raises(UserError, match="apex is not installed; install it or set use_apex=false"):
        build_optimizer(tiny_model().named_parameters(), OptimizerConfig(use_apex=True))


@pytest.mark.parametrize(("name", "is_decoupled"), [("adamw", True), ("adam", False)])
def test_apex_is_asked_for_the_same_arithmetic(name: str, is_decoupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for apex: Adam with decoupled decay or with L2, on matrices only."""
    seen: dict[str, Any] = {}

    class FusedAdam(torch.optim.Optimizer):
        def __init__(self, groups: Any, **settings: Any) -> None:
            super().__init__(groups, {})
            seen.update(groups=groups, **settings)

    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    build_optimizer(tiny_model().named_parameters(), OptimizerConfig(name=name, use_apex=True, weight_decay=0.3))
    assert [group["weight_decay"] for group in seen["groups"]] == [0.3, 0.0]
    assert seen["adam_w_mode"] is is_decoupled
