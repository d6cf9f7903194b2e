"""Pictures as SVG that are the same bytes for the same data: no date, no random ids, text as text."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bert_fast.files import write_atomically


@contextmanager
def svg_figure(
    path: str | Path, size: tuple[float, float], rows: int = 1, columns: int = 1, font_size: float = 9, **layout: Any
) -> Iterator[Any]:
    """A matplotlib figure that is written to `path` when the block ends.

    Args:
        size: width and height in inches.
        layout: further arguments of `Figure.subplots`, such as `sharex`.

    Yields:
        Its axes, an array [rows, columns].
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.hashsalt": "bert_fast", "svg.fonttype": "none", "font.size": font_size}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size)
        yield figure.subplots(rows, columns, squeeze=False, **layout)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomically(path, buffer.getvalue())
