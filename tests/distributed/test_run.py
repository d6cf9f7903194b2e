"""Real runs of run_pretraining.py on a tiny store: exit codes, what the run folder holds, and what its figures say."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.clockwork import LINEAR, QUADRATIC, clockwork
from support.rank_pool import RankPool
from support.steps import cpu_rank
from support.tiny_training import make_config as tiny_config
from support.training_run import TORCHRUN, TrainingRun, Workspace, lines

from bert_fast.config import Config
from bert_fast.config.load import load_config
from bert_fast.exit_codes import ExitCode
from bert_fast.mlperf.compliance import check_log
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import build
from bert_fast.train.setup.cost_model import fit_cost_model
from bert_fast.train.telemetry.hardware import matmul_peak

pytestmark = pytest.mark.distributed

TARGET = 0.2
TO_TARGET = (
    f"evaluation.target_accuracy={TARGET}",
    "train.max_steps=120",
    "run.measure_peak_flops=true",
)  # after about 30 steps


@pytest.fixture(scope="module")
def to_target(workspace: Workspace) -> Path:
    """The folder of a run on two ranks that reaches its target."""
    code, run = workspace.run("run.folder=to_target", *TO_TARGET)
    assert code == ExitCode.OK, run.stderr
    assert not run.stderr
    return workspace.folder / "to_target"


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder)]


def mlperf_log(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "result_0.txt").read_text(encoding="utf-8")
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in text.splitlines()]


def test_folder_of_a_finished_run(to_target: Path, workspace: Workspace) -> None:
    assert {p.name for p in to_target.iterdir()} == {
        ".bert_fast.json", "config.yaml", "commit.txt", "cost.json", "metrics.json", "metrics.jsonl", "nodes.json",
        "report.html", "result_0.txt",
    }  # fmt: skip
    mark = json.loads((to_target / ".bert_fast.json").read_text(encoding="utf-8"))
    assert mark["kind"] == "a run"
    assert load_config(to_target / "config.yaml") == load_config(workspace.config, ["run.folder=to_target", *TO_TARGET])
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?|unknown)\n", (to_target / "commit.txt").read_text(encoding="utf-8"))
    page = (to_target / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(\s*["']?http""", page)


def test_figures_of_a_finished_run(to_target: Path) -> None:
    record = record_of(to_target)
    metrics = record["metrics"]
    evaluations, steps = lines(to_target, "eval"), lines(to_target)
    assert metrics["target_reached"] == 1
    assert evaluations[-1]["accuracy"] >= TARGET > max(e["accuracy"] for e in evaluations[:-1])
    assert metrics["samples_to_target"] == evaluations[-1]["samples"] == 16 * steps[-1]["step"]
    assert [e["samples"] for e in evaluations] == [160 * (i + 1) for i in range(len(evaluations))]
    assert 0 < metrics["first_step_s"] < metrics["time_to_train_s"] < 60
    assert 1 <= metrics["imbalance_mean"] < 1.5
    assert metrics["imbalance_mean"] == pytest.approx(sum(sum(s["imbalance"]) for s in steps) / len(steps))
    assert 0 <= metrics["data_wait_share"] < 1
    assert 0 < metrics["mfu"] < 1
    assert metrics["compliance_passed"] == 1
    assert record["status"] == "success"
    assert record["environment"]["world_size"] == 2


def test_log_of_a_finished_run_passes_the_checker(to_target: Path) -> None:
    verdict = check_log(to_target / "result_0.txt", "5.0.0")
    assert verdict.passed, verdict.text
    events = {e["key"]: e for e in mlperf_log(to_target)}
    assert events["run_stop"]["metadata"]["status"] == "success"
    on_the_clock = (events["run_stop"]["time_ms"] - events["run_start"]["time_ms"]) / 1e3
    assert record_of(to_target)["metrics"]["time_to_train_s"] == pytest.approx(on_the_clock, abs=0.1)
    accuracies = [e["value"] for e in mlperf_log(to_target) if e["key"] == "eval_accuracy"]
    assert accuracies == [e["accuracy"] for e in lines(to_target, "eval")]


def test_every_step_is_logged_and_the_loss_falls(to_target: Path) -> None:
    steps = lines(to_target)
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
    losses = losses_of(to_target)
    assert losses[0] == pytest.approx(math.log(200) + math.log(2), rel=0.05)  # nothing learned: uniform guesses
    assert min(losses[-3:]) < 0.85 * losses[0]


def test_ddp_trains_the_same(to_target: Path, workspace: Workspace) -> None:
    code, run = workspace.run("run.folder=ddp", "communication.engine=ddp", *TO_TARGET)
    assert code == ExitCode.OK, run.stderr
    expected = losses_of(to_target)
    assert losses_of(workspace.folder / "ddp") == pytest.approx(expected, rel=1e-5)
    assert record_of(workspace.folder / "ddp")["metrics"]["samples_to_target"] == 16 * len(expected)


def test_torchrun_trains_the_same(to_target: Path, workspace: Workspace) -> None:
    """And without a target, a run that did its steps is a success."""
    code, run = workspace.run("run.folder=torchrun", "train.max_steps=8", TO_TARGET[-1], launcher=(*TORCHRUN, "2"))
    assert code == ExitCode.OK, run.stderr
    assert losses_of(workspace.folder / "torchrun") == losses_of(to_target)[:8]
    record = record_of(workspace.folder / "torchrun")
    assert (record["status"], record["metrics"]["target_reached"]) == ("success", 0)


@pytest.fixture(scope="module")
def missed(workspace: Workspace) -> tuple[Path, TrainingRun]:
    """A run with LAMB and accumulation whose target is out of reach."""
    code, run = workspace.run(
        "run.folder=missed", "evaluation.target_accuracy=0.99", "train.max_steps=12", "optimizer.name=lamb",
        "optimizer.lr=0.03",
        "batch.micro_batch_size=4", "batch.gradient_accumulation_steps=2", "evaluation.every_samples=64",
    )  # fmt: skip
    assert code == ExitCode.TARGET_MISSED, run.stderr
    return workspace.folder / "missed", run


def test_lamb_with_accumulation_misses_a_target_out_of_reach(missed: tuple[Path, TrainingRun]) -> None:
    folder, run = missed
    record, steps = record_of(folder), lines(folder)
    assert (record["status"], record["metrics"]["target_reached"]) == ("target not reached", 0)
    assert "NOT reached" in run.stdout
    assert record["metrics"]["samples_to_target"] == 16 * 12
    assert [s["step"] for s in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [e["step"] for e in lines(folder, "eval")] == [4, 8, 12]
    events = {e["key"]: e for e in mlperf_log(folder)}
    assert events["run_stop"]["metadata"]["status"] == "aborted"
    assert (events["opt_name"]["value"], events["gradient_accumulation_steps"]["value"]) == ("lamb", 2)
    assert record["metrics"]["compliance_passed"] == int(check_log(folder / "result_0.txt", "5.0.0").passed)


def test_a_missed_target_is_no_failed_rank(missed: tuple[Path, TrainingRun]) -> None:
    assert not missed[1].stderr


def test_measuring_the_ceiling_draws_no_random_number() -> None:
    """Else run.measure_peak_flops decides which units dropout drops."""
    environment = Environment(0, 0, 1, torch.device("cpu"), torch.float32)
    before = torch.get_rng_state()
    assert matmul_peak(environment, seconds=0.01) > 0
    assert torch.equal(torch.get_rng_state(), before)


# ---- balance --------------------------------------------------------------------------------------------------------


def test_every_step_logs_what_was_planned_and_measured(to_target: Path) -> None:
    """Planned imbalance and the ranks' times step by step, exchanged with the log line; both are in the figures."""
    steps = lines(to_target)
    for line in steps:
        assert len(line["imbalance"]) == len(line["compute_imbalance"]) == 1  # train.log_every_steps
        assert min(line["imbalance"] + line["compute_imbalance"]) >= 1
        assert [len(row) for row in line["cost"]] == [3, 3]
    metrics = record_of(to_target)["metrics"]
    for name, key in (("imbalance_mean", "imbalance"), ("compute_imbalance", "compute_imbalance")):
        mean = sum(sum(line[key]) for line in steps) / metrics["steps"]
        assert metrics[name] == pytest.approx(mean, abs=1e-4)


def test_cost_model_is_stored_with_the_run(to_target: Path) -> None:
    cost = json.loads((to_target / "cost.json").read_text(encoding="utf-8"))
    assert cost["planned_with"]["source"] == "FLOPs of the model"
    assert record_of(to_target)["cost"] == cost["planned_with"]


def fitted(rank: int, world: int, config: Config) -> tuple[float, float]:
    """What this rank fits, where every rank has times of its own."""
    environment = cpu_rank(rank, world)
    fit = fit_cost_model(config, environment, build(config, environment), clockwork)
    return fit.linear, fit.quadratic


def test_all_ranks_plan_with_one_fit_of_all_their_times(pool: Callable[[int], RankPool], tiny_store: Path) -> None:
    fits = pool(2).call(fitted, tiny_config(tiny_store, 2))
    assert fits[0] == fits[1]
    assert fits[0] == pytest.approx((1.05 * LINEAR, 1.05 * QUADRATIC), rel=1e-6), "the second rank is a tenth slower"


# Each is a whole run; plans and layouts of every strategy are tested without one
@pytest.mark.parametrize(
    "strategy",
    ["packed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pad_to_longest", "stratified_presort"))],
)
def test_a_run_under_every_kind_of_strategy(workspace: Workspace, strategy: str) -> None:
    folder = f"run.folder={strategy}"
    strata = ["balance.num_strata=2"] if strategy == "stratified_presort" else []
    code, run = workspace.run(folder, f"balance.strategy={strategy}", *strata, "train.max_steps=6")
    assert code == ExitCode.OK, run.stderr
    assert all(math.isfinite(loss) for loss in losses_of(workspace.folder / strategy))


def test_missing_cost_file_is_found_before_ranks_are_started(workspace: Workspace) -> None:
    code, run = workspace.run("run.folder=no_cost", "balance.cost=nowhere.json")
    assert code == ExitCode.USER_ERROR
    assert run.stderr.strip().splitlines() == [
        "error: balance.cost nowhere.json: No such file or directory; give the cost.json of a finished run"
    ]
