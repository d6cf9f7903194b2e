"""Who computes the trials: this process, or several of its kind beside each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from bert_fast.command import one_line
from bert_fast.exit_codes import ExitCode, of_signal
from tuning.search import WORKERS, Search, Task
from tuning.study_file import Study
from tuning.trial import DivergedError, Run, runner

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """A signal has asked this worker to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def work(study: Study, folder: Path) -> int:
    """Compute trials until none is left to begin. Returns the exit code.

    A signal ends it; the trial that it was computing is computed again by another, or later.
    """
    search = Search(study, folder)
    for stop_signal in _STOP_SIGNALS:
        signal.signal(stop_signal, _stop)
    log_path = folder / WORKERS / f"{search.worker}.log"
    with search.alive(), log_path.open("a", encoding="utf-8") as log:
        run = runner(study, log)
        while (task := search.next_task()) is not None:
            try:
                _compute(search, task, run)
            except KeyboardInterrupt as stop:
                search.abandon(task)
                number = stop.number if isinstance(stop, Stopped) else int(signal.SIGINT)
                print(f"{search.worker}: stopped; the same command goes on", flush=True)
                return of_signal(number)
    return ExitCode.OK


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)


def _compute(search: Search, task: Task, run: Run) -> None:
    """Run a trial and record how it ended. Whatever is wrong with it costs this trial alone."""
    try:
        config = task.cell.config(task.point, task.seed)
        outcome, diverged = run(config, search.watcher(task)), None
    except DivergedError as error:
        outcome, diverged = error.outcome, str(error)
    except Exception as error:
        text = one_line(f"{type(error).__name__}: {error}", 500)
        search.fail(task, text)
        print(f"{task.name}: failed: {text}", flush=True)
        return
    search.finish(task, outcome, diverged)
    how = "diverged" if diverged else "pruned" if outcome.pruned else "done"
    point = " ".join(f"{name}={shown(value)}" for name, value in task.point.items())
    print(f"{task.name}: {how}, accuracy {outcome.best:.4f} at {outcome.samples:,} samples, {outcome.seconds:.0f} s; {point}",
          flush=True)  # fmt: skip


def shown(value: object) -> str:
    """A value of a point, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_workers(commands: Sequence[Sequence[str]]) -> int:
    """Start workers on this machine and wait for them. Returns the exit code.

    Args:
        commands: for each worker its arguments of scripts/tune.py.
    """
    script = Path(__file__).resolve().parents[1] / "tune.py"
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    workers = [
        subprocess.Popen([sys.executable, str(script), *command], env=environment, start_new_session=True)
        for command in commands
    ]
    stopped = 0

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = number
        for each in workers:
            if each.poll() is None:
                each.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in _STOP_SIGNALS}
    try:
        codes = [each.wait() for each in workers]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stopped:
        return of_signal(stopped)
    return max((code if code >= 0 else ExitCode.LOST_RANK for code in codes), default=ExitCode.OK)
