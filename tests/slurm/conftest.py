"""A Slurm for the whole session, the tiny store, and jobs of the tiny config in it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mini_slurm import MiniSlurm, missing_programs
from support.tiny_task import config_over, prepare_store
from support.training_run import ROOT, last_step

# The nodes are no host names and share one loopback; a user of a cluster needs neither of the first two
VARIABLES = {
    "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
    "NODE_TIMEOUT_S": "20",
}  # fmt: skip
STEPS = 200
SETTINGS = (f"train.max_steps={STEPS}", "checkpoint.save_final_model=true", "evaluation.every_samples=480")


class SlurmJob:
    """A job of slurm/pretrain.sbatch: its id, its output, its run's folder."""

    def __init__(self, slurm: MiniSlurm, job_id: str, output: Path, folder: Path, submitted: float) -> None:
        self.slurm, self.id, self._output, self.folder, self.submitted = slurm, job_id, output, folder, submitted

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""

    def wait_until(self, condition: Callable[[], Any], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            state = self.slurm.job(self.id)["JobState"]
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{state}:\n{self.output}"
            assert time.monotonic() < deadline, f"waited {timeout} s in vain:\n{self.output}"
            time.sleep(0.05)

    def wait_until_step(self, step: int) -> None:
        self.wait_until(lambda: last_step(self.folder) >= step)

    def wait(self, timeout: float = 150) -> dict[str, str]:
        """Fields of the job once it has ended."""
        try:
            return self.slurm.wait_for_end(self.id, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None

    def finish(self) -> None:
        """Wait; the job must have completed and the run be finished."""
        state = self.wait()["JobState"]
        assert state == "COMPLETED", f"{state}:\n{self.output}"
        assert (self.folder / "metrics.json").is_file(), self.output

    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))

    def supervision(self) -> dict[str, Any]:
        return json.loads((self.folder / "supervise.json").read_text(encoding="utf-8"))

    def weights(self) -> bytes:
        return (self.folder / "model/model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def slurm() -> Iterator[MiniSlurm]:
    missing = missing_programs()
    if missing or os.geteuid():
        why = f"{', '.join(missing)} not installed" if missing else "not root"
        pytest.skip(f"NOT TESTED UNDER SLURM: {why}; `make test-slurm` installs Debian's slurm-wlm and munge as root")
    with MiniSlurm() as running:
        yield running
    assert not running.processes(), "daemons or ranks were left behind"
    assert not running.folder.exists()


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, slurm: MiniSlurm) -> Path:
    """The tiny config for two nodes with one rank each; dropout is on."""
    folder = tmp_path_factory.mktemp("tiny")
    config = config_over(prepare_store(folder))
    config["system"]["ranks_per_node"] = 1
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def submit(slurm: MiniSlurm, tiny_config: Path, tmp_path: Path) -> Iterator[Callable[..., SlurmJob]]:
    """`submit(name, *overrides, options=(...), **variables)`: sbatch of the shipped script, from the project's root."""
    yield submitter(slurm, tiny_config, tmp_path)
    slurm.end_jobs()


def submitter(slurm: MiniSlurm, config: Path, folder: Path) -> Callable[..., SlurmJob]:
    def start(name: str, *overrides: str, options: tuple[str, ...] = ("--nodes=2",), **variables: str) -> SlurmJob:
        run, output = folder / name, folder / f"{name}.txt"
        shutil.rmtree(run, ignore_errors=True)
        submitted = time.time()
        job_id = slurm.command(
            "sbatch", "--parsable", f"--output={output}", *options, "slurm/pretrain.sbatch", str(config),
            f"run.folder={run}", *SETTINGS, *overrides, variables={**VARIABLES, **variables}, cwd=ROOT,
        ).strip()  # fmt: skip
        return SlurmJob(slurm, job_id, output, run, submitted)

    return start


@pytest.fixture(scope="session")
def straight(slurm: MiniSlurm, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> SlurmJob:
    """The job that is left alone, one task a rank."""
    job = submitter(slurm, tiny_config, tmp_path_factory.mktemp("straight"))("straight")
    job.finish()
    return job
