"""A timeline of one cycle per variant: compute, buckets on the wire, updates, weights on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...plots import svg_figure

_ROWS = {"compute": 3, "collectives": 2, "optimizer": 1, "weights": 0}
_COLOURS = {
    "forward": "#9ecae1",
    "backward": "#3182bd",
    "collectives": "#e6550d",
    "optimizer": "#31a354",
    "weights": "#fdae6b",
}


def draw(path: Path, title: str, traces: dict[str, Sequence[Sequence[Any]]]) -> None:
    """Write an SVG. Spans are (track, name, start, end) in seconds."""
    with svg_figure(path, (11, 1.7 * len(traces)), rows=len(traces), sharex=True) as axes:
        for axis, (name, spans) in zip(axes[:, 0], traces.items(), strict=True):
            _draw_spans(axis, spans)
            axis.set_title(name, fontsize=9, loc="left")
        axes[-1, 0].set_xlabel("seconds of one cycle")
        axes[0, 0].figure.suptitle(title.split(":")[0], fontsize=10)


def _draw_spans(axis: Any, spans: Sequence[Sequence[Any]]) -> None:
    free = 0.0
    for track, what, start, end in spans:
        if track not in _ROWS:
            continue
        if track == "collectives":  # queued behind the one before; from there it travels
            start, free = max(start, min(free, end)), end
        kind = what.split()[0] if track == "compute" else track
        axis.barh(_ROWS[track], end - start, left=start, height=0.8, color=_COLOURS[kind], edgecolor="white", lw=0.5)
    axis.set_yticks(
        list(_ROWS.values()), ["compute", "gradients on the wire", "updates", "weights on the wire"], fontsize=7
    )
    axis.set_ylim(-0.5, 3.5)
