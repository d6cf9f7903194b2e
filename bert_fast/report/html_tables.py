"""The tables of a run's report, as HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from statistics import fmean
from typing import Any

from bert_fast.report.charts import number
from bert_fast.report.schema import DataRecord, EvaluationLine, SkippedLine, StepLine
from bert_fast.run_folder import RECORD

MAX_EVALUATION_ROWS = 200
NO_VALUE = "–"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns: what and how much."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f"<table>{body}</table>"


def text_of(value: Any) -> str:
    """A value of the environment, for a cell."""
    if value is None:
        return NO_VALUE
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def skipped_rows(skipped: list[SkippedLine]) -> list[tuple[str, str]]:
    """A row of warnings if a loss or gradient was not finite."""
    if not skipped:
        return []
    steps = ", ".join(str(line.bad_step) for line in skipped[:10]) + (", ..." if len(skipped) > 10 else "")
    return [("skipped steps", f"loss or gradient not finite: {len(skipped)} logged, at step {steps}")]


def evaluation_table(evaluations: list[EvaluationLine]) -> str:
    """A row per evaluation; of very many, every n-th and the last."""
    if not evaluations:
        return '<p class="empty">The run made no evaluation.</p>'
    head = (
        "step",
        "samples",
        "time (s)",
        "masked-LM accuracy",
        "masked-LM loss",
        "next-sentence accuracy",
        "next-sentence loss",
    )
    every = math.ceil(len(evaluations) / MAX_EVALUATION_ROWS)
    shown = [line for i, line in enumerate(evaluations) if i % every == 0 or i == len(evaluations) - 1]
    made = number_table(head, map(_evaluation_cells, shown))
    if len(shown) < len(evaluations):
        made += f'<p class="note">{len(shown)} of {len(evaluations):,} evaluations; {RECORD} holds all.</p>'
    return made


def _evaluation_cells(line: EvaluationLine) -> list[str]:
    values = (line.accuracy, line.mlm_loss, line.nsp_accuracy, line.nsp_loss)
    return [f"{line.step:,}", f"{line.samples:,}", f"{line.time_s:,.1f}", *map(_decimal, values)]


def _decimal(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.4f}"


def clip_table(steps: list[StepLine]) -> str:
    """A row per clip group."""
    groups = sorted({group for line in steps for group in line.clip})
    if not groups:
        return '<p class="empty">No clip statistics were logged.</p>'
    rows = []
    for group in groups:
        intervals = [line.clip[group] for line in steps if group in line.clip]
        coefficients = [interval.mean_coefficient for interval in intervals]
        clipped = 100 * fmean(interval.clipped_share for interval in intervals)
        rows.append((group, f"{clipped:.1f} %", f"{fmean(coefficients):.4f}", number(min(coefficients))))
    head = ("clip group", "steps clipped", "mean coefficient", "lowest interval's coefficient")
    note = "Means over log intervals. A gradient is multiplied by its coefficient; 1 leaves it as it is."
    return f'{number_table(head, rows)}<p class="note">{note}</p>'


def data_table(data: DataRecord) -> str:
    """A column per store, a row per entry of its manifest."""
    stores = {"train": data.train.as_json(), "eval": data.eval.as_json()}
    head = "".join(f'<th scope="col">{escape(part)}</th>' for part in ("", *stores))
    body = ""
    for name in dict.fromkeys(name for store in stores.values() for name in store):
        cells = "".join(f"<td>{escape(_amount_text(store.get(name)))}</td>" for store in stores.values())
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _amount_text(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else text_of(value)


def number_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns but the first are numbers; it scrolls where it is long."""
    return _headed_table(head, rows, ' class="numbers"')


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, which are wrapped; it scrolls where it is long."""
    return _headed_table(head, rows, "")


def _headed_table(head: Sequence[str], rows: Iterable[Sequence[str]], attribute: str) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    made = f"<table{attribute}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{made}</div>'
