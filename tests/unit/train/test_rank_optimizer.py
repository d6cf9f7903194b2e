"""The optimizer of a rank where every rank updates all: which slices it has, in which order, and what its counts say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.steps import PlannedSteps

from bert_fast.config import Config
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import build


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_slices_are_the_whole_parameters_in_the_models_order(
    make_config: Callable[..., Config], environment: Environment, name: str
) -> None:
    """Buckets are filled from the end of the model; files and torch's state go from its start."""
    components = build(make_config(f"optimizer.name={name}", "communication.bucket_mb=0.001"), environment)
    named = list(components.model.named_parameters())
    assert len(components.engine.layout.buckets) > 1
    assert [(each.name, each.begin, each.numel) for each in components.optimizer.slices] == [
        (name, 0, parameter.numel()) for name, parameter in named
    ]
    for each, (_, parameter) in zip(components.optimizer.slices, named, strict=True):
        assert each.parameter is parameter


def test_parameters_by_bucket_are_those_of_the_layout(
    make_config: Callable[..., Config], environment: Environment
) -> None:
    components = build(make_config("communication.bucket_mb=0.001"), environment)
    parameters = list(components.model.parameters())
    expected = [[parameters[index] for index in bucket.parameters] for bucket in components.engine.layout.buckets]
    found = components.optimizer.parameters_by_bucket
    assert [[id(p) for p in part] for part in found] == [[id(p) for p in part] for part in expected]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_scalars(make_config: Callable[..., Config], environment: Environment, name: str) -> None:
    config = make_config(f"optimizer.name={name}")
    components, steps = build(config, environment), PlannedSteps(config)
    assert components.optimizer.scalars() == {}, "a warm-up leaves nothing behind"
    for number in range(3):
        components.step(steps.input(number), lr=0.01)
        assert components.optimizer.scalars() == {"exp_avg exp_avg_sq": {"step": number + 1}}


def test_no_decay_for_norms_and_biases(make_config: Callable[..., Config], environment: Environment) -> None:
    """Groups are made from the names that slices have."""
    components = build(make_config("optimizer.weight_decay=0.5"), environment)
    decay = {
        id(p): group["weight_decay"] for group in components.optimizer.optimizer.param_groups for p in group["params"]
    }
    of_name = {each.name: decay[id(each.parameter)] for each in components.optimizer.slices}
    assert of_name["embeddings.word.weight"] == 0.5
    assert of_name["layers.0.qkv.bias"] == 0.0
    assert isinstance(components.optimizer.optimizer, torch.optim.Optimizer)
