"""Where the time of our step goes, from torch's profiler: shares by part of the model, and the costliest operations."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from bert_fast.model import bert, loss
from bert_fast.report.bench import markdown_table

from .measure import set_up
from .variants import VARIANTS

PARTS = ("embedding", "attention", "GEMMs", "elementwise", "head", "optimizer", "host gaps")
_MARKS = {
    "attention": ("part:attention", "_Attention", "scaled_dot_product", "FlashAttn"),
    "head": ("part:head", "ProjectedCrossEntropy", "SummedCrossEntropy"),
    "embedding": ("part:embedding", "Embedding"),
    "optimizer": ("Optimizer.step", "part:optimizer"),
}
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear")


def profile(args: argparse.Namespace, precision: str, trace: Path | None = None) -> tuple[dict[str, float], Any]:
    """Shares of a step's wall time by part, and the profiler (for its table). Writes a Chrome trace if asked for."""
    set_up(args)
    cuda = args.device == "cuda"
    with _labelled():
        step = VARIANTS["ours"](args, precision)
        for _ in range(2):
            step()
        activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            wall = time.perf_counter() - start
    if trace:
        profiler.export_chrome_trace(str(trace))
    sums = dict.fromkeys(PARTS, 0.0)
    for event in profiler.events():
        own = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        if (own and event.name.startswith(("aten::", "autograd::", "_", "part:", "Optimizer"))) or (own and cuda):
            sums[_part_of(event)] += own
    sums["host gaps"] = max(0.0, wall - sum(sums.values()))
    return {name: value / max(wall, sum(sums.values())) for name, value in sums.items()}, profiler


def tables(shares: dict[str, float], profiler: Any, device: str, num_rows: int) -> str:
    """Markdown of what `profile` returned: the shares by part, and the `num_rows` operations with the most own time."""
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events) or 1.0
    rows = []
    for event in events[:num_rows]:
        own = getattr(event, key)
        rows.append((event.key[:70], f"{own / 1e3:,.2f}", f"{100 * own / total:.1f} %", f"{event.count:,}"))
    parts = [(name, f"{100 * share:.1f} %") for name, share in shares.items()]
    operations = markdown_table(("operation", "ms", "share", "calls"), rows)
    return f"{markdown_table(('part', 'share of the step'), parts)}\n\n{operations}"


def _part_of(event: Any) -> str:
    at = event
    while at is not None:
        for part, marks in _MARKS.items():
            if any(mark in at.name for mark in marks):
                return part
        at = at.cpu_parent
    return "GEMMs" if event.name in _PRODUCTS else "elementwise"


class _labelled:  # noqa: N801 (used as a function)
    """Names of parts in the profile while inside."""

    def __enter__(self) -> None:
        self._undo = [
            _wrap(bert.Embeddings, "forward", "part:embedding"),
            _wrap(bert.PretrainingHeads, "forward", "part:head"),
            _wrap_attention(),
            _wrap(loss.ProjectedCrossEntropy, "apply", "part:head", is_class=True),
        ]

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()


def _wrap_attention() -> Any:
    before = bert.EncoderLayer.forward

    def forward(layer: Any, hidden_TD: torch.Tensor, layout: Any, attend: Any, rows_R: Any = None) -> torch.Tensor:
        return before(layer, hidden_TD, layout, _recorded(attend, "part:attention"), rows_R)

    bert.EncoderLayer.forward = forward  # type: ignore[assignment, method-assign]  # until it is undone
    return lambda: setattr(bert.EncoderLayer, "forward", before)


def _wrap(owner: Any, name: str, label: str, is_class: bool = False) -> Any:
    before = owner.__dict__.get(name)
    function = getattr(owner, name)
    setattr(owner, name, staticmethod(_recorded(function, label)) if is_class else _recorded(function, label))
    return (lambda: delattr(owner, name)) if before is None else (lambda: setattr(owner, name, before))


def _recorded(function: Any, label: str) -> Any:
    def call(*arguments: Any, **keywords: Any) -> Any:
        with torch.profiler.record_function(label):
            return function(*arguments, **keywords)

    return call
