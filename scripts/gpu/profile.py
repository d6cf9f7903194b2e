"""Stage `profile`: where the time of our step goes. trace.json, the costliest kernels, shares by part of the model."""

from __future__ import annotations

from benchmarks.step.breakdown import profile, tables
from bert_fast.files import write_atomically

from .parts import arguments, precision_of
from .stage import Context

_ROWS = 25


def run(context: Context) -> None:
    result = context.result
    args = arguments(context, "large", 56)
    shares, profiler = profile(args, precision_of(context), context.out / "trace.json")
    markdown = tables(shares, profiler, context.device, _ROWS)
    write_atomically(context.out / "top.md", f"{markdown}\n")
    result.metrics |= {f"profile/large/{name}": share for name, share in shares.items()}
    shown = sorted(shares.items(), key=lambda item: -item[1])[:4]
    result.summary = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shown)
