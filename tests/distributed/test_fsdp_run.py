"""Whole runs with engine `fsdp`: what is logged, evaluated, saved and exported is what the bucketed engine has."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_task import config_over
from support.training_run import Workspace, errors_of, last_step, lines

from bert_fast.data.store import Store
from bert_fast.exit_codes import ExitCode
from bert_fast.train.checkpoint.storage import latest_checkpoint

pytestmark = pytest.mark.distributed

STEPS = 40
FSDP = ("communication.engine=fsdp", "communication.bucket_mb=25")
BUCKETED = ("communication.engine=bucketed",)
# Small steps, so that sums in another order stay small differences
SAME = (
    f"train.max_steps={STEPS}", "communication.clip=global_after_reduce", "optimizer.lr=0.0003",
    "evaluation.every_samples=160", "evaluation.at_start=true", "checkpoint.save_final_model=true",
)  # fmt: skip


def finished(workspace: Workspace, name: str, *settings: str, resume: bool = False) -> Path:
    code, run = workspace.run(f"run.folder={name}", *SAME, *settings, resume=resume)
    assert code == ExitCode.OK, run.stderr
    assert not run.stderr
    return workspace.folder / name


def stopped(workspace: Workspace, name: str, *settings: str) -> Path:
    """A run that is ended by a signal somewhere in the middle, and has saved where it was."""
    folder = workspace.folder / name
    run = workspace.start(f"run.folder={name}", *SAME, *settings)
    run.wait_until(lambda: last_step(folder) >= 5)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 128 + signal.SIGTERM, run.stderr
    step = last_step(folder)
    assert 5 <= step < STEPS, "too late to prove anything"
    assert latest_checkpoint(folder / "checkpoints") == folder / "checkpoints" / f"step-{step:08d}"
    return folder


def figures(folder: Path, kind: str, names: tuple[str, ...]) -> list[list[float]]:
    """Of each step or evaluation, in order."""
    return [[line[name] for name in ("step", *names)] for line in lines(folder, kind)]


def assert_same_run(folder: Path, expected: Path) -> None:
    kinds = {"step": ("loss", "mlm_loss", "nsp_loss", "grad_norm", "lr"), "eval": ("mlm_loss", "nsp_loss")}
    for kind, names in kinds.items():
        found, wanted = (np.array(figures(each, kind, names)) for each in (folder, expected))
        np.testing.assert_allclose(found, wanted, rtol=2e-6)
    accuracies = [figures(each, "eval", ("accuracy", "nsp_accuracy")) for each in (folder, expected)]
    assert len(accuracies[0]) == 1 + 16 * STEPS // 160
    np.testing.assert_allclose(*accuracies, rtol=1e-12)
    models = [load_file(each / "model" / "model.safetensors") for each in (folder, expected)]
    assert models[0].keys() == models[1].keys()
    for name, values in models[0].items():
        np.testing.assert_allclose(values, models[1][name], rtol=0, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def straight(workspace: Workspace) -> Path:
    return finished(workspace, "whole", *BUCKETED)


def test_a_run_is_that_of_the_bucketed_engine(workspace: Workspace, straight: Path) -> None:
    assert_same_run(finished(workspace, "parts", *FSDP), straight)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param(FSDP, BUCKETED, id="from fsdp"),
        pytest.param(BUCKETED, FSDP, id="to fsdp", marks=pytest.mark.slow),  # and in parts in test_fsdp.py
    ],
)
def test_another_engine_goes_on(
    workspace: Workspace, straight: Path, first: tuple[str, ...], then: tuple[str, ...]
) -> None:
    name = f"from-{first[0].rpartition('=')[2]}"
    stopped(workspace, name, *first)
    assert_same_run(finished(workspace, name, *then, resume=True), straight)


def test_an_evaluation_that_fails_on_one_rank_ends_all(workspace: Workspace, tiny_store: Path, tmp_path: Path) -> None:
    """The others wait for its weights in the forward pass: they end as soon as it is gone, and it is named."""
    shutil.copytree(tiny_store, tmp_path / "store")
    damaged = Store(tmp_path / "store" / "eval")
    path = tmp_path / "store" / "eval" / "samples.bin"
    tokens = np.memmap(path, np.uint16, "r+")
    first, last = (edge // 2 for edge in np.concatenate(damaged.byte_ranges(np.array([1]))))
    place = first + tokens[first : last + 1].tolist().index(int(damaged[1].input_ids[1]))
    tokens[place] = 60_000  # beyond the vocabulary
    tokens.flush()
    space = Workspace(tmp_path, config_over(tmp_path / "store"))
    code, run = space.run("run.folder=damaged", *SAME, *FSDP)
    space.end()
    assert code == ExitCode.BUG, run.stderr
    (error,) = errors_of(run)
    assert re.match("error: rank [01]: unexpected IndexError", error)
    assert not run.left_overs()
    assert not lines(tmp_path / "damaged")
