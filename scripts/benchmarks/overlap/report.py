"""What the overlap benchmark prints: names of variants, metrics per variant, tables."""

from __future__ import annotations

import statistics
from typing import Any

from bert_fast.report.bench import markdown_table

YARDSTICK = "bf16"  # what lossy formats are compared with: nobody who is short of bandwidth sends fp32
FORMATS = ("fp32", "bf16", "int8_ef", "fp8_ef", "topk_ef", "powersgd", "onebit")
# Of VARIANTS, without importing torch
NAMES = (
    "one_bucket",
    "ddp_default",
    "ddp_plan",
    "25mib",
    "auto",
    "auto_shadow",
    "auto_sharded",
    "auto_sharded_shadow",
    "auto_bf16",
    "auto_clip_none",
    "auto_clip_global_before",
    "auto_clip_global_after",
)


def metrics_of(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per variant: medians in ms, and what share of the communication was hidden.

    Args:
        record: what `worker.work` prints.
    """
    middle = {name: statistics.median(values) for name, values in record["samples"].items()}
    compute, communication = middle["compute"], middle["communication"]
    result = {}
    for name in record["samples"]:
        if name in ("compute", "communication"):
            continue
        values = {
            "step_ms": middle[name],
            "exposed_ms": middle[name] - compute,
            "hidden_share": (compute + communication - middle[name]) / min(record["backward_ms"], communication),
        }
        if name in record["predicted_ms"]:
            values["predicted_ms"] = record["predicted_ms"][name]
            values["over_predicted"] = middle[name] / record["predicted_ms"][name]
        if name in record["bound_ms"]:
            values["over_bound"] = middle[name] / record["bound_ms"][name]
        result[name] = values
    return result


def table_of(title: str, record: dict[str, Any], by_variant: dict[str, dict[str, float]]) -> str:
    """A Markdown table, one row per variant."""
    rows = []
    for name, values in by_variant.items():
        raw = record["samples"][name]
        rows.append(
            (
                name,
                record["buckets"][name],
                f"{values['step_ms']:,.0f}",
                f"{min(raw):,.0f}-{max(raw):,.0f}",
                f"{values['predicted_ms']:,.0f}" if "predicted_ms" in values else "-",
                f"{values['over_predicted']:.3f}" if "predicted_ms" in values else "-",
                f"{values['over_bound']:.3f}" if "over_bound" in values else "-",
                f"{values['exposed_ms']:,.0f}",
                f"{100 * values['hidden_share']:.0f} %",
            )
        )
    headers = ("variant", "buckets", "step ms", "range", "predicted", "/ predicted", "/ bound", "exposed ms", "hidden")
    return f"### {title}\n\n{markdown_table(headers, rows)}\n"


def title_of(model: str, hosts: int, link: str, ratio: float, record: dict[str, Any]) -> str:
    compute, communication = (statistics.median(record["samples"][name]) for name in ("compute", "communication"))
    latency, rate = record["links"]["all_reduce"]
    return (
        f"{model}, {hosts} hosts, {link}, ratio {ratio:g}: a cycle without communication {compute:,.0f} ms, of that backward "
        f"{record['backward_ms']:,.0f}; all-reduce alone {communication:,.0f} ms; link {latency:.1f} ms + {rate:.1f} MB/s"
    )
