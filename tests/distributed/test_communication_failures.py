"""Ranks that are lost, fall silent, or do not agree: the others stop within communication.timeout_s, and one line says why."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.rank_pool import RankPool
from support.tiny_task import config_over
from support.training_run import ROOT, TrainingRun, Workspace, errors_of, last_step, lines

from bert_fast.config.load import config_from_tree
from bert_fast.exit_codes import ExitCode
from bert_fast.model.bert import BertForPretraining
from bert_fast.train.checkpoint.storage import latest_checkpoint, read_description, verify_checkpoint
from bert_fast.train.environment import Environment
from bert_fast.train.setup import build as building
from bert_fast.train.setup.warmup import synthetic_input

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
TIMEOUT_S = 10  # also how far apart two ranks may start


def the_error(run: TrainingRun) -> str:
    assert len(errors_of(run)) == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert not run.left_overs()
    return errors_of(run)[0].removeprefix("error: ")


def checkpoint_of(folder: Path, at_least: int) -> int:
    """The step of the last checkpoint, which can be read and is not ahead of the log."""
    path = latest_checkpoint(folder / "checkpoints")
    assert path is not None
    assert verify_checkpoint(path) is None
    step = read_description(path)["state"]["progress"]["step"]
    assert path.name == f"step-{step:08d}"
    assert at_least <= step <= last_step(folder)
    return step


OFTEN = "checkpoint.every_steps=5"


def resumed(workspace: Workspace, folder: Path) -> None:
    """Go on for a few steps from the last checkpoint."""
    step = checkpoint_of(folder, 5)
    code, run = workspace.run(f"run.folder={folder.name}", f"train.max_steps={step + 3}", OFTEN, resume=True)
    assert code == ExitCode.OK, run.stderr
    assert f"at step {step:,}," in run.stdout
    assert [line["step"] for line in lines(folder)][-3:] == [step + 1, step + 2, step + 3]


@pytest.mark.slow  # tests/faults kills too
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_goes_on_after_any_rank_was_killed(workspace: Workspace, rank: int) -> None:
    """Rank 0 too, which keeps the log, writes checkpoints and is where ranks meet."""
    folder = workspace.folder / f"killed_{rank}"
    run = workspace.start(f"run.folder={folder.name}", "train.max_steps=5000", OFTEN)
    run.wait_until(lambda: last_step(folder) >= 12)
    os.kill(run.pid_of_rank(rank), signal.SIGKILL)
    assert run.wait() == ExitCode.LOST_RANK
    assert re.search(rf"killed: rank {rank} by SIGKILL; the others were stopped.*--resume", the_error(run))
    resumed(workspace, folder)


@pytest.fixture(scope="module")
def silent(workspace: Workspace) -> tuple[TrainingRun, Path, int]:
    """A run in which rank 1 was held by SIGSTOP, after its end. Nothing but the reduction asks for a rank's answer."""
    folder = workspace.folder / "silent"
    rarely = ("train.log_every_steps=100", "checkpoint.every_steps=100", "evaluation.every_samples=1000000")
    run = workspace.start("run.folder=silent", "train.max_steps=50000", *rarely, f"communication.timeout_s={TIMEOUT_S}")
    run.wait_until(lambda: latest_checkpoint(folder / "checkpoints"))
    os.kill(run.pid_of_rank(1), signal.SIGSTOP)
    return run, folder, run.wait()  # the time limit is 300 s by default, and this waits for 90


@pytest.mark.slow
def test_the_others_stop_when_a_rank_falls_silent(silent: tuple[TrainingRun, Path, int]) -> None:
    """It holds its sockets open: only communication.timeout_s tells that it is gone."""
    run, folder, code = silent
    assert code != 0
    assert len(errors_of(run)) == 1
    assert not run.left_overs()
    assert checkpoint_of(folder, 100)


@pytest.mark.slow
def test_a_run_goes_on_after_a_silent_rank(silent: tuple[TrainingRun, Path, int], workspace: Workspace) -> None:
    resumed(workspace, silent[1])


def test_a_rank_killed_before_the_first_step(workspace: Workspace) -> None:
    """While the other one waits for it to join."""
    run = workspace.start("run.folder=early", "train.max_steps=5000", OFTEN)
    run.wait_until(lambda: set(run.processes().values()) == {"", "0", "1"})
    os.kill(run.pid_of_rank(1), signal.SIGKILL)
    assert run.wait() == ExitCode.LOST_RANK
    assert "killed: rank 1 by SIGKILL; the others were stopped" in the_error(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes(workspace: Workspace, rank: int) -> None:
    """Started alone, as by a scheduler that has lost the other one's node."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    run = subprocess.run(
        [
            sys.executable, str(ROOT / "run_pretraining.py"), "--config", str(workspace.config),
            "run.folder=alone", "communication.timeout_s=2",
        ],
        cwd=workspace.folder, env={**os.environ, **variables}, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert "ranks could not meet" in line
    assert "Traceback" not in run.stderr
    assert run.returncode == ExitCode.LOST_RANK
    assert not (workspace.folder / "alone").exists()


# ---- ranks that do not agree ----------------------------------------------------------------------------------------


def built(rank: int, world: int, tree: dict[str, Any], of_rank_1: dict[str, dict[str, Any]], swap: str) -> float:
    """The norm of a step on what this rank has built, of which rank 1's is another."""
    real = building.build_model
    if rank == 1:
        tree = {name: {**section, **of_rank_1.get(name, {})} for name, section in tree.items()}
    config, environment = config_from_tree(tree), Environment(rank, rank, world, torch.device("cpu"), torch.float32)

    def swapped(*arguments: Any) -> BertForPretraining:
        model = real(*arguments)
        modules = model.layers._modules if swap == "two layers" else model._modules
        order = list(modules.items())[::-1]
        modules.clear()
        modules.update(order)
        return model

    if rank == 1 and swap:
        building.build_model = swapped
    try:
        components = building.build(config, environment)
        return components.step(synthetic_input(config, environment, seed=5), lr=0.0).grad_norm.item()
    finally:
        building.build_model = real


def test_ranks_that_agree_are_built(pool: Pools, tiny_store: Path) -> None:
    norms = pool(2).call(built, config_over(tiny_store), {}, "")
    assert norms[0] == norms[1] > 0


@pytest.mark.parametrize(
    ("of_rank_1", "swap"),
    [
        pytest.param({}, "two layers", id="parameters in another order, of the same sizes"),
        pytest.param({}, "modules", id="parameters in another order, of other sizes"),
        pytest.param({"train": {"seed": 1}}, "", id="other starting weights"),
        pytest.param({"communication": {"bucket_mb": 0.05}}, "", id="other buckets"),
    ],
)
def test_a_rank_that_has_built_something_else_is_named(
    pool: Pools, tiny_store: Path, of_rank_1: dict[str, dict[str, Any]], swap: str
) -> None:
    """Before a step: else gradients of different weights are added up and nobody sees it, or gloo ends the process."""
    with pytest.raises(RuntimeError, match="UserError: .*rank 1"):
        pool(2).call(built, config_over(tiny_store), of_rank_1, swap)
