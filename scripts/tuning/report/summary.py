"""The numbers of the report, from its records."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from bert_fast.report.bench import environment

from ..final_rows import FinalRow
from ..outcome import Outcome
from ..study_file import Study
from .loading import COMPLETE, COUNTED, CellTrials, Records

REFERENCE = "adamw"  # the contestant that the others are measured against


@dataclass(frozen=True)
class Spread:
    """Samples to an accuracy by seed, and how many runs came to it. The others count as `Outcome.value` says."""

    by_seed: dict[int, float]
    reached: int

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        return fmean(self.by_seed.values())

    @property
    def stdev(self) -> float:
        return stdev(self.by_seed.values()) if self.n > 1 else 0.0


def spread(runs: Iterable[FinalRow], level: float, study: Study, unit: str = "samples") -> Spread | None:
    """Samples or seconds to an accuracy over the runs that have an outcome; None if there is none."""
    file = study.file
    cap = float(file.cap_samples) if unit == "samples" else file.cap
    values = {run.seed: run.outcome.value(level, run.stretch * cap, unit) for run in runs if run.outcome is not None}
    if not values:
        return None
    return Spread(
        {seed: value for seed, (value, _) in values.items()}, sum(not censored for _, censored in values.values())
    )


def runs_of(records: Records, cell: str, ablation: str | None = None) -> list[FinalRow]:
    """The runs of the last round of a cell: of its best point, or of one of its ablations."""
    return [run for run in records.finals if run.cell_name == cell and run.ablation == ablation]


def reached(outcome: Outcome | None, level: float) -> bool:
    """Whether a run came to an accuracy."""
    return outcome is not None and outcome.to(level) is not None


def all_outcomes(records: Records) -> list[tuple[str, Outcome]]:
    """Every run with an outcome, of the search and of the last round, and the cell it is of."""
    found = [
        (each.cell.name, trial.outcome) for each in records.cells for trial in each.trials if trial.outcome is not None
    ]
    return found + [(run.cell_name, run.outcome) for run in records.finals if run.outcome is not None]


def best_so_far(cell: CellTrials) -> list[tuple[float, float]]:
    """(number of trials, the best value of them), from the first complete trial on."""
    points, best, count = [], math.inf, 0
    for trial in cell.trials:
        if trial.state not in COUNTED:
            continue
        count += 1
        if trial.state == COMPLETE and trial.value is not None:
            best = min(best, trial.value)
        if math.isfinite(best):
            points.append((float(count), best))
    return points


def contestants_of(study: Study) -> list[str]:
    """The contestants of the report, in the order of the study file."""
    return list(dict.fromkeys(cell.contestant for cell in study.cells))


def variants_of(study: Study) -> list[str]:
    return list(dict.fromkeys(cell.variant for cell in study.cells))


def batches_of(study: Study) -> list[int]:
    return list(dict.fromkeys(cell.batch for cell in study.cells))


def budget_text(records: Records) -> str:
    """Whether all contestants had the same budget, and if not, which had another."""
    different, unfinished = [], []
    for batch in batches_of(records.study):
        cells = [each for each in records.cells if each.cell.batch == batch]
        had = [_budget(each) for each in cells]
        most = max(had, key=lambda each: each[0])
        for each, (ended, seeds) in zip(cells, had, strict=True):
            if ended != most[0]:
                different.append(f"{each.cell.name} had {ended} trials where others had {most[0]}")
            elif seeds != most[1]:
                different.append(f"{each.cell.name} had other trial seeds")
            if ended < each.cell.trials:
                unfinished.append(f"{each.cell.name} {ended} of {each.cell.trials}")
    absent = [name for name in records.study.file.contestants if name not in contestants_of(records.study)]
    text = "All contestants had the same budget: as many trials, with the same seeds, sampler and pruner."
    if different:
        text = f"The contestants did not have the same budget: {'; '.join(different)}."
    if unfinished:
        text += f" The search is not finished: {', '.join(unfinished)} trials."
    if absent:
        text += f" Left out of this report: {', '.join(absent)}."
    return text


def _budget(cell: CellTrials) -> tuple[int, list[int]]:
    counted = [trial for trial in cell.trials if trial.state in COUNTED]
    return len(counted), sorted(trial.seed for trial in counted if trial.seed is not None)


@dataclass(frozen=True)
class Standing:
    """Samples to the target of a contestant at the study's first batch, in its best variant.

    is_final: of the last round; if not, of the best trial of the search
    source:   where the numbers come from, in words
    """

    contestant: str
    spread: Spread
    is_final: bool
    source: str


def standings(records: Records) -> list[Standing]:
    """Each contestant's best variant by the mean of the last round, or without one by its best trial; best first."""
    study, batch = records.study, batches_of(records.study)[0]
    found = []
    for contestant in contestants_of(study):
        cells = [each for each in records.cells if (each.cell.contestant, each.cell.batch) == (contestant, batch)]
        finals = [_final_standing(records, each) for each in cells]
        offered = [each for each in finals if each is not None] or [
            made for each in cells if (made := _search_standing(records, each)) is not None
        ]
        if offered:
            found.append(min(offered, key=lambda each: each.spread.mean))
    return sorted(found, key=lambda each: each.spread.mean)


def _final_standing(records: Records, cell: CellTrials) -> Standing | None:
    made = spread(runs_of(records, cell.cell.name), records.study.file.target, records.study)
    return None if made is None else Standing(cell.cell.contestant, made, True, f"final round of {cell.cell.name}")


def _search_standing(records: Records, cell: CellTrials) -> Standing | None:
    best, file = cell.best, records.study.file
    if best is None or best.outcome is None:
        return None
    value, censored = best.outcome.value(file.target, file.cap_samples)
    source = f"best trial of the search, {cell.cell.name} trial {best.number}: one run, chosen as the best of its cell"
    return Standing(cell.cell.contestant, Spread({best.seed or 0: value}, int(not censored)), False, source)


def record(records: Records) -> dict[str, Any]:
    """What tune.json holds: metrics by name, the study, the machine, and the values behind the metrics."""
    file, metrics = records.study.file, dict[str, float]()
    for contestant in contestants_of(records.study):
        cells = [each for each in records.cells if each.cell.contestant == contestant]
        metrics[f"trials/{contestant}"] = sum(each.count(*COUNTED) for each in cells)
    table = standings(records)
    reference = next((each for each in table if each.contestant == REFERENCE), None)
    for each in table:
        name = f"samples_to_target/{each.contestant}"
        metrics |= {
            f"{name}/mean": each.spread.mean,
            f"{name}/stdev": each.spread.stdev,
            f"{name}/n": each.spread.n,
            f"{name}/reached": each.spread.reached,
        }
        if reference and reference.is_final == each.is_final:  # a chosen run is no match for fresh ones
            metrics[f"ratio_to_{REFERENCE}/{each.contestant}"] = each.spread.mean / reference.spread.mean
    config = {
        "study": file.model_dump(mode="json", by_alias=True),
        "sources": {each.contestant: each.source for each in table},
        "notes": [budget_text(records), *records.notes],
    }
    samples = {
        "samples_to_target": {
            each.contestant: {str(seed): value for seed, value in each.spread.by_seed.items()} for each in table
        },
        "best_so_far": {each.cell.name: best_so_far(each) for each in records.cells},
    }
    return {"metrics": metrics, "config": config, "environment": environment(), "samples": samples}
