"""batch.virtual_ranks around the step: what is refused, planned, watched, counted and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.one_run import execute
from support.run_files import run_record
from support.steps import PlannedSteps, cpu_rank, weights_of

from bert_fast.communication.ddp import DdpEngine
from bert_fast.communication.wire_format import WireFormat
from bert_fast.config import Config
from bert_fast.config.choices import WIRE_FORMATS, WireFormatChoice
from bert_fast.errors import UserError
from bert_fast.memory.estimate import least_bytes
from bert_fast.memory.state import num_parameters
from bert_fast.report.console import run_rows
from bert_fast.run_folder import METRICS_LINES, RESULT_LOG
from bert_fast.train.checkpoint.resume import resume_key
from bert_fast.train.environment import Environment
from bert_fast.train.health.nonfinite import NonfiniteWatch
from bert_fast.train.setup.build import build
from bert_fast.train.setup.cost_model import make_planner
from bert_fast.train.setup.dry_run import dry_run
from bert_fast.train.step import StepResult

FOUR = ("batch.virtual_ranks=4", "batch.micro_batch_size=2")


class Remembers(WireFormat):
    """A cast that keeps a state, as error feedback does."""

    def state_dict(self) -> dict[str, Any]:
        return {"errors": {}}


class Packs(WireFormat):
    """A scheme whose encoding is its own."""

    def encode(self, number: int, values: torch.Tensor) -> torch.Tensor:
        return values.sign()


def remembers(dtype: torch.dtype, _scale: float) -> WireFormat:
    return Remembers(dtype)


def packs(dtype: torch.dtype, _scale: float) -> WireFormat:
    return Packs(dtype)


@pytest.mark.parametrize("scheme", [remembers, packs])
def test_a_wire_that_is_no_cast_is_refused(
    make_config: Callable[..., Config],
    environment: Environment,
    monkeypatch: pytest.MonkeyPatch,
    scheme: Callable[..., WireFormat],
) -> None:
    monkeypatch.setitem(
        WIRE_FORMATS, "clever", WireFormatChoice(f"{__name__}:{scheme.__name__}", "a test's", is_cast=True)
    )
    build(make_config("communication.reduce_dtype=clever"), environment)
    with pytest.raises(UserError, match=r"batch\.virtual_ranks=4 with communication\.reduce_dtype=clever.*set "):
        build(make_config("communication.reduce_dtype=clever", *FOUR), environment)


def test_an_engine_without_virtual_ranks_says_so() -> None:
    engine = DdpEngine.__new__(DdpEngine)
    for call in (engine.end_virtual_rank, lambda: engine.enable_virtual_ranks(2)):
        with pytest.raises(NotImplementedError, match="DdpEngine does not compute virtual ranks"):
            call()


def test_warm_up_leaves_no_trace(make_config: Callable[..., Config], environment: Environment) -> None:
    ends = []
    for steps in (0, 2):
        config = make_config(f"train.warmup_batches={steps}", *FOUR)
        components = build(config, environment)
        components.step(PlannedSteps(config).input(0), lr=0.01)
        ends.append(weights_of(components))
    assert torch.equal(*ends)


def test_the_samples_of_all_virtual_ranks_are_named(make_config: Callable[..., Config]) -> None:
    config = make_config("batch.virtual_ranks=40", "batch.micro_batch_size=2", "batch.global_batch_size=80")
    planner = make_planner(config, np.full(200, 32, np.uint16))
    watch = NonfiniteWatch(cpu_rank(), limit=0)
    bad, zero = torch.tensor(False), torch.zeros(())
    watch.add(0, StepResult(zero, zero, zero, bad, bad, 0.0, 0.0, 0.0))
    skipped = watch.check(0, ["here"], planner)
    assert skipped is not None
    assert skipped.fatal is not None
    assert f"{planner.plan(0).ids[:64].tolist()} and 16 more" in skipped.fatal


def test_memory_has_the_kept_sum_and_all_inputs(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    shape = ("model.hidden_size=512", "model.vocab_size=4096")
    plain, virtual = make_config(*shape, "batch.micro_batch_size=8"), make_config(*shape, *FOUR)
    printed = []
    for config in (plain, virtual, make_config(*shape, *FOUR, "communication.reduce_dtype=bf16")):
        dry_run(config)
        printed.append(capsys.readouterr().out)
    mib = num_parameters(plain.model) / 2**20
    for text, bytes_each in zip(printed, (4, 8, 6), strict=True):
        assert f"gradients {bytes_each * mib:,.0f}," in text
    assert "8 = 8 x 1 ranks x 1 micro-batches; 1 node(s) of 1" in printed[0]
    assert "8 = 2 x 4 ranks x 1 micro-batches; 4 ranks = 1 real x 4 virtual; 1 node(s) of 1" in printed[1]
    assert least_bytes(virtual) > least_bytes(
        make_config(*shape, "batch.micro_batch_size=2", "batch.global_batch_size=2")
    )


def test_strata_are_resumed_by_as_many_ranks(make_config: Callable[..., Config]) -> None:
    """Samples per rank are those of a virtual rank: 4 real ranks and 4 virtual ones draw the same."""
    strata = ("balance.strategy=stratified_presort", "balance.num_strata=2")
    one, four, virtual = (
        resume_key(make_config(*strata, *each), "a", "b")
        for each in (["batch.micro_batch_size=8"], ["batch.micro_batch_size=2", "system.world_size=4"], FOUR)
    )
    assert four == virtual
    assert one != virtual


def test_a_run_counts_real_ranks_and_says_how_many_are_virtual(make_config: Callable[..., Config]) -> None:
    """Lines, costs and the result log of a whole run."""
    config = make_config("mlperf.enabled=true", "mlperf.division=open", "train.log_every_steps=1", *FOUR)
    context, summary = execute(config)
    lines = [json.loads(line) for line in (context.folder / METRICS_LINES).read_text().splitlines()]
    planner = make_planner(config, summary.data.store.lengths, summary.state.cost)
    steps = [line for line in lines if line["kind"] == "step"]
    assert len(steps) == config.train.max_steps
    for number, line in enumerate(steps):
        plan = planner.plan(number)
        assert line["imbalance"] == [round(plan.imbalance, 6)]
        assert [row[:2] for row in line["cost"]] == [[plan.tokens.sum(), plan.tokens_squared.sum()]]
        assert len(line["compute_ms"]) == 1
        assert line["clip"]["heads"]["mean_coefficient"] <= 1
    log = (context.folder / RESULT_LOG).read_text().splitlines()
    (event,) = (line for line in log if '"key": "virtual_ranks"' in line)
    assert json.loads(event.removeprefix(":::MLLOG"))["value"] == 4


def test_the_report_shows_them() -> None:
    plain = run_record()
    virtual = run_record(config={**plain.config, "batch": {"global_batch_size": 64, "virtual_ranks": 8}})
    assert "virtual ranks" not in dict(run_rows(plain))
    assert dict(run_rows(virtual))["virtual ranks"].startswith("8 on every real rank")
