"""slurm/tune.sbatch: what a task of the array starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT

SCRIPT = ROOT / "slurm/tune.sbatch"
FAKE_PYTHON = """#!/bin/sh
printf '%s\\n' "$$" "$@" > {here}/call
exit 138
"""


def start(folder: Path, *arguments: str, **variables: str) -> tuple[int, str, int, list[str]]:
    """Exit code, errors and process number of the script, and the call of Python: its process number and arguments."""
    python = folder / "python"
    python.write_text(FAKE_PYTHON.format(here=folder), encoding="utf-8")
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "ROUND"))}
    process = subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], env={**environment, "PYTHON": str(python), **variables}, cwd=ROOT,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    errors = process.communicate(timeout=30)[1]
    call = folder / "call"
    return (
        process.returncode,
        errors,
        process.pid,
        call.read_text(encoding="utf-8").splitlines() if call.exists() else [],
    )


def test_a_task_is_a_worker_which_gets_the_signals_of_slurm(tmp_path: Path) -> None:
    code, errors, pid, call = start(tmp_path, "a study.yaml", "out", "--contestants", "adamw,lamb")
    assert code == 138, errors
    assert call == [
        str(pid), "scripts/tune.py", "worker", "a study.yaml", "--out", "out", "--requeue", "--contestants", "adamw,lamb",
    ]  # fmt: skip


def test_the_last_round_is_shared_by_the_tasks(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    _, errors, _, call = start(tmp_path, "study.yaml", "out", ROUND="final", **array)
    assert call[1:] == ["scripts/tune.py", "final", "study.yaml", "--out", "out", "--part", "3/16"], errors


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        ((), {}),
        (("study.yaml",), {}),
        (("study.yaml", "out"), {"ROUND": "last"}),
        (("study.yaml", "out"), {"ROUND": "final"}),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, str]) -> None:
    code, errors, _, call = start(tmp_path, *arguments, **variables)
    assert code not in (0, 138)
    assert len(errors.splitlines()) == 1
    assert "usage: sbatch" in errors or "ROUND=last is neither search nor final" in errors
    assert not call


def test_options_that_the_worker_needs() -> None:
    """USR1 before the time limit, to the script alone; and Slurm may start a task again."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= options
    assert lines[-1].startswith("exec ")
