"""The parts of the report on the last round: the best points on fresh seeds, and the ablations."""

from __future__ import annotations

from collections.abc import Sequence

from ..outcome import Outcome, levels
from ..study_file import StudyFile
from .loading import Records
from .paired import MAX_EXACT, Comparison, compare
from .parts import NO_VALUE, Section, Table, amount, setting
from .summary import REFERENCE, Spread, runs_of, spread

TEST = (
    f"p is two-sided, of an exact sign-flip permutation test on the differences of the same seeds (of Student's paired t-test "
    f"with more than {MAX_EXACT} seeds); with n seeds it cannot be below 2^(1-n). It is not corrected for the number of "
    "comparisons."
)


def mark(value: float, censored: bool) -> str:
    """Samples, with a star where not every run came to the accuracy."""
    return amount(value) + ("*" if censored else "")


def censored_note(file: StudyFile) -> str:
    """What a star says."""
    return (
        "* A run that has not come to the accuracy is censored: it counts as cap x (1 + (accuracy - best) / accuracy), one "
        f"that diverged as 2 x cap, in means and in ratios as well; the cap is {file.cap_samples:,} samples in the search and "
        f"{file.final.stretch if file.final else 1:g} times that in the last round."
    )


def missing(target: float, outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """That nothing came to the target, and what came nearest."""
    if not outcomes:
        return f"No trial reached the target {target:g}: none has a result yet."
    name, nearest = max(outcomes, key=lambda each: each[1].best)
    return (
        f"No trial reached the target {target:g}: the best accuracy is {nearest.best:.4f}, of {name}. All samples to the "
        "target are censored; raise cap_samples or lower the target to tell the contestants apart."
    )


def final_round(records: Records) -> Section:
    """The best points on fresh seeds, a table per accuracy."""
    title = "Final round: the best points on fresh seeds"
    if not records.has_finals:
        return Section(title, ["There was no final round; run scripts/tune.py final."])
    file = records.study.file
    goals = [(f"Samples to {goal:.4g}", goal, "samples") for goal in reversed(levels(file.target))]
    if file.objective == "seconds":
        goals.insert(0, (f"Seconds to {file.target:.4g}", file.target, "seconds"))
    tables = [table for goal in goals if (table := _final_table(records, *goal)) is not None]
    sentences = [
        censored_note(file),
        TEST,
        f"The ratio is to {REFERENCE} of the same variant and batch, over the common seeds.",
    ]
    return Section(title, [*sentences, *_warnings(records)], tables=tables)


def _final_table(records: Records, title: str, goal: float, unit: str) -> Table | None:
    spreads = {
        each.cell.name: (each.cell, made)
        for each in records.cells
        if (made := spread(runs_of(records, each.cell.name), goal, records.study, unit)) is not None
    }
    rows = []
    for name, (cell, made) in spreads.items():
        reference = spreads.get(f"{REFERENCE}/{cell.variant}/{cell.batch}")
        compared = compare(made.by_seed, reference[1].by_seed) if reference and cell.contestant != REFERENCE else None
        censored = any(each is not None and each.reached < each.n for each in (made, reference and reference[1]))
        rows.append([name, *_spread_cells(made), *_comparison_cells(compared, censored)])
    headers = ("study", "mean", "stdev", "runs", "reached", f"ratio to {REFERENCE}", "common seeds", "p")
    return Table(headers, rows, title) if rows else None


def _spread_cells(made: Spread) -> list[str]:
    deviation = amount(made.stdev) if made.n > 1 else NO_VALUE
    return [mark(made.mean, made.reached < made.n), deviation, str(made.n), str(made.reached)]


def _comparison_cells(compared: Comparison | None, censored: bool = False) -> list[str]:
    if compared is None:
        return [NO_VALUE] * 3
    p = NO_VALUE if compared.p is None else f"{compared.p:.3g}"
    return [f"{compared.ratio:.3f}{'*' if censored else ''}", str(compared.n), p]


def _warnings(records: Records) -> list[str]:
    """What makes the runs of a cell less than one sample of one point."""
    found = []
    for each in records.cells:
        runs = runs_of(records, each.cell.name)
        failed = sum(run.outcome is None for run in runs)
        if failed:
            found.append(f"{failed} of {len(runs)} runs of {each.cell.name} failed and are left out of its mean.")
    machines = sorted({run.processor for run in records.finals if run.processor})
    return [*found, f"Processors: {', '.join(machines) or 'not recorded'}."]


def ablations(records: Records) -> Section:
    """What each factor is worth: a best point with that one setting changed."""
    title, target = "Ablations", records.study.file.target
    rows = []
    for each in records.cells:
        name = each.cell.name
        factors = list(dict.fromkeys(run.ablation for run in records.finals if run.cell_name == name and run.ablation))
        winner = spread(runs_of(records, name), target, records.study)
        if factors and winner:
            rows.append([name, "nothing", *_spread_cells(winner), *_comparison_cells(None)])
        for factor in factors:
            runs = runs_of(records, name, factor)
            changed = ", ".join(f"{path}={setting(value)}" for path, value in runs[0].settings.items())
            made = spread(runs, target, records.study)
            if made is None:
                rows.append([f"{name} {factor}", changed, *[NO_VALUE] * 7])
                continue
            compared = compare(made.by_seed, winner.by_seed) if winner else None
            censored = made.reached < made.n or (winner is not None and winner.reached < winner.n)
            rows.append([f"{name} {factor}", changed, *_spread_cells(made), *_comparison_cells(compared, censored)])
    if not rows:
        return Section(title, ["There are no ablations."])
    headers = ("ablation", "changes", "mean", "stdev", "runs", "reached", "ratio to no change", "common seeds", "p")
    sentences = [f"Samples to {target:g}; a ratio above 1 says that the change costs samples.", TEST]
    return Section(title, sentences, tables=[Table(headers, rows)])
