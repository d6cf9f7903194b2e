"""Workers of a search as processes of their own, with runs that are made up."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tuning import diverges, made_up, make_study, outcome_of

from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode, of_signal
from tuning import workers
from tuning.outcome import Outcome
from tuning.search import WORKERS, Search
from tuning.study_file import Study
from tuning.trial import STOP_SIGNALS, Watch
from tuning.workers import StopRequest, work

optuna = pytest.importorskip("optuna")
State = optuna.trial.TrialState
ONE = {"adamw": {"space": {"optimizer.lr": {"low": 0.1, "high": 1.0}}}}
FORK = multiprocessing.get_context("fork")


class Runs:
    """Made-up runs of all processes, each noted in a file; where `hold` is there, they wait in the middle."""

    def __init__(self, folder: Path) -> None:
        self._notes, self.hold = folder / "runs.txt", folder / "hold"

    def __call__(self, config: Config, watch: Watch) -> Outcome:
        with self._notes.open("a", encoding="utf-8") as file:
            file.write(json.dumps([config.optimizer.name, config.optimizer.lr, config.train.seed, os.getpid()]) + "\n")
        deadline = time.monotonic() + 30
        while self.hold.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return made_up(config, watch)

    def begun(self) -> list[list[Any]]:
        text = self._notes.read_text(encoding="utf-8") if self._notes.exists() else ""
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs(tmp_path)
    monkeypatch.setattr(workers, "runner", lambda _study, _log: made)
    return made


Start = Callable[[Study, Path], Any]


@pytest.fixture
def start() -> Iterator[Start]:
    """A worker in a process of its own; killed at the end if it is still there."""
    started = []

    def begin(study: Study, folder: Path) -> Any:
        process = FORK.Process(target=lambda: os._exit(work(study, folder)))
        process.start()
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.join(10)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def states(study: Study, folder: Path) -> Counter[Any]:
    search = Search(study, folder)
    return Counter(each.state for cell in study.cells for each in search.trials(cell))


def test_several_at_once_compute_every_trial_once(tmp_path: Path, runs: Runs, start: Start) -> None:
    study = make_study(tmp_path, trials=5)
    processes = [start(study, tmp_path) for _ in range(3)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert states(study, tmp_path) == {State.COMPLETE: 10}
    begun = runs.begun()
    assert len(begun) == 10
    assert len({(name, lr) for name, lr, *_ in begun}) == 10
    assert Counter((name, seed) for name, _, seed, _ in begun) == {
        (name, seed): count for name in ("adamw", "lamb") for seed, count in ((11, 2), (12, 2), (13, 1))
    }
    assert Search(study, tmp_path).is_complete
    assert not [path for path in (tmp_path / WORKERS).iterdir() if path.suffix != ".log"]


def test_a_killed_worker_costs_one_trial_which_is_tried_again(tmp_path: Path, runs: Runs, start: Start) -> None:
    study = make_study(tmp_path, trials=2)
    runs.hold.touch()
    victim = start(study, tmp_path)
    wait_for(runs.begun)
    victim.kill()
    victim.join(10)
    runs.hold.unlink()
    (lost,) = runs.begun()
    (file,) = (path for path in (tmp_path / WORKERS).iterdir() if path.suffix != ".log")
    os.utime(file, (1, 1))  # a minute later
    assert work(study, tmp_path) == ExitCode.OK
    assert states(study, tmp_path) == {State.COMPLETE: 4, State.FAIL: 1}
    again = [run for run in runs.begun()[1:] if run[:3] == lost[:3]]
    assert len(again) == 1
    assert len(runs.begun()) == 5
    assert Search(study, tmp_path).is_complete


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_gives_the_trial_back_and_the_same_command_goes_on(
    tmp_path: Path, runs: Runs, start: Start, number: signal.Signals
) -> None:
    study = make_study(tmp_path, trials=2)
    runs.hold.touch()
    process = start(study, tmp_path)
    wait_for(runs.begun)
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == of_signal(number)
    assert states(study, tmp_path) == {State.FAIL: 1, State.WAITING: 1}
    runs.hold.unlink()
    assert work(study, tmp_path) == ExitCode.OK
    assert states(study, tmp_path) == {State.FAIL: 1, State.COMPLETE: 4}
    assert Counter(tuple(run[:3]) for run in runs.begun())[tuple(runs.begun()[0][:3])] == 2
    assert Search(study, tmp_path).is_complete


def test_a_signal_between_runs_is_noted_and_nothing_is_left_open(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path, trials=2)
    finish = Search.finish

    def signalled(*arguments: Any) -> bool:
        signal.raise_signal(signal.SIGTERM)  # while the journal is written
        return finish(*arguments)

    monkeypatch.setattr(Search, "finish", signalled)
    assert work(study, tmp_path) == of_signal(signal.SIGTERM)
    assert states(study, tmp_path) == {State.COMPLETE: 1}


def test_a_second_signal_does_not_disturb_the_first() -> None:
    before, ended = [signal.getsignal(number) for number in STOP_SIGNALS], list[bool]()
    with StopRequest() as stop:
        with pytest.raises(KeyboardInterrupt), stop.breaking():
            stopped_twice(ended)
        assert ended
        assert stop.number == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt), stop.breaking():
            pytest.fail("a run began after a signal")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def stopped_twice(ended: list[bool]) -> None:
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.raise_signal(signal.SIGTERM)  # while the run ends
        ended.append(True)


def test_handlers_are_as_before(tmp_path: Path, runs: Runs) -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    work(make_study(tmp_path, trials=1), tmp_path)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_a_run_that_was_stopped_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Slurm, which signals the tasks of a job: the trial is given back, and the worker ends."""

    def stopped(_config: Config, _watch: Watch) -> Outcome:
        raise KeyboardInterrupt

    study = make_study(tmp_path, trials=2)
    monkeypatch.setattr(workers, "runner", lambda _study, _log: stopped)
    assert work(study, tmp_path) == of_signal(signal.SIGTERM)
    assert states(study, tmp_path) == {State.FAIL: 1, State.WAITING: 1}


def test_whatever_goes_wrong_costs_one_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = iter([diverges, raises, made_up, made_up, made_up, made_up])
    monkeypatch.setattr(workers, "runner", lambda _study, _log: lambda config, watch: next(ways)(config, watch))
    study = make_study(tmp_path, trials=3)
    assert work(study, tmp_path) == ExitCode.OK
    assert states(study, tmp_path) == {State.COMPLETE: 5, State.FAIL: 1}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("adamw/all/64 trial 0: diverged, accuracy 0.3100")
    assert printed[1] == "lamb/all/64 trial 0: failed: RuntimeError: a shape is wrong, in two lines"
    assert printed[2].startswith("adamw/all/64 trial 1: done, ")
    search = Search(study, tmp_path)
    diverged = search.trials(study.cells[0])[0]
    assert diverged.state is State.COMPLETE
    assert diverged.user_attrs["error"] == "the loss is not finite at step 30"
    assert diverged.value == max(each.value for cell in study.cells for each in search.trials(cell) if each.value)


def raises(_config: Config, _watch: Watch) -> Outcome:
    raise RuntimeError("a shape is wrong,\nin two lines")


def test_a_point_whose_config_is_refused_costs_one_trial(tmp_path: Path, runs: Runs) -> None:
    """Ends of dimensions are checked one by one; two together may still not fit."""
    study = make_study(tmp_path, contestants=ONE, trials=3)
    cell = study.cells[0]
    real = type(cell).config
    refusals = iter([True, False, False])

    def config(*arguments: Any) -> Config:
        if next(refusals):
            raise UserError("batch.global_batch_size=64 is not 32 x 1 x 1; change one of them")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(cell), "config", config)
        assert work(study, tmp_path) == ExitCode.OK
    assert states(study, tmp_path) == {State.COMPLETE: 2, State.FAIL: 1}


def test_a_late_result_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(tmp_path, trials=1, contestants=ONE)
    other = Search(study, tmp_path)
    other.worker = "other"

    def slow(config: Config, watch: Watch) -> Outcome:
        if not any(each.state.is_finished() for each in other.trials(study.cells[0])):
            (own,) = (path for path in (tmp_path / WORKERS).iterdir() if path.suffix != ".log")
            os.utime(own, (1, 1))
            task = other.next_task()
            assert task is not None
            other.finish(task, outcome_of([0.31]), None)
        return made_up(config, watch)

    monkeypatch.setattr(workers, "runner", lambda _study, _log: slow)
    assert work(study, tmp_path) == ExitCode.OK
    assert states(study, tmp_path) == {State.FAIL: 1, State.COMPLETE: 1}
    assert "silent for too long; dropped" in capsys.readouterr().out


# ---- under Slurm ----------------------------------------------------------------------------------------------------------

SCONTROL = """#!/bin/sh
echo "$@" >> {here}/calls
if [ "$1" = show ]; then cat {here}/job; fi
"""


@pytest.fixture
def slurm_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An array's last task, whose id is the array's own, and an scontrol."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(SCONTROL.format(here=tmp_path), encoding="utf-8")
    scontrol.chmod(0o755)
    (tmp_path / "job").write_text("JobState=RUNNING PreemptTime=None", encoding="utf-8")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name, value in {
        "SLURM_JOB_ID": "36", "SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": "15", "SLURM_JOB_NODELIST": "node1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize(
    ("number", "num_before", "job", "requeued"),
    [
        (signal.SIGUSR1, 1, "JobState=RUNNING PreemptTime=None", True),
        (signal.SIGUSR1, 0, "JobState=RUNNING PreemptTime=None", False),  # it would never end
        (signal.SIGTERM, 1, "JobState=RUNNING PreemptTime=None", False),  # scancel, or Slurm requeues by itself
        (signal.SIGTERM, 0, "JobState=RUNNING PreemptTime=2026-11-27T08:00:00", True),
    ],
)
def test_a_task_is_requeued_if_slurm_will_not(
    slurm_task: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    num_before: int,
    job: str,
    requeued: bool,
) -> None:
    (slurm_task / "job").write_text(job, encoding="utf-8")
    begun = []

    def signalled(config: Config, watch: Watch) -> Outcome:
        begun.append(config)
        if len(begun) > num_before:
            signal.raise_signal(number)
        return made_up(config, watch)

    monkeypatch.setattr(workers, "runner", lambda _study, _log: signalled)
    assert work(make_study(slurm_task), slurm_task, requeues=True) == of_signal(number)
    calls = (slurm_task / "calls").read_text(encoding="utf-8").splitlines()
    assert ("requeue 36_15" in calls) == requeued
    assert calls[0] == "show job 36_15 --oneliner"
    assert ("job 36_15 requeued" in capsys.readouterr().out) == requeued


def test_a_task_is_not_requeued_unasked(slurm_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled(config: Config, watch: Watch) -> Outcome:
        signal.raise_signal(signal.SIGUSR1)
        return made_up(config, watch)

    monkeypatch.setattr(workers, "runner", lambda _study, _log: signalled)
    assert work(make_study(slurm_task), slurm_task) == of_signal(signal.SIGUSR1)
    assert not (slurm_task / "calls").exists()
