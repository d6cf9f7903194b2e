"""report.html: a finished run on one page that opens anywhere, for a person. The figures stay in metrics.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from bert_fast.files import write_atomically
from bert_fast.report import charts
from bert_fast.report.charts import Point, Series, Share, number
from bert_fast.report.console import run_rows
from bert_fast.report.metrics import read_metrics

MAX_EVALUATION_ROWS = 200
NONE = "–"

# A quantity has one colour in all charts of the page.
COMPUTE, COMMUNICATION, OPTIMIZER, DATA, STRAGGLER, EVALUATION, CHECKPOINT, REST = range(8)
SPLIT_COLOURS = {
    "forward and backward": COMPUTE, "exposed communication": COMMUNICATION, "waiting for the slowest rank": STRAGGLER,
    "optimizer": OPTIMIZER, "data wait": DATA, "evaluation": EVALUATION, "checkpoint": CHECKPOINT,
}  # fmt: skip

STYLE = """
:root { color-scheme:light dark; --ground:#fff; --text:#1b1f24; --soft:#57606a; --rule:#d8dee4; --panel:#f6f8fa;
  --good:#116329; --bad:#a40e26; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ground:#14171b; --text:#e6e9ed; --soft:#a0a8b2; --rule:#343a42; --panel:#1c2127;
    --good:#56d27b; --bad:#ff8a8f; }
}
* { box-sizing:border-box; }
body { margin:0 auto; padding:1.5rem; max-width:1240px; background:var(--ground); color:var(--text);
  font:15px/1.5 system-ui, sans-serif; }
h1 { margin:0; font-size:1.7rem; overflow-wrap:anywhere; }
h2 { margin:2rem 0 .6rem; font-size:1.15rem; break-after:avoid; }
h3 { margin:0 0 .3rem; font-size:.95rem; }
.under { margin:.2rem 0 .8rem; color:var(--soft); overflow-wrap:anywhere; }
.badge { display:inline-block; margin:0 .5rem .4rem 0; padding:.1rem .7rem; border:1.5px solid; border-radius:1rem;
  font-weight:600; }
.good { color:var(--good); } .bad { color:var(--bad); } .plain { color:var(--soft); }
.grid { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap:1rem; }
figure { margin:0; padding:.8rem 1rem; border:1px solid var(--rule); border-radius:8px; break-inside:avoid;
  min-width:0; }
figcaption, .empty, .note { margin:.3rem 0 0; color:var(--soft); font-size:.82rem; }
table { border-collapse:collapse; font-size:.88rem; font-variant-numeric:tabular-nums; }
th, td { padding:.25rem .9rem .25rem 0; border-bottom:1px solid var(--rule); text-align:left; vertical-align:top;
  overflow-wrap:anywhere; }
th { font-weight:600; overflow-wrap:normal; }
@media (min-width: 640px) { th[scope=row] { white-space:nowrap; } }
thead th { position:sticky; top:0; background:var(--ground); }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align:right; }
.numbers td { white-space:nowrap; }
.scroll { max-height:28rem; overflow:auto; }
pre { margin:0; padding:.8rem 1rem; background:var(--panel); border-radius:8px; font-size:.8rem; white-space:pre-wrap;
  overflow-wrap:anywhere; }
summary { cursor:pointer; margin:.4rem 0; }
@media print {
  body { padding:0; max-width:none; font-size:11px; }
  .grid { grid-template-columns:1fr 1fr; }
  .scroll { max-height:none; overflow:visible; }
  thead th { position:static; }
  tr { break-inside:avoid; }
}
"""


def write_report(folder: Path, record: dict[str, Any] | None = None) -> Path:
    """Write the report of a finished run; returns its path. Without its `record`, metrics.json has it."""
    if record is None:
        record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert record is not None
    path = folder / "report.html"
    write_atomically(path, _page(record, read_metrics(folder)))
    return path


def _page(record: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    config = record["config"]
    name, seed = str(config["run"]["name"]), config["train"]["seed"]
    steps = _of_kind(lines, "step")
    evaluations = _thin_rows(record["evaluations"])
    sections = [
        _header(name, seed, record),
        _section("Summary", _table([*run_rows(record), *_skipped_rows(lines)])),
        _section("Where the time went", f"<figure>{_time_split(record['time_split_s'])}</figure>"),
        _section("Curves", f'<div class="grid">{"".join(_figures(record, steps))}</div>'),
        _section("Evaluations", _evaluation_table(evaluations, len(record["evaluations"]))),
        _section("Gradient clipping", _clip_table(steps)),
        _section("Environment", _table((key, _text(value)) for key, value in record["environment"].items())),
        _section("Data", _data_table(record["data"])),
        _section("MLPerf compliance", _compliance(record["compliance"])),
        _section("Configuration", _config(config)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}, seed {seed}</title><style>{charts.STYLE}{STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(sections)}\n</body></html>\n"
    )


# ---- what was logged ------------------------------------------------------------------------------------------------


def _of_kind(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Lines of a kind; of steps done twice (a resumed run goes on from its checkpoint), the later ones."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        if line["kind"] == kind:
            while kept and kept[-1]["step"] >= line["step"]:
                kept.pop()
            kept.append(line)
    return kept


def _points(lines: Iterable[dict[str, Any]], x: str, y: str, scale: float = 1.0) -> list[Point]:
    return [(line[x] * scale, line[y]) for line in lines if _has(line, x, y)]


def _has(line: dict[str, Any], *names: str) -> bool:
    """Whether a line holds a finite number under each name (a diverged loss is written as NaN)."""
    return all(line.get(name) is not None and math.isfinite(line[name]) for name in names)


def _thin_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every n-th row and the last, for a table that a person can read."""
    every = math.ceil(len(rows) / MAX_EVALUATION_ROWS)
    return rows if every <= 1 else [row for i, row in enumerate(rows) if i % every == 0 or i == len(rows) - 1]


def _time_unit(seconds: float) -> tuple[float, str]:
    """Scale and name of the unit in which a run of that length reads best."""
    if seconds > 3 * 3600:
        return 1 / 3600, "h"
    return (1 / 60, "min") if seconds > 300 else (1.0, "s")


def _mean_and_worst(points: Sequence[Point]) -> str:
    values = [y for _, y in points]
    return f"mean {fmean(values):.5f}, worst {max(values):.5f}" if values else "not logged"


# ---- charts ---------------------------------------------------------------------------------------------------------


def _figures(record: dict[str, Any], steps: list[dict[str, Any]]) -> list[str]:
    evaluations = record["evaluations"]
    scale, unit = _time_unit(max((line["time_s"] for line in [*steps, *evaluations]), default=0.0))
    time_label = f"time since run_start ({unit})"
    target = record["target_accuracy"]
    losses = [{**e, "loss": e["mlm_loss"] + e["nsp_loss"]} for e in evaluations if _has(e, "mlm_loss", "nsp_loss")]
    return [
        _figure(
            "Held-out masked-LM accuracy",
            charts.line_chart(
                [Series("masked-LM accuracy", _points(evaluations, "time_s", "accuracy", scale), COMPUTE)],
                time_label, "accuracy (share of masked tokens)",
                reference=None if target is None else (f"target {target:.4f}", target), from_zero=True,
            ),
            _accuracy_caption(evaluations, target),
        ),
        _figure(
            "Loss",
            charts.line_chart(
                [
                    Series("training", _points(steps, "time_s", "loss", scale), COMPUTE),
                    Series("evaluation", _points(losses, "time_s", "loss", scale), COMMUNICATION),
                ],
                time_label, "loss (nats, masked LM + next sentence)",
            ),
            "Training: mean over each log interval, dropout included.",
        ),
        _imbalance_figure(steps),
        _step_time_figure(steps, record["config"]["batch"]["global_batch_size"]),
        _figure(
            "Learning rate",
            charts.line_chart(
                [Series("learning rate", _points(steps, "step", "lr"), OPTIMIZER)], "step", "learning rate",
                from_zero=True,
            ),
            "Of each log interval's last step.",
        ),
        _figure(
            "Gradient norm",
            charts.line_chart(
                [Series("gradient norm", _points(steps, "step", "grad_norm"), DATA)], "step", "L2 norm before clipping",
                from_zero=True, robust=True,
            ),
            "Of each log interval's last step.",
        ),
    ]  # fmt: skip


def _imbalance_figure(steps: list[dict[str, Any]]) -> str:
    planned: list[Point] = []
    for line in steps:
        values = line.get("imbalance") or []
        planned += [(line["step"] - len(values) + 1 + i, value) for i, value in enumerate(values)]
    measured = [(line["step"], fmean(line["compute_imbalance"])) for line in steps if line.get("compute_imbalance")]
    series = [Series("measured compute time", measured, COMMUNICATION), Series("planned cost", planned, COMPUTE)]
    return _figure(
        "Load imbalance between ranks",
        charts.line_chart(series, "step", "max / mean over ranks (1 is even)"),
        f"Planned, per step: {_mean_and_worst(planned)}. "
        f"Measured, means of log intervals: {_mean_and_worst(measured)}.",
    )


def _step_time_figure(steps: list[dict[str, Any]], global_batch_size: int) -> str:
    names = ("exposed_ms", "optimizer_ms", "data_ms", "samples_per_s")
    rows: list[Point] = []
    for line in steps:
        if line.get("compute_ms") and _has(line, *names):
            parts = [fmean(line["compute_ms"]), *(line[name] for name in names[:3])]
            rows.append((line["step"], *parts, max(0.0, 1e3 * global_batch_size / line["samples_per_s"] - sum(parts))))
    layers = [
        ("compute", COMPUTE), ("exposed communication", COMMUNICATION), ("optimizer", OPTIMIZER), ("data wait", DATA),
        ("rest", REST),
    ]  # fmt: skip
    caption = "Compute is the mean over ranks; the rest includes the wait for the slowest rank."
    if rows:
        means = [fmean(column) for column in list(zip(*rows, strict=True))[1:]]
        listed = ", ".join(f"{name} {mean:.2f}" for (name, _), mean in zip(layers, means, strict=True))
        caption += f" Mean over log intervals, in ms: {listed}."
    return _figure("Step time", charts.stacked_bars(rows, layers, "step", "ms a step"), caption)


def _time_split(split: dict[str, float]) -> str:
    return charts.shares_bar([Share(name, value, SPLIT_COLOURS.get(name, REST)) for name, value in split.items()], "s")


def _accuracy_caption(evaluations: list[dict[str, Any]], target: float | None) -> str:
    if not evaluations:
        return "The run made no evaluation."
    goal = "no target was set" if target is None else f"the target is {target:.4f}"
    last = evaluations[-1]
    accuracy = _formatted(last["accuracy"], ".4f")
    return f"Last: {accuracy} at {last['time_s']:,.1f} s and {last['samples']:,} samples; {goal}."


def _figure(title: str, chart: str, caption: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{chart}<figcaption>{escape(caption)}</figcaption></figure>"


# ---- text and tables ------------------------------------------------------------------------------------------------


def _header(name: str, seed: int, record: dict[str, Any]) -> str:
    if record["target_accuracy"] is None:
        target = ("plain", "no target set")
    else:
        reached = record["metrics"]["target_reached"]
        target = ("good", "✓ target reached") if reached else ("bad", "✗ target not reached")
    passed = record["compliance"].get("passed")
    if passed is None:
        compliance = ("plain", "compliance not checked")
    else:
        compliance = ("good", "✓ compliance passed") if passed else ("bad", "✗ compliance failed")
    badges = "".join(f'<span class="badge {kind}">{text}</span>' for kind, text in (target, compliance))
    environment = record["environment"]
    named = [f"{key} {environment[key]}" for key in ("device", "commit") if environment.get(key)]
    under = [f"seed {seed}", *named]
    return f'<header><h1>{escape(name)}</h1><p class="under">{escape(" · ".join(under))}</p>{badges}</header>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns: what and how much."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f"<table>{body}</table>"


def _number_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="numbers"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _text(value: Any) -> str:
    if value is None:
        return NONE
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _formatted(value: float | None, spec: str) -> str:
    return NONE if value is None else format(value, spec)


def _skipped_rows(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """A row of warnings if a loss or gradient was not finite."""
    bad = [line for line in lines if line["kind"] == "skipped"]
    if not bad:
        return []
    named = ", ".join(_text(line.get("bad_step")) for line in bad[:10]) + (", ..." if len(bad) > 10 else "")
    return [("skipped steps", f"loss or gradient not finite: {len(bad)} logged, at step {named}")]


def _evaluation_table(rows: list[dict[str, Any]], total: int) -> str:
    if not rows:
        return '<p class="empty">The run made no evaluation.</p>'
    columns = [
        ("step", "step", ",d"), ("samples", "samples", ",d"), ("time (s)", "time_s", ",.1f"),
        ("masked-LM accuracy", "accuracy", ".4f"), ("masked-LM loss", "mlm_loss", ".4f"),
        ("next-sentence accuracy", "nsp_accuracy", ".4f"), ("next-sentence loss", "nsp_loss", ".4f"),
    ]  # fmt: skip
    table = _number_table(
        [head for head, _, _ in columns], ([_formatted(row.get(key), spec) for _, key, spec in columns] for row in rows)
    )
    if len(rows) < total:
        table += f'<p class="note">{len(rows)} of {total:,} evaluations; metrics.json holds all.</p>'
    return table


def _clip_table(steps: list[dict[str, Any]]) -> str:
    intervals = [line["clip"] for line in steps if line.get("clip")]
    if not intervals:
        return '<p class="empty">No clip statistics were logged.</p>'
    rows = []
    for group in sorted({name for interval in intervals for name in interval}):
        entries = [interval[group] for interval in intervals if group in interval]
        shares = [e["clipped_share"] for e in entries if e.get("clipped_share") is not None]
        coefficients = [e["mean_coefficient"] for e in entries if e.get("mean_coefficient") is not None]
        rows.append([
            group,
            f"{100 * fmean(shares):.1f} %" if shares else NONE,
            f"{fmean(coefficients):.4f}" if coefficients else NONE,
            number(min(coefficients)) if coefficients else NONE,
        ])  # fmt: skip
    head = ["clip group", "steps clipped", "mean coefficient", "lowest interval's coefficient"]
    note = "Means over log intervals. A gradient is multiplied by its coefficient; 1 leaves it as it is."
    return f'{_number_table(head, rows)}<p class="note">{note}</p>'


def _data_table(data: dict[str, dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for entry in data.values() for name in entry))
    head = "".join(f'<th scope="col">{escape(part)}</th>' for part in ("", *data))
    body = ""
    for name in names:
        cells = "".join(f"<td>{escape(_figure_text(entry.get(name)))}</td>" for entry in data.values())
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure_text(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else _text(value)


def _compliance(compliance: dict[str, Any]) -> str:
    text = compliance.get("text")
    checker = f"<pre>{escape(text)}</pre>" if text else ""
    return f"<p>{escape(compliance['summary'])}</p>{checker}"


def _config(config: dict[str, Any]) -> str:
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
    return f"<details><summary>All settings of this run</summary><pre>{escape(text)}</pre></details>"
