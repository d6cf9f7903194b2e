"""AdamW of torchao, where that package is installed, and one line where it is not or its class cannot train here."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bert_fast.config import Config, OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.optim.bucketwise import BucketwiseOptimizer
from bert_fast.optim.build import RunOptimizer, build_optimizer
from bert_fast.optim.opaque import load_opaque_state, opaque_state
from bert_fast.optim.torchao import CLASSES

compiles = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning")]


def config(class_name: str) -> OptimizerConfig:
    return OptimizerConfig(name="torchao", class_name=class_name, lr=0.02, weight_decay=0.1)


def start() -> dict[str, nn.Parameter]:
    """A matrix whose moments torchao keeps in few bits, and a bias whose it keeps in fp32."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"weight": (64, 64), "bias": (64,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (number + 1)
        optimizer.step()


def same(one: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def built(class_name: str, parameters: dict[str, nn.Parameter]) -> RunOptimizer:
    pytest.importorskip("torchao")
    return build_optimizer(parameters.items(), config(class_name))


@pytest.mark.parametrize("class_name", [pytest.param(name, marks=compiles) for name in CLASSES])
def test_its_steps_are_those_of_the_bare_class_and_it_resumes(class_name: str) -> None:
    ours, theirs = start(), start()
    optimizer = built(class_name, ours)
    assert optimizer.has_opaque_state
    groups = [
        {"params": [theirs["weight"]], "weight_decay": 0.1},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    bare = getattr(sys.modules["torchao.optim"], class_name)(groups, eps=1e-6)
    train(optimizer, ours, range(4))
    for number in range(4):
        for group in bare.param_groups:
            group["lr"] = torch.tensor(0.02 / (number + 1))
        generator = torch.Generator().manual_seed(number)
        for parameter in theirs.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        bare.step()
    assert same(ours, theirs)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.005]
    moments = optimizer.state[ours["weight"]]["exp_avg"]
    assert type(moments) is not torch.Tensor

    buffer = io.BytesIO()
    torch.save(opaque_state(optimizer), buffer)  # as a checkpoint does
    buffer.seek(0)
    resumed = {key: nn.Parameter(value.detach().clone()) for key, value in ours.items()}
    other = built(class_name, resumed)
    load_opaque_state(other, torch.load(buffer, weights_only=True))
    assert type(other.state[resumed["weight"]]["exp_avg"]) is type(moments)
    train(optimizer, ours, range(4, 8))
    train(other, resumed, range(4, 8))
    assert same(ours, resumed)
    assert not same(ours, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning")
def test_bucket_by_bucket_it_is_the_same() -> None:
    one, other = start(), start()
    train(built("AdamWFp8", one), one, range(3))
    optimizer = built("AdamWFp8", other)
    parts = BucketwiseOptimizer(optimizer, [[other["bias"]], [other["weight"]]])
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        for parameter in other.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (number + 1)
        for part in (1, 0):
            parts.step(part)
    assert same(one, other)


def test_what_is_saved_is_a_copy() -> None:
    parameters = start()
    optimizer = built("AdamWFp8", parameters)
    moments = pytest.importorskip("torchao.optim.subclass_fp8").OptimStateFp8.zeros((64, 64), 256)
    optimizer.state[parameters["weight"]] = {"exp_avg": moments}
    saved = opaque_state(optimizer)["states"][0]["exp_avg"]
    moments.scale.fill_(3.0)
    assert saved.scale.max() == 0


def test_another_class_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"class_name=Adam8bit: of torchao these can train here: AdamW8bit, .*; set one"
    ):
        build_optimizer(start().items(), config("Adam8bit"))


def test_without_its_package_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"not installed; python -m pip install -c constraints.txt torchao$"):
        build_optimizer(start().items(), config("AdamW8bit"))


def test_what_a_config_refuses(make_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"needs a class; set optimizer\.class_name, to AdamW8bit for example"):
        make_config("optimizer.name=torchao")
    named = ("optimizer.name=torchao", "optimizer.class_name=AdamW8bit")
    with pytest.raises(UserError, match=r"no multiple of its block.*; set communication\.shard_optimizer=false"):
        make_config(*named, "communication.shard_optimizer=true")
    with pytest.raises(UserError, match=r"state_dtype.*name=torchao does not read it"):
        make_config(*named, "optimizer.state_dtype=int8")
    assert make_config(*named, "optimizer.beta2=0.98").optimizer.beta2 == 0.98
