"""metrics.jsonl and TensorBoard while a run goes; metrics.json when it is done."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError
from bert_fast.files import cut_last_line
from bert_fast.foreign import number, open_regular, parse_json, shown, whole_number

MOST_LINE_BYTES = 16 << 20  # a line of 4,096 ranks has 0.3 MB


class MetricsWriter:
    """One JSON object a line, flushed at once; scalars also to TensorBoard if asked."""

    def __init__(self, folder: Path | None, *, append: bool = False, tensorboard: bool = False) -> None:
        self._file = None
        self._events = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        if append and path.is_file():
            cut_last_line(path)
        self._file = open(path, "a" if append else "w", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            from tensorboard.summary import Writer

            self._events = Writer(str(folder / "tensorboard"))

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append `{"kind": kind, "step": step, **values}`."""
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", float(value), step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one cut off by a crash, or without kind and step, is left out.

    Raises:
        FileNotFoundError: there is none.
        UserError: no regular file, or one with a line longer than any of a run's.
    """
    lines = []
    for text in _lines(Path(folder) / "metrics.jsonl"):
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("kind"), str) and whole_number(line.get("step")) is not None:
            lines.append(line)
    return lines


def _lines(path: Path) -> Iterator[bytes]:
    with os.fdopen(open_regular(path), "rb") as file:
        while text := file.readline(MOST_LINE_BYTES + 1):
            if len(text) > MOST_LINE_BYTES:
                raise UserError(
                    f"{shown(path)}: the line that ends at byte {file.tell():,} or later is longer than "
                    f"{MOST_LINE_BYTES >> 20} MiB; no run writes such lines"
                )
            yield text


def cost_rows(folder: str | Path) -> list[tuple[float, float, float]]:
    """What a run's log says of cost: (tokens, squared lengths, milliseconds) of a rank in a step."""
    rows = []
    for line in read_metrics(folder):
        cost = line.get("cost") if line["kind"] == "step" else None
        for row in cost if isinstance(cost, list) else ():
            figures = [number(value, 1e18) for value in row] if isinstance(row, list) else []
            if len(figures) == 3 and None not in figures:
                rows.append(tuple(figures))
    return rows  # type: ignore[return-value]
