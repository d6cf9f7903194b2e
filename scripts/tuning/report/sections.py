"""The parts of the report, from its records: what was searched, and how the search went."""

from __future__ import annotations

from statistics import fmean, median

from bert_fast.report import charts
from bert_fast.report.charts import Series

from ..outcome import levels
from .importance import MIN_TRIALS, TOP_SHARE, importance_of
from .loading import COMPLETE, DIVERGED, FAILED, LOST, OPEN, PRUNED, CellTrials, Records
from .parts import NO_VALUE, Chart, Section, Table, amount, setting
from .results import ablations, censored_note, final_round, mark, missing
from .summary import (
    all_outcomes,
    batches_of,
    best_so_far,
    budget_text,
    contestants_of,
    reached,
    standings,
    variants_of,
)


def sections_of(records: Records) -> list[Section]:
    """The whole report."""
    return [
        _in_short(records),
        _fairness(records),
        _progress(records),
        _best_trials(records),
        final_round(records),
        _points(records),
        ablations(records),
        _importance(records),
        _batches(records),
        _costs(records),
        *_failures(records),
    ]


def _in_short(records: Records) -> Section:
    file, sentences = records.study.file, []
    outcomes = all_outcomes(records)
    if not any(reached(outcome, file.target) for _, outcome in outcomes):
        sentences.append(missing(file.target, outcomes))
    table = standings(records)
    rows = [
        [each.contestant, mark(each.spread.mean, each.spread.reached < each.spread.n), str(each.spread.n), each.source]
        for each in table
    ]
    sentences.append(budget_text(records))
    if not records.has_finals:
        sentences.append(
            "There was no final round: each number is one run, the best of its trials, and so better than a fresh run would be."
        )
    sentences += [*records.notes, censored_note(file)]
    title = f"Samples to {file.target:g} at batch {batches_of(records.study)[0]}, each contestant in its best variant"
    headers = ("contestant", "samples to the target", "runs", "from")
    return Section("In short", sentences, tables=[Table(headers, rows, title, is_text=True)] if rows else [])


# ---- fairness -----------------------------------------------------------------------------------------------------------


def _fairness(records: Records) -> Section:
    file = records.study.file
    pruner = file.pruner.model_dump()
    kind = pruner.pop("kind")
    sentences = [
        budget_text(records),
        f"Sampler {file.sampler.kind} (seed {file.sampler.seed}"
        + (f", {file.sampler.startup} trials at random first), " if file.sampler.kind == "tpe" else "), ")
        + (f"pruner {kind}" if kind == "none" else f"pruner {kind} ({_listed(pruner)})")
        + f", cap {file.cap_samples:,} samples, target {file.target:g}, objective {file.objective}, base config {file.base}, "
        f"trial seeds {', '.join(map(str, file.trial_seeds))}.",
        "A trial counts towards the budget however it ended. Lost ones, of a worker that is gone, do not: they were tried "
        "again. Complete trials that did not come to the target are censored. Wall time is summed over the trials.",
    ]
    machines = sorted({trial.processor for each in records.cells for trial in each.trials if trial.processor})
    sentences.append(f"Processors: {', '.join(machines) or 'not recorded'}.")
    headers = (
        "study",
        "wanted",
        "complete",
        "diverged",
        "pruned",
        "failed",
        "lost",
        "open",
        "censored",
        "seeds",
        "evaluations",
        "wall time (min)",
    )
    sums = [
        _fairness_row(name, [each for each in records.cells if each.cell.contestant == name], file.target)
        for name in contestants_of(records.study)
    ]
    cells = [_fairness_row(each.cell.name, [each], file.target) for each in records.cells]
    tables = [Table(headers, sums, "By contestant"), Table(headers, cells, "By contestant, variant and batch")]
    return Section("Fairness", sentences, tables=tables)


def _fairness_row(name: str, cells: list[CellTrials], target: float) -> list[str]:
    trials = [trial for each in cells for trial in each.trials]
    states = [
        [trial.state for trial in trials].count(state) for state in (COMPLETE, DIVERGED, PRUNED, FAILED, LOST, OPEN)
    ]
    ended = [trial for trial in trials if trial.state in (COMPLETE, DIVERGED)]
    seeds = sorted({trial.seed for trial in trials if trial.seed is not None})
    counts = [
        sum(each.cell.trials for each in cells),
        *states,
        sum(not reached(trial.outcome, target) for trial in ended),
    ]
    evaluations = sum(len(trial.outcome.curve) for trial in trials if trial.outcome)
    minutes = sum(trial.seconds for trial in trials) / 60
    return [name, *map(str, counts), _short(seeds), f"{evaluations:,}", f"{minutes:,.1f}"]


def _short(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds)) if len(seeds) <= 6 else f"{len(seeds)} seeds"


def _listed(values: dict[str, object]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


# ---- the search -------------------------------------------------------------------------------------------------------


def style_of(records: Records, contestant: str, variant: str) -> tuple[int, int]:
    """Colour and dash: a contestant has one colour in all charts, a variant one dash."""
    names, variants = contestants_of(records.study), variants_of(records.study)
    return names.index(contestant) % 8, variants.index(variant) % 4


def _progress(records: Records) -> Section:
    drawn, tables = [], []
    for batch in batches_of(records.study):
        cells = [each for each in records.cells if each.cell.batch == batch]
        curves = {each.cell.name: best_so_far(each) for each in cells}
        series = [
            Series(each.cell.name, curves[each.cell.name], *style_of(records, each.cell.contestant, each.cell.variant))
            for each in cells
        ]
        label = f"best {records.study.file.objective} to the target so far"
        chart = charts.line_chart(series, "trials ended", label, robust=True)
        drawn.append(Chart(f"Batch {batch}", chart, "One line per contestant (colour) and variant (dash)."))
        tables.append(_progress_table(batch, curves))
    sentences = ["Each line begins with its first complete trial."]
    if records.study.file.objective == "samples":
        sentences.append(
            f"Values above the cap of {records.study.file.cap_samples:,} are of runs that did not come to the target."
        )
    return Section("Best value over trials", sentences, drawn, tables)


def _progress_table(batch: int, curves: dict[str, list[tuple[float, float]]]) -> Table:
    longest = int(max((curve[-1][0] for curve in curves.values() if curve), default=1))
    counts = sorted({*(2**power for power in range(longest.bit_length()) if 2**power <= longest), longest})
    rows = [[name, *(amount(dict(curve).get(float(count))) for count in counts)] for name, curve in curves.items()]
    return Table(("best value after n trials", *map(str, counts)), rows, f"Batch {batch}")


def _best_trials(records: Records) -> Section:
    file = records.study.file
    goals = levels(file.target)
    rows = []
    for each in records.cells:
        best = each.best
        if best is None or best.outcome is None:
            rows.append([each.cell.name, NO_VALUE, NO_VALUE, NO_VALUE, *(NO_VALUE for _ in goals)])
            continue
        values = [best.outcome.value(goal, file.cap_samples) for goal in goals]
        found = [str(best.number), str(best.seed), f"{best.outcome.best:.4f}"]
        rows.append([each.cell.name, *found, *(mark(*value) for value in values)])
    headers = ("study", "best trial", "seed", "best accuracy", *(f"to {goal:.4g}" for goal in goals))
    return Section(
        "Best trials of the search: samples to an accuracy",
        ["One run each, chosen as the best of many.", censored_note(file)],
        tables=[Table(headers, rows)],
    )


def _points(records: Records) -> Section:
    tables = []
    for contestant in contestants_of(records.study):
        cells = [each for each in records.cells if each.cell.contestant == contestant]
        names = list(dict.fromkeys(name for each in cells for name in each.cell.space))
        rows = []
        for each in cells:
            best = each.best
            if best is not None:
                values = [setting(best.point.get(name, NO_VALUE)) for name in names]
                rows.append([each.cell.name, str(best.number), amount(best.value), *values])
        if rows:
            tables.append(Table(("study", "trial", records.study.file.objective, *names), rows, contestant))
    return Section("Best points", [] if tables else ["No trial is complete."], tables=tables)


def _importance(records: Records) -> Section:
    rows, skipped = [], []
    for contestant in contestants_of(records.study):
        found = {}
        for each in (each for each in records.cells if each.cell.contestant == contestant):
            shares = importance_of(each)
            if shares is None:
                skipped.append(each.cell.name)
            else:
                found[each.cell.variant, each.cell.batch] = shares
        names = list(dict.fromkeys(name for shares in found.values() for name in shares))
        means = {name: fmean(shares.get(name, 0.0) for shares in found.values()) for name in names}
        for name in sorted(names, key=lambda each: -means[each]):
            columns = [
                f"{found[key][name]:.2f}" if key in found and name in found[key] else NO_VALUE
                for key in _columns(records)
            ]
            rows.append([f"{contestant}: {name}", f"{means[name]:.2f}", *columns])
    sentences = [
        f"PED-ANOVA: how far the settings of the best {TOP_SHARE:.0%} of the trials differ from those of all; the shares of a "
        "study sum to 1. With a few dozen trials these are coarse: of k settings without any effect, each gets about 1/k."
    ]
    if skipped:
        sentences.append(
            f"Left out, with fewer than {MIN_TRIALS} complete trials or without a difference between them: "
            f"{', '.join(skipped)}."
        )
    headers = ("setting", "mean", *(f"{variant}/{batch}" for variant, batch in _columns(records)))
    return Section("Importance of the settings", sentences, tables=[Table(headers, rows)] if rows else [])


def _columns(records: Records) -> list[tuple[str, int]]:
    return list(dict.fromkeys((each.cell.variant, each.cell.batch) for each in records.cells))


# ---- batches and costs ------------------------------------------------------------------------------------------------


def _batches(records: Records) -> Section:
    file, batches = records.study.file, sorted(batches_of(records.study))
    rows, series = [], []
    for contestant in contestants_of(records.study):
        for variant in variants_of(records.study):
            values = {}
            for each in records.cells:
                if (
                    (each.cell.contestant, each.cell.variant) == (contestant, variant)
                    and each.best
                    and each.best.outcome
                ):
                    values[each.cell.batch] = each.best.outcome.value(file.target, file.cap_samples)
            cells = [mark(*values[batch]) if batch in values else NO_VALUE for batch in batches]
            rows.append([f"{contestant}/{variant}", *cells])
            points = [(float(batch), values[batch][0]) for batch in batches if batch in values]
            series.append(Series(f"{contestant}/{variant}", points, *style_of(records, contestant, variant)))
    sentences = ["From the best trial of the search in each study: one run each.", censored_note(file)]
    drawn = []
    if len(batches) > 1:
        chart = charts.line_chart(series, "global batch (samples)", "samples to the target", from_zero=True)
        drawn.append(Chart("Samples to the target", chart, "One line per contestant (colour) and variant (dash)."))
    else:
        sentences.append("The study has one global batch, so there is no chart.")
    table = Table(("contestant and variant", *(f"batch {batch}" for batch in batches)), rows)
    return Section("Samples to the target against the global batch", sentences, drawn, [table])


def _costs(records: Records) -> Section:
    rows = []
    for contestant in contestants_of(records.study):
        for batch in batches_of(records.study):
            outcomes = [
                trial.outcome
                for each in records.cells
                if (each.cell.contestant, each.cell.batch) == (contestant, batch)
                for trial in each.trials
                if trial.outcome is not None and trial.outcome.steps > 0
            ]
            if outcomes:
                step, update = (
                    median(getattr(each, name) for each in outcomes) for name in ("step_ms", "optimizer_ms")
                )
                share = f"{update / step:.1%}" if step > 0 else NO_VALUE
                rows.append([f"{contestant}, batch {batch}", f"{step:.2f}", f"{update:.2f}", share, str(len(outcomes))])
    sentences = [
        "Medians over the trials. Trials that ran side by side on one machine slow each other down: compare within a search "
        "only."
    ]
    headers = ("contestant", "step (ms)", "of that the optimizer (ms)", "share", "trials")
    return Section("Cost of a step", sentences, tables=[Table(headers, rows)] if rows else [])


def _failures(records: Records) -> list[Section]:
    rows = [
        [f"{each.cell.name} trial {trial.number}", trial.state, trial.error or "no reason was recorded"]
        for each in records.cells
        for trial in each.trials
        if trial.state in (FAILED, DIVERGED, LOST)
    ]
    rows += [
        [f"{run.cell_name} {run.ablation or 'final'} seed {run.seed}", FAILED, run.error or "no reason was recorded"]
        for run in records.finals
        if run.outcome is None
    ]
    if not rows:
        return []
    return [Section("Trials without a result", tables=[Table(("trial", "how it ended", "why"), rows, is_text=True)])]
