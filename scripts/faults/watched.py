"""A run as a drill sees it: started through victim.py, its ranks followed by pid, its end and its weights looked at."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .victim import VARIABLE

VICTIM = Path(__file__).with_name("victim.py")
_ROOT = str(Path(__file__).resolve().parents[2])
PYTHONPATH = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])  # where run_pretraining is
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HANG_S = 240.0  # a run that is not over by then hangs


@dataclass
class Ended:
    """How a start ended. `detect_s`: from the fault until every other rank of that start was gone; None without a fault."""

    code: int | None
    output: str
    seconds: float
    detect_s: float | None = None
    happened: bool = False  # the fault

    @property
    def hung(self) -> bool:
        return self.code is None

    @property
    def errors(self) -> list[str]:
        """Its lines for the user."""
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


@dataclass
class Drill:
    """Where drills run: one config, one folder, settings that all runs share."""

    config: Path
    folder: Path
    settings: Sequence[str]
    steps: int
    every: int  # steps between checkpoints
    timeout_s: float = 8.0
    slack_s: float = 5.0  # within which a silent rank must be noticed beyond `timeout_s`
    _count: int = field(default=0)
    _starts: int = field(default=0)

    def new_folder(self, name: str) -> Path:
        """A run folder of its own."""
        self._count += 1
        return self.folder / f"{self._count:03d}-{name}"

    def command(self, run_folder: Path, *more: str) -> list[str]:
        return [
            sys.executable,
            str(VICTIM),
            "--config",
            str(self.config),
            f"run.folder={run_folder}",
            f"train.max_steps={self.steps}",
            f"checkpoint.every_steps={self.every}",
            "checkpoint.save_final_model=true",
            f"communication.timeout_s={self.timeout_s}",
            "train.log_every_steps=1",
            "system.threads_per_rank=1",
            *self.settings,
            *more,
        ]

    def run(
        self,
        run_folder: Path,
        *more: str,
        fault: dict[str, Any] | None = None,
        meanwhile: Callable[[subprocess.Popen[bytes]], None] | None = None,
    ) -> Ended:
        """Start, let it go wrong, wait for its end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        self._starts += 1
        mark = self.folder / f"start-{self._starts:03d}"
        once, happened, log = (mark.with_suffix(end) for end in (".once", ".happened", ".log"))
        if fault is not None:
            once.touch()
            happened.unlink(missing_ok=True)
            environment[VARIABLE] = json.dumps({**fault, "once": str(once), "happened": str(happened)})
        start = time.monotonic()
        with open(log, "wb") as output:
            process = subprocess.Popen(
                self.command(run_folder, *more),
                env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if meanwhile is not None:
            meanwhile(process)
        detect_s = self._wait(process, happened if fault else None, start, fault)
        code = process.poll()
        if code is None:
            for pid in [*children(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        return Ended(
            code,
            log.read_text(encoding="utf-8", errors="replace"),
            time.monotonic() - start,
            detect_s,
            happened.exists(),
        )

    def _wait(
        self, process: subprocess.Popen[bytes], happened: Path | None, start: float, fault: dict[str, Any] | None
    ) -> float | None:
        """Until the end or HANG_S; seconds from the fault until all other ranks of that attempt were gone."""
        ranks: dict[int, str] = {}
        since: float | None = None
        detect_s: float | None = None
        while process.poll() is None and time.monotonic() - start < HANG_S:
            if happened is not None and since is None:
                if happened.exists() and happened.read_text(encoding="utf-8"):
                    since = float(happened.read_text(encoding="utf-8"))
                else:
                    ranks = {pid: rank_of(pid) for pid in children(process.pid)}
            if since is not None and detect_s is None and fault is not None:
                others = [pid for pid, rank in ranks.items() if rank != str(fault["rank"])]
                if not any(alive(pid) for pid in others):
                    detect_s = time.time() - since
            time.sleep(0.02)
        return detect_s


def children(pid: int) -> list[int]:
    """Pids of the processes that a process has started."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except OSError:
        return []


def rank_of(pid: int) -> str:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return next((v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")), "")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def weights_of(run_folder: Path) -> str:
    """Hash of the final weights; empty without any."""
    path = run_folder / "model" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def losses_of(run_folder: Path) -> dict[int, list[float]]:
    """Every loss that was logged of every step."""
    found: dict[int, list[float]] = {}
    path = run_folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if entry["kind"] == "step":
            found.setdefault(entry["step"], []).append(entry["loss"])
    return found
