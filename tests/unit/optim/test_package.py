"""Classes of pytorch_optimizer: the steps of the bare class, and one line for each that cannot train here."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.optim import package as module
from bert_fast.optim.build import RunOptimizer, build_optimizer
from bert_fast.optim.opaque import load_opaque_state, opaque_state

package = pytest.importorskip("pytorch_optimizer")


def config(class_name: str, arguments: dict[str, Any] | None = None, weight_decay: float = 0.1) -> OptimizerConfig:
    return OptimizerConfig(
        name="pytorch_optimizer", class_name=class_name, arguments=arguments or {}, lr=0.02, weight_decay=weight_decay
    )


def start() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        "weight": nn.Parameter(torch.randn(6, 4, generator=generator)),
        "bias": nn.Parameter(torch.randn(6, generator=generator)),
    }


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def same(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SOAP", {"betas": [0.9, 0.95], "precondition_frequency": 3}), ("soap", {}), ("Lion", {"betas": [0.9, 0.98]}),
        ("Shampoo", {}), ("ADOPT", {}), ("Prodigy", {"d_coef": 2.0}), ("AdaFactor", {}), ("CAME", {}), ("MADGRAD", {}),
    ],
)  # fmt: skip
def test_its_steps_are_those_of_the_bare_class_and_it_resumes(name: str, arguments: dict[str, Any]) -> None:
    ours, theirs = start(), start()
    optimizer = build_optimizer(ours.items(), config(name, arguments))
    assert optimizer.has_opaque_state
    groups = [
        {"params": [theirs["weight"]], "weight_decay": 0.1},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    bare = package.load_optimizer(name.lower())(groups, lr=0.02, **settings)
    train(optimizer, ours, range(8))
    train(bare, theirs, range(8))
    assert same(ours, theirs)
    resumed = {key: nn.Parameter(value.detach().clone()) for key, value in ours.items()}
    other = build_optimizer(resumed.items(), config(name, arguments))
    load_opaque_state(other, opaque_state(optimizer))
    train(optimizer, ours, range(8, 16))
    train(other, resumed, range(8, 16))
    assert same(ours, resumed)
    assert not same(ours, theirs)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("SophiaH", r"it wants a second backward pass"),
        ("AdaHessian", r"it wants a second backward pass"),
        ("Muon", r"it cannot be made \(ValueError: `use_muon` must be set"),
        ("LOMO", "takes model and not parameters alone"),
        ("ScheduleFreeAdamW", r"evaluates other weights than it trains, which optimizer\.name=schedule_free"),
        ("AliG", "takes no lr, so that the schedule could not set its rate"),
        ("ScalableShampoo", "its state has objects that a checkpoint does not hold"),
        ("StableSPAM", "it keeps state outside of `state` and `param_groups`"),
        ("Fromage", r"has no weight decay; set optimizer\.weight_decay=0$"),
        ("Lyon", r"has no class of this name; did you mean Lion"),
        ("no such thing", "has no class of this name; its documentation lists them"),
    ],
)
def test_what_cannot_train_here_is_one_line_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^optimizer\.class_name={name}.*{reason}") as raised:
        build_optimizer(start().items(), config(name))
    assert len(str(raised.value).splitlines()) == 1


def test_a_class_without_weight_decay_trains_without() -> None:
    parameters = start()
    train(build_optimizer(parameters.items(), config("Fromage", weight_decay=0.0)), parameters, range(2))
    assert not same(parameters, start())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"beta": 0.9}, r"optimizer\.arguments has beta, which Lion does not take; it takes betas, "),
        ({"lr": 0.1}, r"optimizer\.arguments has lr, which is optimizer\.lr here; set that"),
        ({"weight_decay": 0.1}, r"has weight_decay, which is optimizer\.weight_decay here"),
        (
            {"betas": "high"},
            r"class_name=Lion with optimizer\.arguments=\{'betas': 'high'\} cannot train here: it cannot be",
        ),
        ({"betas": [1.5, 0.9]}, r"cannot be made \(ValueError: beta1 must be in the range"),
    ],
)
def test_arguments_that_it_does_not_take(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_optimizer(start().items(), config("Lion", arguments))


def test_without_its_package_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"not installed; python -m pip install -c constraints.txt pytorch_optimizer$"):
        build_optimizer(start().items(), config("Lion"))


class Plain(torch.optim.Optimizer):
    """Made up to be refused, or not."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=self.factor() * group["lr"])

    def factor(self) -> float:
        return 1.0


class RaisesNan(Plain):
    def factor(self) -> float:
        return float("nan")


class PythonRandom(Plain):
    def factor(self) -> float:
        return random.random()


class TorchRandom(Plain):
    def factor(self) -> float:
        return torch.rand(()).item()


class Still(Plain):
    def factor(self) -> float:
        return 0.0


def build_made_up(monkeypatch: pytest.MonkeyPatch, kind: type) -> RunOptimizer:
    monkeypatch.setattr(module, "_class_named", lambda _: kind)
    return build_optimizer(start().items(), config("anything"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (RaisesNan, "end in weights that are not finite"),
        (PythonRandom, "draws Python's random numbers"),
        (Still, "24 steps at optimizer.lr="),
    ],
)
def test_a_rehearsal_finds(monkeypatch: pytest.MonkeyPatch, kind: type, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        build_made_up(monkeypatch, kind)


def test_random_numbers_are_for_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    before, python_before = torch.get_rng_state(), random.getstate()
    assert isinstance(build_made_up(monkeypatch, TorchRandom), TorchRandom)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="draws random numbers, which are others on every rank"):
        build_made_up(monkeypatch, TorchRandom)
