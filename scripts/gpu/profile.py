"""Stage `profile`: where the time of our step goes. trace.json, the costliest kernels, shares by part of the model."""

from __future__ import annotations

from benchmarks.step.breakdown import profile
from bert_fast.files import write_atomically
from bert_fast.report.bench import markdown_table

from .parts import arguments, precision_of
from .stage import Context

_ROWS = 25


def run(context: Context) -> None:
    result = context.result
    args = arguments(context, "large", 56)
    shares, profiler = profile(args, precision_of(context), context.out / "trace.json")
    key = "self_device_time_total" if context.device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1.0
    rows = [
        (
            event.key[:70],
            f"{getattr(event, key) / 1e3:,.2f}",
            f"{100 * getattr(event, key) / total:.1f} %",
            f"{event.count:,}",
        )
        for event in events[:_ROWS]
    ]
    parts = markdown_table(("part", "share of the step"), [(n, f"{100 * share:.1f} %") for n, share in shares.items()])
    kernels = markdown_table(("operation", "ms", "share", "calls"), rows)
    write_atomically(context.out / "top.md", f"{parts}\n\n{kernels}\n")
    result.metrics |= {f"profile/large/{name}": share for name, share in shares.items()}
    shown = sorted(shares.items(), key=lambda item: -item[1])[:4]
    result.summary = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shown)
