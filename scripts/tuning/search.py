"""The trials of a search, on a file that many workers on many nodes append to: which comes next, and how each has ended.

Optuna's journal (JournalStorage) holds one Optuna study for each cell. Two rules make it fair and repeatable: batch by batch
in the order of the file, the next trial goes to the cell that is farthest behind its budget, so that all contestants advance
together; and the n-th point of a cell is drawn with a seed made of the sampler's and n alone, and trained with
`trial_seeds[n]`, whoever computes it. A trial that was lost is tried again as the n-th point, under a number of its own.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from bert_fast.errors import UserError
from bert_fast.files import cut_last_line
from bert_fast.hardware import cpu_name
from tuning.journal import ERROR, JOURNAL, LOST, OUTCOME, PLACE, PROCESSOR, SEED, WORKER
from tuning.outcome import CurvePoint, Outcome
from tuning.study_file import Cell, Dimension, Pruner, Sampler, Study, meaning_of

CHOICE = "choice"  # locked while a worker chooses its next trial
WORKERS = "workers"  # a file for each worker, touched while it lives
TOUCH_EVERY_S = 5.0
SILENT_S = 60.0  # without a touch, a worker is taken to be gone

_FIXED = "fixed_params"  # Optuna's mark of a trial that was enqueued

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Task:
    """A trial to compute: its cell, number, point and seed, and the trial to tell the result to."""

    cell: Cell
    trial: optuna.Trial
    point: dict[str, Any]
    seed: int

    @property
    def name(self) -> str:
        return f"{self.cell.name} trial {self.trial.number}"


class Search:
    """All cells of a study file in one folder."""

    def __init__(self, study: Study, folder: Path) -> None:
        """Open the folder's journal, or begin it.

        Raises:
            UserError: the journal is damaged, or of another study: which part of it differs.
        """
        self._file, self.folder = study.file, folder
        (folder / WORKERS).mkdir(parents=True, exist_ok=True)
        self._storage = open_storage(folder)
        self._lock = lock_of(folder / CHOICE)
        self.worker = worker_name(os.getpid())
        self._cells = {cell.name: cell for cell in study.cells}
        with self._only_one():
            there = set(optuna.get_all_study_names(self._storage))
            for name in sorted(there):
                other = optuna.load_study(study_name=name, storage=self._storage).user_attrs.get("meaning", {})
                if other.get("study", study.file.name) != study.file.name:
                    raise UserError(f"{folder / JOURNAL} is of the study {other['study']}; give --out another folder")
            for cell in study.cells:  # all of them before the first is begun
                if cell.name in there:
                    self._check_meaning(study, cell)
            self._studies = {cell.name: self._open(study, cell, cell.name in there) for cell in study.cells}

    def _check_meaning(self, study: Study, cell: Cell) -> None:
        meaning = _meaning(study, cell)
        found = optuna.load_study(study_name=cell.name, storage=self._storage).user_attrs.get("meaning", meaning)
        if found != meaning:
            other = next(name for name in meaning if found.get(name) != meaning[name])
            raise UserError(
                f"{self.folder / JOURNAL} is of another study: {cell.name} was searched with another {other}; give --out "
                f"another folder, or bring back the {other} that {study.path} had"
            )

    def _open(self, study: Study, cell: Cell, is_there: bool) -> optuna.Study:
        open_study = optuna.load_study if is_there else partial(optuna.create_study, direction="minimize")
        opened = open_study(study_name=cell.name, storage=self._storage, pruner=_pruner(self._file.pruner))
        if "meaning" not in opened.user_attrs:
            opened.set_user_attr("meaning", _meaning(study, cell))
            opened.set_user_attr("cell", [cell.contestant, cell.variant, cell.batch])
        return opened

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        """One worker at a time, on a network file system too; the lock of one that died is broken after a minute."""
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    # ---- what comes next ------------------------------------------------------------------------------------------------

    def next_task(self) -> Task | None:
        """Begin the next trial; None if all cells have their number of trials begun."""
        with self._only_one():
            self._give_up_lost_trials()
            batches = list(self._file.batches)
            behind = [
                (batches.index(cell.batch), counted / cell.trials, index, cell)
                for index, cell in enumerate(self._cells.values())
                if (counted := self.num_counted(cell)) < cell.trials
            ]
            if not behind:
                return None
            cell = min(behind, key=lambda each: each[:3])[3]
            trial = self._studies[cell.name].ask()
            trial.set_user_attr(WORKER, self.worker)
        place = self._place(cell, trial)
        seed = trial.user_attrs.get(SEED, self._seed(place))
        trial.set_user_attr(SEED, seed)
        trial.set_user_attr(PROCESSOR, cpu_name())
        trial.study.sampler = _sampler(self._file.sampler, place)
        point = {name: _suggest(trial, name, dimension) for name, dimension in cell.space.items()}
        return Task(cell, trial, point, seed)

    def _place(self, cell: Cell, trial: optuna.Trial | FrozenTrial) -> int:
        """The n of a trial: its number among those that are not tried again."""
        again = trial.user_attrs.get(PLACE)
        if again is not None:
            return int(again)
        return sum(each.number < trial.number and _FIXED not in each.system_attrs for each in self.trials(cell))

    def _seed(self, place: int) -> int:
        return self._file.trial_seeds[place % len(self._file.trial_seeds)]

    def num_counted(self, cell: Cell) -> int:
        """The trials of a cell that count towards its budget: not those that were lost or wait to be tried again."""
        return sum(LOST not in each.user_attrs and each.state is not TrialState.WAITING for each in self.trials(cell))

    def trials(self, cell: Cell) -> list[FrozenTrial]:
        """The trials of a cell, by number."""
        return self._studies[cell.name].get_trials(deepcopy=False)

    @property
    def is_complete(self) -> bool:
        """Whether every cell has its number of trials, all of them ended."""
        return all(
            self.num_counted(cell) >= cell.trials and all(each.state.is_finished() for each in self.trials(cell))
            for cell in self._cells.values()
        )

    def progress(self) -> str:
        """How far the search is, in one line."""
        counts = [(self.num_counted(cell), cell.trials) for cell in self._cells.values()]
        begun, wanted = (sum(each) for each in zip(*counts, strict=True))
        running = sum(each.state is TrialState.RUNNING for cell in self._cells.values() for each in self.trials(cell))
        others = (
            f" ({running} not ended; if their worker is gone, the same command tries them again after {SILENT_S:.0f} s)"
        )
        return (
            f"{begun} of {wanted} trials in {len(counts)} studies (contestant, variant, batch)"
            f"{others if running else ''}; {self.folder / JOURNAL}"
        )

    def _give_up_lost_trials(self) -> None:
        """Fail the running trials of workers that are gone; each is tried once more, at the same point, with its seed."""
        for cell in self._cells.values():
            for each in self.trials(cell):
                worker = each.user_attrs.get(WORKER)
                if each.state is TrialState.RUNNING and not self._is_alive(worker):
                    self._lose(cell, each, f"its worker {worker} is gone")

    def _lose(self, cell: Cell, trial: FrozenTrial, why: str) -> None:
        study, place = self._studies[cell.name], self._place(cell, trial)
        self._storage.set_trial_user_attr(trial._trial_id, ERROR, why)
        self._storage.set_trial_user_attr(trial._trial_id, LOST, True)
        study.tell(trial.number, state=TrialState.FAIL)
        point = trial.params if trial.params.keys() == cell.space.keys() else {}  # half a point is drawn anew
        study.enqueue_trial(point, user_attrs={SEED: trial.user_attrs.get(SEED, self._seed(place)), PLACE: place})

    def _is_alive(self, worker: str | None) -> bool:
        """By the age of its file, on the file server's clock. This worker has no trial while it looks for the next."""
        if worker is None or worker == self.worker:
            return False
        now = self.folder / WORKERS / self.worker
        now.touch()
        try:
            return now.stat().st_mtime - (self.folder / WORKERS / worker).stat().st_mtime < SILENT_S
        except FileNotFoundError:
            return False

    @contextmanager
    def alive(self) -> Iterator[None]:
        """While this is open, other workers see that this one lives."""
        path, done = self.folder / WORKERS / self.worker, threading.Event()
        path.touch()

        def touch() -> None:
            while not done.wait(TOUCH_EVERY_S):
                with suppress(OSError):  # a file server that does not answer now may do so later
                    path.touch()

        thread = threading.Thread(target=touch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            path.unlink(missing_ok=True)

    # ---- how a trial has ended ------------------------------------------------------------------------------------------

    def watcher(self, task: Task) -> Callable[[CurvePoint], bool]:
        """What is told of each evaluation of a trial, and says whether to prune the trial there."""
        count, best = 0, 0.0

        def evaluated(point: CurvePoint) -> bool:
            nonlocal count, best
            count, best = count + 1, max(best, point.accuracy)
            try:
                # The studies minimise, so pruners and the sampler are given what is missing to an accuracy of 1
                task.trial.report(1.0 - best, count)
            except UpdateFinishedTrialError:  # this worker was silent, and another has the trial
                return True
            is_over = point.samples >= self._file.cap_samples  # a trial that has used its budget is a result
            return self._file.pruner.kind != "none" and not is_over and task.trial.should_prune()

        return evaluated

    def finish(self, task: Task, outcome: Outcome, diverged: str | None) -> bool:
        """Record a trial that was computed. Returns whether it was this worker's to record.

        Args:
            diverged: how its run diverged, None if it did not. Such a point is a result, not a failure: as a run that has an
                accuracy of 0 at the cap.
        """
        record = outcome.record(self._file.target, self._file.cap, self._file.objective)
        with self._only_one():
            if self._running(task) is None:
                return False
            task.trial.set_user_attr(OUTCOME, record)
            if diverged is not None:
                task.trial.set_user_attr(ERROR, diverged)
            if outcome.pruned:
                task.trial.study.tell(task.trial, state=TrialState.PRUNED)
            else:
                task.trial.study.tell(task.trial, record["value"])
        return True

    def fail(self, task: Task, why: str) -> bool:
        """Record a trial that could not be computed. It costs its cell one trial. Returns as `finish` does."""
        with self._only_one():
            if self._running(task) is None:
                return False
            task.trial.set_user_attr(ERROR, why)
            task.trial.study.tell(task.trial, state=TrialState.FAIL)
        return True

    def abandon(self, task: Task) -> None:
        """Give back a trial that was interrupted: it is computed again later."""
        with self._only_one():
            if (trial := self._running(task)) is not None:
                self._lose(task.cell, trial, "interrupted")

    def _running(self, task: Task) -> FrozenTrial | None:
        """The trial as it is in the journal; None if another worker has given it up, taking this one to be gone."""
        trial = self.trials(task.cell)[task.trial.number]
        return trial if trial.state is TrialState.RUNNING else None


def worker_name(process: int) -> str:
    """What a worker's file and its trials call it."""
    return f"{socket.gethostname()}-{process}"


def lock_of(path: Path) -> JournalFileSymlinkLock:
    """A lock of a file, which is made if absent, across processes and nodes; that of a dead process is broken after a while.

    Optuna tells the age of a lock by the file that it links to, so that this must be there, and its path absolute.
    """
    path = path.absolute()
    path.touch()
    return JournalFileSymlinkLock(str(path), grace_period=int(SILENT_S))


def open_storage(folder: Path) -> optuna.storages.JournalStorage:
    """The journal of a folder, made if absent. Raises UserError if it is damaged."""
    path = folder / JOURNAL
    lock = lock_of(path)
    lock.acquire()
    try:
        cut_last_line(path)  # which a full disk or a kill has left, and the next one would be joined to
    finally:
        lock.release()
    try:
        return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock))
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:  # of replaying its lines
        raise UserError(f"{path} is no journal of a search ({error}); give --out another folder") from None


def _meaning(study: Study, cell: Cell) -> dict[str, str]:
    return {"study": study.file.name, **meaning_of(study, cell)}


def best_trial(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The complete trial with the least value, None without one."""
    complete = [each for each in trials if each.state is TrialState.COMPLETE and ERROR not in each.user_attrs]
    return min(complete, key=lambda each: each.value or 0.0, default=None)


def _suggest(trial: optuna.Trial, name: str, dimension: Dimension) -> Any:
    return trial._suggest(name, _distribution(dimension))


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _sampler(sampler: Sampler, place: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial, with a seed of the trial's own, so that workers do not draw the same points."""
    seed = (sampler.seed * 1_000_003 + place) % 2**32
    if sampler.kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(n_startup_trials=sampler.startup, seed=seed, constant_liar=True)


def _pruner(pruner: Pruner) -> optuna.pruners.BasePruner:
    if pruner.kind == "none":
        return optuna.pruners.NopPruner()
    if pruner.kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=pruner.startup, n_warmup_steps=pruner.min_evaluations)
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=pruner.min_evaluations, reduction_factor=pruner.reduction_factor
    )
