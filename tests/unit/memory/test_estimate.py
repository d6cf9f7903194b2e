"""The estimate of an optimizer's state against what optimizers really keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bert_fast.config import Config, ModelConfig, OptimizerConfig
from bert_fast.config.choices import OPTIMIZERS
from bert_fast.memory.estimate import estimate, least_bytes, num_parameters, optimizer_bytes
from bert_fast.model.bert import BertForPretraining
from bert_fast.optim.build import build_optimizer
from bert_fast.train.setup.dry_run import dry_run

SHAPE = ModelConfig(vocab_size=20, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, max_positions=8)


@pytest.mark.parametrize("name", ["adamw", "adam", "nadamw", "lamb", "muon"])
def test_the_state_is_as_large_as_estimated(name: str) -> None:
    model = BertForPretraining(SHAPE)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(name=name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    assert optimizer_bytes(SHAPE, name) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_of(name: str, shards: int) -> int:
    shown = estimate(
        SHAPE, tokens=8, tokens_squared=64, masked=1, element_bytes=4, keeps_scores=True, optimizer=name, shards=shards
    )
    return shown.optimizer


def test_shards_divide_it() -> None:
    assert memory_of("lamb", 1) == 8 * num_parameters(SHAPE)
    assert memory_of("lamb", 4) == pytest.approx(2 * num_parameters(SHAPE), abs=1)
    assert memory_of("muon", 1) < memory_of("lamb", 1)


def test_where_the_state_is_not_known_two_moments_are_assumed(make_config: Callable[..., Config]) -> None:
    """But a run that may fit is not refused for them."""
    assert OPTIMIZERS["pytorch_optimizer"].state_values is None
    assert memory_of("pytorch_optimizer", 1) == 8 * num_parameters(SHAPE)
    package = make_config("optimizer.name=pytorch_optimizer", "optimizer.class_name=Lion")
    assert least_bytes(make_config()) - least_bytes(package) == 8 * num_parameters(package.model)


def test_a_dry_run_shows_the_optimizers_state(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for name in ("adamw", "muon"):
        dry_run(make_config(f"optimizer.name={name}", "model.hidden_size=256", "model.intermediate_size=1024"))
        text = capsys.readouterr().out.replace("\n", " ")
        shown[name] = float(text.partition(" optimizer ")[2].partition(",")[0])
    assert shown["muon"] == pytest.approx(shown["adamw"] / 2, rel=0.2)
