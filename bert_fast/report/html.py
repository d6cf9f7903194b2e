"""report.html: a finished run on one page that opens anywhere. The numbers stay in metrics.json and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import yaml

from bert_fast.files import write_atomically
from bert_fast.report import charts
from bert_fast.report.console import run_rows
from bert_fast.report.html_tables import clip_table, data_table, evaluation_table, skipped_rows, table, text_of
from bert_fast.report.metrics import of_kind, read_metrics
from bert_fast.report.run_charts import curve_charts, time_split_chart
from bert_fast.report.schema import ComplianceRecord, Line, RunRecord, SkippedLine, StepLine
from bert_fast.run_folder import REPORT

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
section > div + h3, section > p + h3 { margin-top:1rem; }
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


def write_report(folder: Path, record: RunRecord) -> Path:
    """Write the report of a finished run from its record and its metrics.jsonl; returns the report's path.

    Raises:
        UserError: metrics.jsonl is of another form.
    """
    path = folder / REPORT
    write_atomically(path, _page(record, read_metrics(folder)))
    return path


def _page(record: RunRecord, lines: list[Line]) -> str:
    steps = of_kind(lines, StepLine)
    skipped = [line for line in lines if isinstance(line, SkippedLine)]
    sections = [
        _header(record),
        section("Summary", table([*run_rows(record), *skipped_rows(skipped)])),
        section("Where the time went", f"<figure>{time_split_chart(record.time_split_s)}</figure>"),
        section("Curves", f'<div class="grid">{"".join(curve_charts(record, steps))}</div>'),
        section("Evaluations", evaluation_table(record.evaluations)),
        section("Gradient clipping", clip_table(steps)),
        section("Environment", table((name, text_of(value)) for name, value in record.environment.items())),
        section("Data", data_table(record.data)),
        section("MLPerf compliance", _compliance(record.compliance)),
        section("Configuration", _config(record.config)),
    ]
    return document(f"{record.name}, seed {record.seed}", sections)


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page of sections, with the style of all reports and nothing to load."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{charts.STYLE}{STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(sections)}\n</body></html>\n"
    )


def _header(record: RunRecord) -> str:
    if record.target_accuracy is None:
        target = ("plain", "no target set")
    else:
        reached = record.metrics.target_reached
        target = ("good", "✓ target reached") if reached else ("bad", "✗ target not reached")
    passed = record.compliance.passed
    if passed is None:
        compliance = ("plain", "compliance not checked")
    else:
        compliance = ("good", "✓ compliance passed") if passed else ("bad", "✗ compliance failed")
    badges = "".join(f'<span class="badge {kind}">{text}</span>' for kind, text in (target, compliance))
    environment = record.environment
    named = [f"{key} {environment[key]}" for key in ("device", "commit") if environment.get(key)]
    under = " · ".join([f"seed {record.seed}", *named])
    return f'<header><h1>{escape(record.name)}</h1><p class="under">{escape(under)}</p>{badges}</header>'


def section(title: str, content: str) -> str:
    """A part of a page under its heading; `content` is HTML."""
    return f"<section><h2>{title}</h2>{content}</section>"


def _compliance(compliance: ComplianceRecord) -> str:
    checker = f"<pre>{escape(compliance.text)}</pre>" if compliance.text else ""
    return f"<p>{escape(compliance.summary)}</p>{checker}"


def _config(config: dict[str, Any]) -> str:
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
    return f"<details><summary>All settings of this run</summary><pre>{escape(text)}</pre></details>"
