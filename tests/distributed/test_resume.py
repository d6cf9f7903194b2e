"""A run that was stopped or crashed and resumed ends with the weights, bit for bit, of the run that was left alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.training_run import TrainingRun, Workspace, errors_of, last_step, lines

from bert_fast.config.load import load_config
from bert_fast.data.store import Store
from bert_fast.errors import UserError
from bert_fast.train.checkpoint.resume import check_key, resume_key
from bert_fast.train.checkpoint.storage import latest_checkpoint, read_description

pytestmark = pytest.mark.distributed

STEPS = 120
SETTINGS = (f"train.max_steps={STEPS}", "checkpoint.save_final_model=true", "evaluation.every_samples=320")


@pytest.fixture(scope="module")
def straight(workspace: Workspace) -> Path:
    """The run that is left alone. Dropout is on: random state is part of what must come back."""
    code, run = workspace.run("run.folder=straight", *SETTINGS)
    assert code == 0, run.stderr
    config = load_config(workspace.config)
    assert config.model.hidden_dropout == config.model.attention_dropout == 0.1
    return workspace.folder / "straight"


def stop(run: TrainingRun, folder: Path, step: int, number: signal.Signals) -> None:
    """Send a signal to the launcher once `step` is logged, and check how the run ends."""
    run.wait_until(lambda: last_step(folder) >= step)
    run.process.send_signal(number)
    assert run.wait() == 128 + number, run.stderr
    stopped = json.loads((folder / "stopped.json").read_text(encoding="utf-8"))
    assert stopped == {"step": last_step(folder), "signal": number.name}
    assert step <= stopped["step"] < STEPS, "too late to prove anything"
    assert latest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / f"step-{stopped['step']:08d}"
    assert not run.left_overs()
    assert not run.stderr


def assert_same_run(folder: Path, straight: Path) -> None:
    """Weights to the bit; every step's loss and norm, every evaluation, each time that they were logged."""
    assert (folder / "model/model.safetensors").read_bytes() == (straight / "model/model.safetensors").read_bytes()
    logged = {"step": ("loss", "mlm_loss", "nsp_loss", "grad_norm", "lr"), "eval": ("accuracy", "mlm_loss", "samples")}
    for kind, names in logged.items():
        expected = {line["step"]: [line[name] for name in names] for line in lines(straight, kind)}
        found = lines(folder, kind)
        assert {line["step"] for line in found} == expected.keys()
        for line in found:
            assert [line[name] for name in names] == expected[line["step"]], f"{kind} {line['step']}"
    assert not (folder / "stopped.json").exists()
    figures, figures_straight = metrics_of(folder), metrics_of(straight)
    for name in ("samples_to_target", "steps", "imbalance_mean", "final_accuracy"):
        assert figures[name] == pytest.approx(figures_straight[name], rel=1e-12)


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"]


@pytest.fixture(scope="module")
def stopped_twice(workspace: Workspace, straight: Path) -> Path:
    """A run stopped by SIGTERM, resumed, stopped by SIGUSR1, resumed to its end."""
    folder = workspace.folder / "stopped"
    stop(workspace.start("run.folder=stopped", *SETTINGS), folder, 5, signal.SIGTERM)
    stop(workspace.start("run.folder=stopped", *SETTINGS, resume=True), folder, last_step(folder) + 5, signal.SIGUSR1)
    code, run = workspace.run("run.folder=stopped", *SETTINGS, resume=True)
    assert code == 0, run.stderr
    return folder


def test_stopped_by_signals_and_resumed(stopped_twice: Path, straight: Path) -> None:
    assert [line["step"] for line in lines(stopped_twice)] == list(range(1, STEPS + 1))
    assert_same_run(stopped_twice, straight)


def test_log_of_a_resumed_run(stopped_twice: Path) -> None:
    text = (stopped_twice / "result_0.txt").read_text(encoding="utf-8")
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in text.splitlines()]
    keys = [event["key"] for event in events]
    assert (keys.count("run_start"), keys.count("run_stop"), keys.count("resumed")) == (1, 1, 2)
    assert [e["metadata"]["signal"] for e in events if e["key"] == "interrupted"] == ["SIGTERM", "SIGUSR1"]
    assert events[-1]["metadata"]["resumed"] is True
    record = json.loads((stopped_twice / "metrics.json").read_text(encoding="utf-8"))
    assert record["sessions"] == 3
    assert "not a valid timing" in record["compliance"]["summary"]


def test_traffic_of_a_resumed_run(stopped_twice: Path, straight: Path) -> None:
    name = "gradient_bytes_per_step"
    assert metrics_of(stopped_twice)[name] == metrics_of(straight)[name] > 0


@pytest.mark.slow  # five runs; the way of a sharded state through a checkpoint is in test_sharded.py
def test_sharded_run_stopped_and_resumed(workspace: Workspace) -> None:
    """Optimizer state goes through the unsharded form and back without a change."""
    sharded = (*SETTINGS, "communication.shard_optimizer=true", "optimizer.step_per_bucket=true", "optimizer.name=lamb")
    code, run = workspace.run("run.folder=sharded", *sharded)
    assert code == 0, run.stderr
    folder = workspace.folder / "sharded-stopped"
    stop(workspace.start("run.folder=sharded-stopped", *sharded), folder, 5, signal.SIGTERM)
    code, run = workspace.run("run.folder=sharded-stopped", *sharded, resume=True)
    assert code == 0, run.stderr
    assert_same_run(folder, workspace.folder / "sharded")


@pytest.mark.slow
def test_crash_between_checkpoints(workspace: Workspace, straight: Path) -> None:
    """The launcher is killed where nothing can be saved: its ranks go with it, and the last checkpoint counts."""
    folder, checkpoints = workspace.folder / "crashed", "checkpoint.every_steps=10"
    run = workspace.start("run.folder=crashed", checkpoints, *SETTINGS)
    run.wait_until(lambda: last_step(folder) >= 23)
    run.process.kill()
    assert not run.left_overs()
    checkpoint = latest_checkpoint(folder / "checkpoints")
    reached = last_step(folder)
    assert checkpoint is not None
    assert 20 <= int(checkpoint.name.removeprefix("step-")) < reached < STEPS
    assert len(list((folder / "checkpoints").glob("step-*/complete.json"))) <= 2  # checkpoint.keep_last
    code, run = workspace.run("run.folder=crashed", checkpoints, *SETTINGS, resume=True)
    assert code == 0, run.stderr
    assert f"resumed from checkpoints/{checkpoint.name}" in run.stdout.replace("crashed/", "")
    assert_same_run(folder, straight)


def test_a_signal_to_one_rank_stops_all_under_its_own_number(workspace: Workspace) -> None:
    """As where a scheduler signals one task only."""
    folder = workspace.folder / "one_rank"
    run = workspace.start("run.folder=one_rank", *SETTINGS)
    run.wait_until(lambda: last_step(folder) >= 5)
    os.kill(run.pid_of_rank(1), signal.SIGUSR1)
    assert run.wait() == 128 + signal.SIGUSR1
    assert json.loads((folder / "stopped.json").read_text(encoding="utf-8"))["signal"] == "SIGUSR1"


@pytest.mark.slow  # five runs with up to four ranks; slices for any number of ranks are in the tests of snapshots
def test_another_number_of_ranks_goes_on_with_the_same_samples(workspace: Workspace) -> None:
    """Global batches stay in order; who computes what does not matter. The run of one rank takes over from two."""
    steps = 200
    settings = ("balance.strategy=balanced_free", f"train.max_steps={steps}", "evaluation.every_samples=1600")
    folder, straight = workspace.folder / "elastic", workspace.folder / "fixed"
    same = ("model.hidden_dropout=0", "model.attention_dropout=0", "communication.clip=global_after_reduce")
    stop(workspace.start(f"run.folder={folder.name}", *settings, *same), folder, 3, signal.SIGTERM)
    one = ("system.world_size=1", "batch.micro_batch_size=8", "batch.gradient_accumulation_steps=2")
    code, run = workspace.run(f"run.folder={folder.name}", *settings, *same, *one, resume=True)
    assert code == 0, run.stderr
    assert "resumed by 1 ranks, stopped by 2: the same samples in the same steps" in run.stdout
    code, run = workspace.run(f"run.folder={straight.name}", *settings, *same)
    assert code == 0, run.stderr
    losses = [[line["loss"] for line in lines(each)] for each in (folder, straight)]
    assert len(losses[0]) == steps
    assert losses[0][:40] == pytest.approx(losses[1][:40], rel=1e-3)
    assert losses[0] != losses[1], "added up in another order"


@pytest.fixture(scope="module")
def interrupted(workspace: Workspace) -> Path:
    """A run ended by Ctrl-C."""
    folder = workspace.folder / "interrupted"
    stop(workspace.start("run.folder=interrupted", *SETTINGS), folder, 3, signal.SIGINT)
    return folder


def test_a_folder_in_use_is_refused(workspace: Workspace) -> None:
    """Two runs in one folder would remove each other's checkpoints."""
    folder, often = workspace.folder / "in-use", "checkpoint.every_steps=5"
    first = workspace.start("run.folder=in-use", "train.max_steps=5000", often)
    first.wait_until(lambda: latest_checkpoint(folder / "checkpoints"))
    code, second = workspace.run("run.folder=in-use", "train.max_steps=5000", often, resume=True)
    assert code == 2
    assert "is in use by process" in errors_of(second)[0]
    assert first.process.poll() is None
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    assert not (folder / "running.json").exists()


def test_a_signal_while_steps_are_skipped_saves_nothing(workspace: Workspace) -> None:
    """Weights that are not finite must not become the newest checkpoint."""
    blow_up = (
        "optimizer.lr=1e30",
        "schedule.warmup_steps=0",
        "communication.clip=none",
        "train.max_skipped_steps=100000",
    )
    folder = workspace.folder / "blown"
    run = workspace.start("run.folder=blown", "train.max_steps=50000", "checkpoint.every_steps=1", *blow_up)
    run.wait_until(lambda: len(lines(folder, "skipped")) > 3)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM
    assert "nothing is saved now" in run.stdout
    latest = latest_checkpoint(folder / "checkpoints")
    assert latest is not None
    assert latest.name == "step-00000001"


def test_a_stopped_run_is_not_started_over(interrupted: Path, workspace: Workspace) -> None:
    before = {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()}
    code, run = workspace.run("run.folder=interrupted", *SETTINGS)
    assert code == 2
    assert len(errors_of(run)) == 1
    assert "--resume" in errors_of(run)[0]
    assert {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()} == before


def test_another_model_is_not_resumed(interrupted: Path, workspace: Workspace) -> None:
    code, run = workspace.run("run.folder=interrupted", *SETTINGS, "model.hidden_dropout=0.2", resume=True)
    assert code == 2
    assert len(errors_of(run)) == 1
    assert "model.hidden_dropout was 0.1 and is now 0.2" in errors_of(run)[0]
    assert latest_checkpoint(interrupted / "checkpoints") is not None


ANOTHER = {
    "model.num_heads": ["model.num_heads=4"],
    "batch.global_batch_size": ["batch.global_batch_size=32", "batch.micro_batch_size=16"],
    "balance.strategy": ["balance.strategy=random"],
    "optimizer.lr": ["optimizer.lr=0.02"],
    "schedule.warmup_steps": ["schedule.warmup_steps=6"],
    "train.seed": ["train.seed=1"],
    "communication.max_norm": ["communication.max_norm=2"],
}
SAME = ["communication.bucket_mb=1", "communication.engine=ddp", "train.log_every_steps=7", "train.max_steps=500"]


@pytest.mark.parametrize("what", ANOTHER)
def test_another_config_is_not_resumed(interrupted: Path, workspace: Workspace, what: str) -> None:
    with pytest.raises(UserError, match=f"{what}.*resume with"):
        resume_with(interrupted, workspace, ANOTHER[what])


@pytest.mark.parametrize("change", SAME)
def test_what_is_no_numerics_may_change(interrupted: Path, workspace: Workspace, change: str) -> None:
    assert resume_with(interrupted, workspace, [change])["progress"]["step"] == last_step(interrupted)


def test_other_data_is_not_resumed(interrupted: Path, workspace: Workspace) -> None:
    with pytest.raises(UserError, match="train data had the hash"):
        resume_with(interrupted, workspace, [], train_sha256="0" * 64)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(workspace: Workspace, straight: Path) -> None:
    """And says so. A bit of one rank's file has changed."""
    folder, often = workspace.folder / "damaged", "checkpoint.every_steps=10"
    stop(workspace.start("run.folder=damaged", often, *SETTINGS), folder, 35, signal.SIGTERM)
    latest = latest_checkpoint(folder / "checkpoints")
    assert latest is not None
    victim = latest / "__1_0.distcp"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, run = workspace.run("run.folder=damaged", often, *SETTINGS, resume=True)
    assert code == 0, run.stderr
    assert f"{latest.name} is damaged" in run.stdout.replace("\n", " ")
    assert "looking for an earlier one" in run.stdout
    assert_same_run(folder, straight)


def resume_with(
    folder: Path, workspace: Workspace, changes: list[str], train_sha256: str | None = None
) -> dict[str, Any]:
    """What `--resume` with these changes does first; the state it would take up."""
    config = load_config(workspace.config, [*SETTINGS, *changes])
    train, evaluation = (Store(folder).manifest["sha256"] for folder in (config.data.train, config.evaluation.data))
    checkpoint = latest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    description = read_description(checkpoint)
    check_key(checkpoint, description["key"], resume_key(config, train_sha256 or train, evaluation))
    return description["state"]
