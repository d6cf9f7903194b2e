"""What a search has left in its folder: the trials of journal.log, the runs of final.jsonl. Read, never written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError

from ..final_rows import FINAL, FinalRow, outcome_from, parse_rows
from ..journal import ERROR, JOURNAL, OUTCOME, PROCESSOR, SEED
from ..journal import LOST as LOST_MARK
from ..outcome import Outcome
from ..study_file import Cell, Study

COMPLETE, PRUNED, FAILED, DIVERGED, LOST, OPEN = "complete", "pruned", "failed", "diverged", "lost", "open"
COUNTED = (COMPLETE, DIVERGED, PRUNED, FAILED)  # states that have used up a trial of the budget


@dataclass(frozen=True)
class Trial:
    """One trial of the search.

    state:   complete, pruned or failed; diverged: complete as the worst result; lost: of a worker that is gone, and tried
             again; open: not ended
    value:   the objective; of complete trials only
    outcome: absent of failed ones
    seconds: from its start to its end
    """

    number: int
    state: str
    value: float | None
    point: Mapping[str, Any]
    seed: int | None
    outcome: Outcome | None
    error: str
    processor: str
    seconds: float


@dataclass(frozen=True)
class CellTrials:
    """The trials of a cell by number; `optuna_study` is None where none has begun."""

    cell: Cell
    trials: tuple[Trial, ...]
    optuna_study: Any = None

    def count(self, *states: str) -> int:
        """How many trials are in one of these states."""
        return sum(trial.state in states for trial in self.trials)

    @property
    def best(self) -> Trial | None:
        """The complete trial with the least value; of equal ones the first."""
        complete = [trial for trial in self.trials if trial.state == COMPLETE and trial.outcome is not None]
        return min(complete, key=_value, default=None)


@dataclass(frozen=True)
class Records:
    """All that the report is made of; `notes` are about the files."""

    study: Study
    cells: tuple[CellTrials, ...]
    finals: tuple[FinalRow, ...]
    has_finals: bool
    notes: tuple[str, ...]


def read_records(study: Study, folder: Path) -> Records:
    """Read a search's folder.

    Raises:
        UserError: optuna is not installed, there is no journal, or a file is damaged.
    """
    names, trials_of = _open_journal(folder / JOURNAL)
    cells = tuple(
        trials_of(cell) if cell.name in names else CellTrials(cell, ()) for cell in study.cells
    )  # fmt: skip
    strange = sorted(names - {cell.name for cell in study.cells})
    notes = []
    if strange:
        notes.append(f"{JOURNAL} also has trials of {', '.join(strange)}, which this report does not cover.")
    kept, more = _read_finals(folder, cells, study.file.final.stretch if study.file.final else 1.0)
    return Records(study, cells, tuple(kept), bool(kept), (*notes, *more))


def import_optuna() -> Any:
    """The package optuna. Raises UserError where it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise UserError(
            "the package optuna is not installed, and a search's journal is read with it; pip install optuna "
            "(or the extra: pip install -e '.[tuning]')"
        ) from None
    return optuna


def _open_journal(path: Path) -> tuple[set[str], Callable[[Cell], CellTrials]]:
    """The names of the journal's studies, and what reads one of them."""
    optuna = import_optuna()
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: nothing was searched there; run `scripts/tune.py run` first, or correct --out"
        )
    try:
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        storage = optuna.storages.JournalStorage(backend)
        names = set(optuna.get_all_study_names(storage))
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as the journal of a search ({error}); restore it, or correct --out"
        ) from None

    def trials_of(cell: Cell) -> CellTrials:
        optuna_study = optuna.load_study(study_name=cell.name, storage=storage)
        trials = sorted(optuna_study.get_trials(deepcopy=False), key=lambda trial: trial.number)
        return CellTrials(cell, tuple(_trial(each, f"{path}: {cell.name}") for each in trials), optuna_study)

    return names, trials_of


def _trial(frozen: Any, where: str) -> Trial:
    attributes = frozen.user_attrs
    error = str(attributes.get(ERROR) or "")
    state = {"COMPLETE": COMPLETE, "PRUNED": PRUNED, "FAIL": FAILED}.get(frozen.state.name, OPEN)
    if state == FAILED and attributes.get(LOST_MARK):
        state = LOST
    elif state == COMPLETE and error:
        state = DIVERGED
    took = (
        frozen.datetime_complete - frozen.datetime_start if frozen.datetime_complete and frozen.datetime_start else None
    )
    return Trial(
        number=frozen.number,
        state=state,
        value=float(frozen.value) if state in (COMPLETE, DIVERGED) else None,
        point=dict(frozen.params),
        seed=attributes.get(SEED),
        outcome=_outcome(attributes.get(OUTCOME), f"{where} trial {frozen.number}", state == PRUNED),
        error=error,
        processor=str(attributes.get(PROCESSOR) or ""),
        seconds=took.total_seconds() if took else 0.0,
    )


def _outcome(record: Any, where: str, pruned: bool = False) -> Outcome | None:
    if record is None:
        return None
    try:
        return outcome_from(record, pruned)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: its outcome is of another form ({error!r}); make the report with the version that searched"
        ) from None


def _read_finals(folder: Path, cells: tuple[CellTrials, ...], stretch: float) -> tuple[list[FinalRow], list[str]]:
    """The runs of the last round of the cells' best points as they are now; of one that is there twice, the last counts."""
    path, notes = folder / FINAL, list[str]()
    if not path.is_file():
        return [], notes
    rows, is_cut = parse_rows(path.read_text(encoding="utf-8", errors="replace"), path)
    if is_cut:
        notes.append(f"The last line of {FINAL} is cut off and left out.")
    runs = {row.key: row for row in rows}
    best = {each.cell.name: each.best.number for each in cells if each.best is not None}
    kept = [run for run in runs.values() if best.get(run.cell_name) == run.trial and run.stretch == stretch]
    if len(kept) < len(runs):
        notes.append(
            f"{len(runs) - len(kept)} runs of {FINAL} are left out: of cells that this report does not cover, of points that "
            "are no longer the best of their cell, or of another stretch."
        )
    return kept, notes


def _value(trial: Trial) -> float:
    return math.inf if trial.value is None else trial.value
