"""The estimate of an optimizer's state against what optimizers really keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bert_fast.config import Config, ModelConfig, OptimizerConfig
from bert_fast.config.choices import OPTIMIZERS
from bert_fast.memory.estimate import least_bytes, optimizer_bytes
from bert_fast.memory.state import num_parameters, parameter_groups, rank_notes, residual_bytes
from bert_fast.model.bert import BertForPretraining
from bert_fast.optim.build import build_optimizer, layer_of
from bert_fast.optim.preconditioned import Preconditioned
from bert_fast.train.setup.dry_run import dry_run

LARGER = ModelConfig(vocab_size=200, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=80, max_positions=64)
SHAPE = ModelConfig(vocab_size=20, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, max_positions=8)


@pytest.mark.parametrize("name", ["adamw", "adam", "nadamw", "lamb", "muon"])
def test_the_state_is_as_large_as_estimated(name: str) -> None:
    model = BertForPretraining(SHAPE)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(name=name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    assert optimizer_bytes(SHAPE, OptimizerConfig(name=name)) == sum(
        tensor.numel() * tensor.element_size() for tensor in tensors
    )


def memory_of(name: str, shards: int, **changes: Any) -> int:
    return optimizer_bytes(SHAPE, OptimizerConfig(**{"name": name, **changes}), shards=shards)


def test_shards_divide_it() -> None:
    assert memory_of("lamb", 1) == 8 * num_parameters(SHAPE)
    assert memory_of("lamb", 4) == pytest.approx(2 * num_parameters(SHAPE), abs=1)
    assert memory_of("muon", 1) < memory_of("lamb", 1)


def test_where_the_state_is_not_known_two_moments_are_assumed(make_config: Callable[..., Config]) -> None:
    """But a run that may fit is not refused for them."""
    assert OPTIMIZERS["pytorch_optimizer"].state_values is None
    assert memory_of("pytorch_optimizer", 1, class_name="Lion") == 8 * num_parameters(SHAPE)
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


WINDOWS = {
    "mfac": {},
    "mfac_sparse": {"momentum": 0.9},
    "mfac_lowrank": {"rank": 2, "window": 5},
    "ggt": {"window": 3, "precondition": "model"},
    "ggt_sparse": {"residual_dtype": "fp32", "density": 0.05},
    "micro_adam": {"error_feedback": False},
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("precondition", ["layer", "model"])
def test_a_window_is_as_large_as_estimated(name: str, precondition: str) -> None:
    settings = OptimizerConfig(**{"name": name, **WINDOWS[name], "precondition": precondition})
    with torch.device("meta"):
        model = BertForPretraining(LARGER)
    optimizer = build_optimizer(model.named_parameters(), settings)
    assert isinstance(optimizer, Preconditioned)
    # The last block of 4,096 is whole in the residual of 4 bits
    assert optimizer_bytes(LARGER, settings) == pytest.approx(optimizer.state_bytes(), rel=2e-3)


def test_every_optimizer_has_an_estimate_or_arguments_that_it_depends_on() -> None:
    for choice in OPTIMIZERS.values():
        assert (choice.state_values is None) == (choice.window is not None or "class_name" in choice.settings)


def test_groups_are_those_of_the_model() -> None:
    with torch.device("meta"):
        model = BertForPretraining(LARGER)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        found[layer_of(name)] = found.get(layer_of(name), 0) + parameter.numel()
    assert {group.name: group.numel for group in parameter_groups(LARGER)} == found


@pytest.mark.parametrize(("name", "kept"), [("bf16", 0.0), ("powersgd", 8.0), ("int8_ef", 8.0 * (1 + 1 / 4 + 1 / 2))])
def test_what_was_not_sent_yet(make_config: Callable[..., Config], name: str, kept: float) -> None:
    config = make_config(
        f"communication.reduce_dtype={name}",
        "system.world_size=4",
        "system.ranks_per_node=2",
        "batch.micro_batch_size=2",
    )
    assert residual_bytes(config) == int(kept * num_parameters(config.model))


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (
            ["communication.reduce_dtype=powersgd", "communication.powersgd_rank=20"],
            "communication.powersgd_rank=20: ",
        ),
        (["optimizer.name=mfac_lowrank", "optimizer.rank=20"], "optimizer.rank=20: "),
        (["communication.reduce_dtype=int8_ef"], None),
    ],
)
def test_a_rank_at_which_matrices_are_whole_is_said(
    make_config: Callable[..., Config], settings: list[str], note: str | None
) -> None:
    """And the run goes on with those matrices whole."""
    config = make_config("model.hidden_size=16", "model.num_heads=2", *settings)
    notes = rank_notes(config)
    assert (notes == []) if note is None else (notes[0].startswith(note) and "whole" in notes[0])
