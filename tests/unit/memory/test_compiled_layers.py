"""Recomputation of compiled layers: the losses and gradients of compiled layers that keep everything, bit for bit.

Compiled layers draw other random numbers than plain ones, so that with dropout a layer that was not compiled would be noticed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from support.steps import PlannedSteps

from bert_fast.config import Config
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import build, build_model
from bert_fast.train.setup.recomputation import longest_batch, set_up_recomputation

# Of torch's own tracing
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
MODES = ["layer", "half_layer", "optimal"]
DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
Outcome = tuple[float, torch.Tensor]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(model: BertForPretraining, batches: list[BertInput]) -> list[Outcome]:
    """Of every batch its loss and all gradients, with the same random numbers at each call."""
    found = []
    torch.manual_seed(1)
    for batch in batches:
        model.zero_grad()
        total = model(batch).total
        total.backward()
        found.append((total.item(), torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None])))
    return found


def same(one: list[Outcome], other: list[Outcome]) -> bool:
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def test_traced_layers_run_twice(
    make_config: Callable[..., Config], environment: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as by `torch.compile`, without its code generator. Batches of one length, and of several."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    config = make_config(*DROPOUT, "model.attention_backend=matmul")
    equal, mixed = longest_batch(config), PlannedSteps(config).input(0).micro_batches[0]
    batches = [equal, mixed, equal._replace(layout=longest_batch(config).layout)]

    def outcomes(how: str, compiled: bool = True) -> list[Outcome]:
        torch.manual_seed(0)
        again = make_config(*DROPOUT, "model.attention_backend=matmul", f"memory.recompute={how}")
        model = build_model(again, environment)
        for layer in model.encoder_layers if compiled else []:
            layer.compile_halves()
        set_up_recomputation(again, environment, model)
        for batch in batches:
            batch.layout._groups.clear()  # each batch of a run is new
        return gradients(model, batches)

    kept = outcomes("none")
    assert not same(kept, outcomes("none", compiled=False))
    for how in MODES:
        assert same(outcomes(how), kept), how


@pytest.mark.slow  # minutes of a compiler
@pytest.mark.timeout(1200)
def test_a_run_of_compiled_layers(make_config: Callable[..., Config], environment: Environment) -> None:
    """Whole steps; the probabilities of attention by themselves too, without dropout, whose order they change."""

    def losses(how: str, *others: str) -> list[float]:
        config = make_config("train.compile=true", f"memory.recompute={how}", *others)
        components, planned, found = build(config, environment), PlannedSteps(config), []
        for number in range(3):
            result = components.step(planned.input(number), lr=0.01)
            found += [result.mlm_sum.item(), result.grad_norm.item()]
        return found

    kept = losses("none", *DROPOUT)
    for how in MODES:
        assert losses(how, *DROPOUT) == kept, how
    assert losses("attention") == pytest.approx(losses("none"), rel=1e-6)
