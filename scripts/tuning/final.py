"""The last round: the best point of every cell on fresh seeds, then ablations: one factor changed at a time.

Each run is one line of final.jsonl, whichever worker computes it; what is there is not run again.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bert_fast.command import one_line
from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.files import cut_last_line
from bert_fast.hardware import cpu_name
from tuning.final_rows import FINAL, FinalRow, Key, key_of, parse_rows
from tuning.outcome import Outcome
from tuning.search import WORKERS, Search, best_trial, lock_of
from tuning.study_file import Cell, Final, Study
from tuning.trial import DivergedError, Run, runner
from tuning.workers import StopRequest


@dataclass(frozen=True)
class FinalRun:
    """One run: a cell's best point with a seed, changed by an ablation or not.

    stretch: schedule and cap are as many times as long as in the search
    """

    cell: Cell
    trial: int
    point: Mapping[str, Any]
    seed: int
    stretch: float = 1.0
    ablation: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What makes it another run than the others of its study."""
        return key_of(self.cell.name, self.ablation, self.changes, self.seed, self.trial, self.stretch)

    @property
    def name(self) -> str:
        return f"{self.cell.name}{f' with {self.ablation}' if self.ablation else ''}, seed {self.seed}"

    def config(self) -> Config:
        """Raises UserError where an ablation does not fit the winner."""
        config = self.cell.config(self.point, self.seed, self.changes)
        if self.stretch == 1:
            return config
        longer = {
            "schedule.total_steps": round(self.stretch * config.schedule.total_steps),
            "train.max_steps": math.ceil(self.stretch * config.train.max_steps),
        }
        return self.cell.config(self.point, self.seed, {**self.changes, **longer})


def final_runs(study: Study, search: Search) -> list[FinalRun]:
    """The best point of every cell at the batches of the last round, on its seeds.

    Raises:
        UserError: the study has no last round, or no trial of it is complete.
    """
    final = _final(study)
    batches = final.batches or [next(iter(study.file.batches))]
    runs = []
    for cell in study.cells:
        best = best_trial(search.trials(cell)) if cell.batch in batches else None
        if best is None:
            continue
        runs += [FinalRun(cell, best.number, best.params, seed, final.stretch) for seed in final.seeds]
    if not runs:
        raise UserError(f"{search.folder} has no complete trial yet; run `scripts/tune.py run` first")
    return sorted(runs, key=lambda run: final.seeds.index(run.seed))  # all cells have their first seed early


def ablation_runs(study: Study, search: Search, rows: list[FinalRow]) -> list[FinalRun]:
    """The winner of the last round, or each cell that can have them, with the settings of each ablation, on the same seeds.

    The winner has the least mean value; a run that could not be computed rules its cell out.
    """
    runs = final_runs(study, search)
    batch = (_final(study).batches or [next(iter(study.file.batches))])[0]
    values = {(run.key): math.inf for run in runs if run.cell.batch == batch}
    for row in rows:
        if row.key in values and row.outcome is not None:
            cap = row.stretch * study.file.cap
            values[row.key] = row.outcome.value(study.file.target, cap, study.file.objective)[0]
    means = {
        cell: statistics.fmean(value for key, value in values.items() if key[0] == cell)
        for cell in {key[0] for key in values}
    }
    winner = min(means, key=lambda cell: (means[cell], cell))
    return [
        changed
        for name, ablation in study.file.ablations.items()
        for run in runs
        if ablation.of == "each" or run.cell.name == winner
        for changed in [FinalRun(run.cell, run.trial, run.point, run.seed, run.stretch, name, ablation.settings)]
        if ablation.of == "winner" or _has_config(changed)
    ]


def _has_config(run: FinalRun) -> bool:
    try:
        run.config()
    except UserError:  # an ablation of something that its contestant does not have
        return False
    return True


def _final(study: Study) -> Final:
    if study.file.final is None:
        raise UserError(f"{study.path} has no final round; add final: {{seeds: [...]}}")
    return study.file.final


def run_part(study: Study, folder: Path, part: int, num_parts: int, ablations: bool = True) -> list[str]:
    """Compute every `num_parts`-th of the runs that are missing, from number `part` on: first finals, then `ablations`.

    Returns:
        The names of finals that are still missing, so that the winner is not known and ablations have to wait.
    """
    search = Search(study, folder)
    finals = final_runs(study, search)
    log_path = folder / WORKERS / f"{search.worker}.log"
    with StopRequest() as stop, search.alive(), log_path.open("a", encoding="utf-8") as log:
        _compute(study, folder, finals[part::num_parts], log, stop)
        missing = _missing(finals, read_rows(folder))
        if ablations and not missing:
            _compute(study, folder, ablation_runs(study, search, read_rows(folder))[part::num_parts], log, stop)
    return [run.name for run in missing]


def _missing(runs: Iterable[FinalRun], rows: list[FinalRow]) -> list[FinalRun]:
    """Those without a row, and those that could not be computed, which may have been the machine's fault."""
    done = {row.key for row in rows if row.outcome is not None}
    return [run for run in runs if run.key not in done]


def _compute(study: Study, folder: Path, runs: list[FinalRun], log: TextIO, stop: StopRequest) -> None:
    run_one = runner(study, log)
    for run in _missing(runs, read_rows(folder)):
        row = _row(study, run, run_one, stop)
        _append(folder, row)
        outcome = row["outcome"]
        text = (
            row["error"] or f"accuracy {outcome['best_accuracy']:.4f}, {outcome['value']:,.0f} ({study.file.objective})"
        )
        print(f"{run.name}: {text}", flush=True)


def _row(study: Study, run: FinalRun, run_one: Run, stop: StopRequest) -> dict[str, Any]:
    """Compute a run: its line of final.jsonl."""
    outcome: Outcome | None = None
    error = None
    try:
        config = run.config()
        with stop.breaking():
            outcome = run_one(config, lambda _: False)
    except DivergedError as diverged:  # a result, the worst
        outcome, error = diverged.outcome, str(diverged)
    except Exception as failed:
        error = one_line(f"{type(failed).__name__}: {failed}", 500)
    cap = run.stretch * study.file.cap
    return {
        "round": "ablation" if run.ablation else "final",
        "contestant": run.cell.contestant,
        "variant": run.cell.variant,
        "batch": run.cell.batch,
        "ablation": run.ablation,
        "seed": run.seed,
        "trial": run.trial,
        "point": dict(run.point),
        "settings": dict(run.changes),
        "stretch": run.stretch,
        "processor": cpu_name(),
        "outcome": None if outcome is None else outcome.record(study.file.target, cap, study.file.objective),
        "error": error,
    }


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    lock = lock_of(folder / FINAL)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def read_rows(folder: Path) -> list[FinalRow]:
    """The runs that are there, by line. A line that was cut off is removed. Raises UserError for a damaged one."""
    path = folder / FINAL
    if not path.is_file():
        return []
    with _only_one(folder):
        cut_last_line(path)
        text = path.read_text(encoding="utf-8", errors="replace")
    return parse_rows(text, path)[0]


def _append(folder: Path, row: Mapping[str, Any]) -> None:
    with _only_one(folder), (folder / FINAL).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
