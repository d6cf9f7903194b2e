"""Building components: no trace of the warm-up, and variants by name that are one class and one entry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from support.one_run import execute
from support.steps import PlannedSteps, weights_of

from bert_fast.communication.bucket_record import ends_of_record
from bert_fast.communication.buckets import lay_out, order_gradients
from bert_fast.communication.reducer import BucketReducer
from bert_fast.config import Config
from bert_fast.config.choices import ENGINES, OBJECTIVES, EngineChoice, ObjectiveChoice
from bert_fast.model.objective import MlmNsp
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import bucket_note, build, build_model, make_engine, make_layout


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_warm_up_leaves_no_trace(make_config: Callable[..., Config], environment: Environment, optimizer: str) -> None:
    """Weights, optimizer state and random stream are those of a build without warm-up."""
    results = []
    for steps in (0, 3):
        config = make_config(f"train.warmup_batches={steps}", f"optimizer.name={optimizer}", "model.hidden_dropout=0.1")
        components = build(config, environment)
        assert not components.optimizer.optimizer.state
        components.step(PlannedSteps(config).input(0), lr=0.01)
        results.append(weights_of(components))
    assert torch.equal(*results)


class OnlyTokens(MlmNsp):
    """A dummy objective: masked tokens alone, at ten times their weight."""

    def loss(self, output: Any, global_masked: int | torch.Tensor, global_samples: int | torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = 10.0 * output.mlm_sum / global_masked
        return loss


class DummyEngine(BucketReducer):
    """A dummy engine."""


@pytest.fixture
def other_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that holds a further objective and a further engine, as a user of the package would add one."""
    module = ModuleType("a_users_module")
    module.OnlyTokens, module.DummyEngine = OnlyTokens, DummyEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    return "a_users_module"


def test_another_objective_is_one_class_and_one_entry(
    make_config: Callable[..., Config],
    environment: Environment,
    other_module: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OBJECTIVES, "only_tokens", ObjectiveChoice(f"{other_module}:OnlyTokens", "masked tokens alone"))
    norms, gradients = [], []
    for name in ("mlm_nsp", "only_tokens"):
        config = make_config(f"train.objective={name}", "communication.clip=none")
        components = build(config, environment)
        norms.append(components.step(PlannedSteps(config).input(0), lr=0.0).grad_norm.item())
        gradients.append({name: p.grad.clone() for name, p in components.model.named_parameters()})
    assert norms[1] > 5 * norms[0]
    next_sentence = [name for name in gradients[0] if gradients[0][name].any() and not gradients[1][name].any()]
    assert next_sentence, "the next-sentence head gets no gradient from the other objective"
    _, summary = execute(make_config("train.objective=only_tokens", "train.max_steps=2"))
    assert summary.outcome.status == "success"


def test_another_engine_is_one_class_and_one_entry(
    make_config: Callable[..., Config],
    environment: Environment,
    other_module: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ENGINES, "dummy", EngineChoice(f"{other_module}:DummyEngine", "a dummy"))
    config = make_config("communication.engine=dummy")
    model = build_model(config, environment)
    layout = make_layout(config, model, list(range(len(list(model.parameters())))))
    engine = make_engine(config, environment, model, layout)
    assert type(engine) is DummyEngine
    assert engine.layout is layout


ORDERING = order_gradients(
    ["a.x", "a.y", "b.x"], [4, 4, 8], [2, 1, 0], clip_groups={"a": "^a", "b": "^b"}, whole_groups=True
)
UNITS = [{"name": "b", "ready_s": 0.1, "bytes": 32}, {"name": "a", "ready_s": 0.2, "bytes": 32}]


@pytest.mark.parametrize("ends", [[2], [1, 2]])
def test_the_ends_of_a_runs_record_are_taken(ends: list[int]) -> None:
    assert ORDERING.unit_names == ("b", "a")
    assert ends_of_record({"ends": ends, "units": UNITS}, ORDERING) == ends


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"ends": [2]},
        {"ends": [2], "units": UNITS[::-1]},
        {"ends": [2], "units": UNITS[:1]},
        {"ends": [2], "units": [*UNITS, UNITS[0]]},
        {"ends": [2], "units": ["b", "a"]},
        {"ends": [2], "units": {"b": 1, "a": 2}},
        {"ends": [], "units": UNITS},
        {"ends": [1], "units": UNITS},
        {"ends": [3], "units": UNITS},
        {"ends": [1, 1, 2], "units": UNITS},
        {"ends": [2, 1], "units": UNITS},
        {"ends": [0, 2], "units": UNITS},
        {"ends": [-1, 2], "units": UNITS},
        {"ends": [2.0], "units": UNITS},
        {"ends": [True, 2], "units": UNITS},
        {"ends": "2", "units": UNITS},
    ],
)
def test_a_record_of_other_gradients_is_not_taken(record: dict[str, Any]) -> None:
    assert ends_of_record(record, ORDERING) is None


@pytest.mark.parametrize(
    ("ends", "note"),
    [
        ([2], "lists 3 sizes and the model fills 1 buckets: the other sizes are not used"),
        ([1, 2], "lists 3 sizes and the model fills 2 buckets: the other sizes are not used"),
        ([1, 2, 3, 4], "lists 3 sizes and the model fills 4 buckets: the last size repeats"),
        ([1, 2, 4], None),
    ],
)
def test_a_list_of_sizes_that_is_not_as_long_as_the_buckets_is_said(
    make_config: Callable[..., Config], ends: list[int], note: str | None
) -> None:
    config = make_config("communication.bucket_mb=[0.02, 0.01, 5]")
    count = ends[-1]
    ordering = order_gradients(
        [f"t{i}" for i in range(count)], [4] * count, list(range(count)), clip_groups="tensor", whole_groups=True
    )
    said = bucket_note(config, lay_out(ordering, ends))
    assert said == (None if note is None else f"communication.bucket_mb {note}")
