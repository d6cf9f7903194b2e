"""The cost model of a run: where it is from, and that measuring it leaves no trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.clockwork import FIXED, LINEAR, QUADRATIC, clockwork
from support.one_run import execute
from support.steps import weights_of

from bert_fast.balance.cost import CostModel
from bert_fast.config import Config
from bert_fast.errors import TrainingError
from bert_fast.model.flops import cost_coefficients
from bert_fast.train import run as run_phases
from bert_fast.train.batches import batch_of_lengths, to_device
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import build
from bert_fast.train.setup.cost_model import (
    fit_cost_model,
    make_cost,
    make_planner,
    probe_lengths,
    time_forward_backward,
)


def test_cost_comes_from_the_config_a_file_or_flops(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config()
    assert make_cost(config) == (CostModel(*cost_coefficients(config.model)), "FLOPs of the model")
    given = make_cost(make_config("balance.cost={linear: 2, quadratic: 0.5}"))
    assert given == (CostModel(2.0, 0.5), "config")
    path = tmp_path / "cost.json"
    path.write_text(json.dumps({"fitted": {"linear": 3.0, "quadratic": 0.25}}))
    assert make_cost(make_config(f"balance.cost={path}")) == (CostModel(3.0, 0.25), f"file {path}")


def test_cost_decides_the_plan(make_config: Callable[..., Config]) -> None:
    lengths = np.random.default_rng(0).integers(5, 33, 500).astype(np.uint16)
    config = make_config("system.world_size=2", "batch.global_batch_size=16")
    plans = [make_planner(config, lengths, CostModel(*cost)).plan(0).ids for cost in ((1.0, 0.0), (0.0, 1.0))]
    assert (plans[0] != plans[1]).any()


def test_probes_tell_the_terms_apart() -> None:
    """The columns of the fit are far from linearly dependent, for any batch."""
    for local in (1, 2, 16, 48):
        probes = probe_lengths(local, 512)
        columns = np.array([[1, p.sum(), (p**2).sum()] for p in probes], float)
        columns /= np.linalg.norm(columns, axis=0)
        assert np.linalg.cond(columns) < 50
        assert max(p.max() for p in probes) == 512


def test_fit_is_that_of_the_times(make_config: Callable[..., Config], environment: Environment) -> None:
    """With a clock that runs as the cost model says, the fit finds the cost model; weights and gradients stay."""
    config = make_config("batch.micro_batch_size=8")
    components = build(config, environment)
    before = weights_of(components)
    fit = fit_cost_model(config, environment, components, clockwork)
    assert (fit.linear, fit.quadratic, fit.fixed) == pytest.approx((LINEAR, QUADRATIC, FIXED), rel=1e-6)
    assert torch.equal(weights_of(components), before)


def test_measuring_for_real_leaves_no_trace(make_config: Callable[..., Config], environment: Environment) -> None:
    components = build(make_config(), environment)
    before = weights_of(components)
    batch = to_device(batch_of_lengths(np.array([8, 4]), 60, np.random.default_rng(0)), environment.device)
    assert time_forward_backward(components, batch, environment) > 0
    components.engine.zero_grad()
    assert torch.equal(weights_of(components), before)
    for parameter in components.model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_times_that_say_nothing_stop_the_run(make_config: Callable[..., Config], environment: Environment) -> None:
    config = make_config()
    components = build(config, environment)
    with pytest.raises(TrainingError, match=r"balance\.cost=measure: .*do not grow.*set balance\.cost=flops"):
        fit_cost_model(config, environment, components, lambda *_: 1e-3)


def test_a_run_plans_with_what_it_measured_and_the_next_with_its_record(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(run_phases, "fit_cost_model", partial(fit_cost_model, measure=clockwork))
    _, first = execute(make_config("balance.cost=measure", f"run.folder={tmp_path}/fitted", "train.max_steps=2"))
    record = json.loads((tmp_path / "fitted/cost.json").read_text(encoding="utf-8"))["planned_with"]
    assert record["source"].startswith("warm-up fit, residual 0.0 %")
    assert (record["linear"], record["quadratic"]) == pytest.approx((LINEAR, QUADRATIC), rel=1e-6)
    assert first.state.cost == CostModel(record["linear"], record["quadratic"])
    path = tmp_path / "fitted/cost.json"
    _, second = execute(make_config(f"balance.cost={path}", f"run.folder={tmp_path}/next", "train.max_steps=2"))
    assert second.state.cost == first.state.cost
    assert second.state.cost_source == f"file {path}"
