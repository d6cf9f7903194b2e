"""run_pretraining.py as a person starts it: a subprocess that can be watched, signalled and searched for left-overs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from support.paths import ROOT

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class TrainingRun:
    """One start of run_pretraining.py. Every process that comes from it carries a tag in its environment."""

    def __init__(self, workspace: Path, *arguments: str, launcher: Sequence[str] = ()) -> None:
        self.tag = f"bert_fast_test={uuid.uuid4().hex}"
        name, value = self.tag.split("=")
        environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
        environment |= {name: value, "OMP_NUM_THREADS": "1"}
        self._output = [(workspace / f"{stream}-{value}.txt") for stream in ("stdout", "stderr")]
        with open(self._output[0], "wb") as stdout, open(self._output[1], "wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, str(ROOT / "run_pretraining.py"), *arguments],
                cwd=workspace, env=environment, stdout=stdout, stderr=stderr, start_new_session=True,
            )  # fmt: skip

    @property
    def stdout(self) -> str:
        return self._output[0].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._output[1].read_text(encoding="utf-8")

    def wait(self, timeout: float = 90) -> int:
        """The exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout} s; stderr: {self.stderr}; stdout: {self.stdout}"
            ) from None

    def wait_until(self, condition: Callable[[], Any], timeout: float = 60) -> None:
        """Poll until `condition()`; fails at once if the run ends before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, (
                f"ended early with {self.process.returncode}: {self.stderr}\n{self.stdout}"
            )
            assert time.monotonic() < deadline, f"waited {timeout} s in vain; stderr: {self.stderr}"
            time.sleep(0.005)

    def processes(self) -> dict[int, str]:
        """Living processes that come from this start: pid -> its RANK, or "" without one."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                    state = (folder / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
                except OSError:
                    continue
                if self.tag in variables and state != "Z":
                    ranks = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
                    found[int(folder.name)] = ranks[0] if ranks else ""
        return found

    def pid_of_rank(self, rank: int) -> int:
        return next(pid for pid, its_rank in self.processes().items() if its_rank == str(rank))

    def left_overs(self, within: float = 10) -> dict[int, str]:
        """Processes of this start that are still there after `within` seconds."""
        deadline = time.monotonic() + within
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return alive

    def end(self) -> None:
        """Kill whatever is left of it."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)


class Workspace:
    """A folder with the tiny config, and runs in it."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        self._started: list[TrainingRun] = []

    def start(self, *overrides: str, resume: bool = False, launcher: Sequence[str] = ()) -> TrainingRun:
        flags = ["--config", str(self.config)] + ["--resume"] * resume
        self._started.append(TrainingRun(self.folder, *flags, *overrides, launcher=launcher))
        return self._started[-1]

    def run(self, *overrides: str, resume: bool = False, launcher: Sequence[str] = ()) -> tuple[int, TrainingRun]:
        """Start, wait, return the exit code and the run."""
        run = self.start(*overrides, resume=resume, launcher=launcher)
        return run.wait(), run

    def end(self) -> None:
        for run in self._started:
            run.end()


def lines(run_folder: Path, kind: str = "step") -> list[dict[str, Any]]:
    """What a run has logged so far, in file order; a half-written last line is left out."""
    path = run_folder / "metrics.jsonl"
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [line for line in map(json.loads, whole) if line["kind"] == kind]


def last_step(run_folder: Path) -> int:
    """The last step a run has logged, 0 before the first."""
    return max((line["step"] for line in lines(run_folder)), default=0)


def errors_of(run: TrainingRun) -> list[str]:
    """The lines of stderr that are meant for a person."""
    return [line for line in run.stderr.splitlines() if line.startswith("error:")]
