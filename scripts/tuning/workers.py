"""Who computes the trials: this process, or several of its kind beside each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bert_fast.command import one_line
from bert_fast.exit_codes import ExitCode, of_signal
from bert_fast.launch import slurm
from tuning.search import WORKERS, Search, Task, worker_name
from tuning.study_file import Study
from tuning.trial import STOP_SIGNALS, DivergedError, Run, runner


class StopRequest:
    """The signals that ask a worker to end, while this is open: `number` is the first one's, 0 before it.

    A signal breaks off what runs within `breaking` with KeyboardInterrupt, once, so that another does not disturb how it ends.
    Outside, where the journal is written, it is only noted.
    """

    def __init__(self) -> None:
        self.number = 0
        self._breaks = False

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def note(self, number: int) -> None:
        """A signal has come; the first counts."""
        self.number = self.number or number

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.note(number)
        if self._breaks:
            self._breaks = False
            raise KeyboardInterrupt

    @contextmanager
    def breaking(self) -> Iterator[None]:
        """What runs within may be broken off. Raises KeyboardInterrupt if a signal has come before."""
        if self.number:
            raise KeyboardInterrupt
        self._breaks = True
        try:
            yield
        finally:
            self._breaks = False


def work(study: Study, folder: Path, requeues: bool = False) -> int:
    """Compute trials until none is left to begin. Returns the exit code.

    A signal ends it; the trial that it was computing is computed again by another, or later.

    Args:
        requeues: whether this is a job of Slurm's that is to be started again after Slurm has stopped it.
    """
    search, num_ended = Search(study, folder), 0
    log_path = folder / WORKERS / f"{search.worker}.log"
    with StopRequest() as stop, search.alive(), log_path.open("a", encoding="utf-8") as log:
        run = runner(study, log)
        while not stop.number and (task := search.next_task()) is not None:
            try:
                _compute(search, task, run, stop)
                num_ended += 1
            except KeyboardInterrupt:
                search.abandon(task)
                stop.note(
                    signal.SIGTERM
                )  # unless it was another: a signal to the run alone, such as Slurm's to its tasks
    if stop.number:
        print(f"{search.worker}: stopped; the same command goes on", flush=True)
        if requeues:
            _requeue(stop.number, num_ended)
        return of_signal(stop.number)
    return ExitCode.OK


def _requeue(number: int, num_ended: int) -> None:
    """Have Slurm start this job again if it has stopped it and will not do so by itself: see slurm/README.md."""
    job = slurm.read_job(os.environ)
    if slurm.is_being_preempted(job):
        why = "Slurm is preempting it"
    elif number == signal.SIGUSR1 and num_ended:
        why = "SIGUSR1 says that the time limit is near"
    else:
        short = "; no trial ended before SIGUSR1: the time limit is too short" if number == signal.SIGUSR1 else ""
        print(f"job {job.name}: not requeued by us{short}", flush=True)
        return
    refusal = slurm.requeue(job)
    end = f"could not be requeued: {refusal}; submit it again to go on" if refusal else f"requeued: {why}"
    print(f"job {job.name} {end}", flush=True)


def _compute(search: Search, task: Task, run: Run, stop: StopRequest) -> None:
    """Run a trial and record how it ended. Whatever is wrong with it costs this trial alone."""
    try:
        config = task.cell.config(task.point, task.seed)
        with stop.breaking():
            outcome, diverged = run(config, search.watcher(task)), None
    except DivergedError as error:
        outcome, diverged = error.outcome, str(error)
    except Exception as error:
        text = one_line(f"{type(error).__name__}: {error}", 500)
        search.fail(task, text)
        print(f"{task.name}: failed: {text}", flush=True)
        return
    if not search.finish(task, outcome, diverged):
        print(f"{task.name}: another worker has it, because this one was silent for too long; dropped", flush=True)
        return
    how = "diverged" if diverged else "pruned" if outcome.pruned else "done"
    point = " ".join(f"{name}={shown(value)}" for name, value in task.point.items())
    print(f"{task.name}: {how}, accuracy {outcome.best:.4f} at {outcome.samples:,} samples, {outcome.seconds:.0f} s; {point}",
          flush=True)  # fmt: skip


def shown(value: object) -> str:
    """A value of a point, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_workers(commands: Sequence[Sequence[str]], folder: Path) -> int:
    """Start workers on this machine and wait for them. Returns the exit code.

    Args:
        commands: for each worker its arguments of scripts/tune.py.
        folder: of the search. What a killed worker was computing is free to be tried again once all have ended.
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

    previous = {number: signal.signal(number, forward) for number in STOP_SIGNALS}
    try:
        codes = [each.wait() for each in workers]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for each in workers:
        (folder / WORKERS / worker_name(each.pid)).unlink(missing_ok=True)
    if stopped:
        return of_signal(stopped)
    return max((code if code >= 0 else ExitCode.LOST_RANK for code in codes), default=ExitCode.OK)
