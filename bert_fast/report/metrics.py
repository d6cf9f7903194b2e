"""metrics.jsonl and TensorBoard while a run goes; metrics.json when it is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bert_fast.files import cut_last_line


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
    """The lines of a run's metrics.jsonl; a line cut off by a crash is left out."""
    lines = []
    for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def cost_rows(folder: str | Path) -> list[tuple[float, float, float]]:
    """What a run's log says of cost: (tokens, squared lengths, milliseconds) of a rank in a step."""
    return [tuple(row) for line in read_metrics(folder) if line["kind"] == "step" for row in line.get("cost", [])]
