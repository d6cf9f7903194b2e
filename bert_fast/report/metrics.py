"""metrics.jsonl: written, with TensorBoard's events, while a run goes; read when it is done. The lines are report.schema's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from bert_fast.errors import UserError
from bert_fast.files import cut_last_line
from bert_fast.foreign import open_regular, shown
from bert_fast.report.schema import EvaluationLine, Line, SkippedLine, StepLine, parse_line
from bert_fast.run_folder import METRICS_LINES, TENSORBOARD

MAX_LINE_BYTES = 16 << 20  # a line of 4,096 ranks has 0.3 MB

AnyLine = TypeVar("AnyLine", StepLine, EvaluationLine, SkippedLine)


class MetricsWriter:
    """One JSON object per line, flushed at once; scalars also to TensorBoard if asked."""

    def __init__(self, folder: Path | None, *, append: bool = False, tensorboard: bool = False) -> None:
        """`folder` is the run's; None: this rank writes nothing. `append` continues the file of a run that stopped."""
        self._file = None
        self._events = None
        if folder is None:
            return
        path = folder / METRICS_LINES
        if append and path.is_file():
            cut_last_line(path)
        self._file = open(path, "a" if append else "w", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            from tensorboard.summary import Writer

            self._events = Writer(str(folder / TENSORBOARD))

    def write(self, line: Line) -> None:
        """Append a line."""
        if self._file is None:
            return
        values = line.as_json()
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(f"{line.kind}/{name}", float(value), line.step)

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(folder: str | Path) -> list[Line]:
    """The lines of a run's metrics.jsonl, in the file's order; one that was cut off by a crash is left out.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not a regular file, or a line is of another form or longer than any of a run's.
    """
    path = Path(folder) / METRICS_LINES
    lines = []
    for number, text in enumerate(_lines(path), start=1):
        line = parse_line(text, f"{shown(path)}, line {number:,},")
        if line is not None:
            lines.append(line)
    return lines


def of_kind(lines: Iterable[Line], kind: type[AnyLine]) -> list[AnyLine]:
    """The lines of a kind; of steps that were done twice (a resumed run goes on from its checkpoint), the later ones."""
    kept: list[AnyLine] = []
    for line in lines:
        if isinstance(line, kind):
            while kept and kept[-1].step >= line.step:
                kept.pop()
            kept.append(line)
    return kept


def cost_rows(folder: str | Path) -> list[tuple[int, int, float]]:
    """What a run's steps say of cost: tokens, sum of squared lengths, and milliseconds, of a rank in a step.

    Raises:
        FileNotFoundError, UserError: as `read_metrics`.
    """
    return [row for line in read_metrics(folder) if isinstance(line, StepLine) for row in line.cost]


def _lines(path: Path) -> Iterator[bytes]:
    with os.fdopen(open_regular(path), "rb") as file:
        while text := file.readline(MAX_LINE_BYTES + 1):
            if len(text) > MAX_LINE_BYTES:
                raise UserError(
                    f"{shown(path)}: the line that ends at byte {file.tell():,} or later is longer than "
                    f"{MAX_LINE_BYTES >> 20} MiB; no run writes such lines"
                )
            yield text
