"""The lines of final.jsonl: one run of the last round each. Written by `final`, read by it and by the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError
from tuning.outcome import CurvePoint, Outcome

FINAL = "final.jsonl"
Key = tuple[str, str | None, str, int, int, float]  # cell, ablation and what it changes, seed, trial, stretch


@dataclass(frozen=True)
class FinalRow:
    """One run of the last round: of a cell's best point, or of that point with the settings of an ablation.

    trial:   the trial that had the point
    stretch: schedule and cap were as many times as long as in the search
    outcome: None where the run could not be computed, and `error` says why
    """

    contestant: str
    variant: str
    batch: int
    ablation: str | None
    seed: int
    trial: int
    point: Mapping[str, Any]
    settings: Mapping[str, Any]
    stretch: float
    processor: str
    outcome: Outcome | None
    error: str

    @property
    def cell_name(self) -> str:
        return f"{self.contestant}/{self.variant}/{self.batch}"

    @property
    def key(self) -> Key:
        return key_of(self.cell_name, self.ablation, self.settings, self.seed, self.trial, self.stretch)


def key_of(cell: str, ablation: str | None, settings: Mapping[str, Any], seed: int, trial: int, stretch: float) -> Key:
    """What makes a run another than the others of its study."""
    return cell, ablation, json.dumps(dict(settings), sort_keys=True), seed, trial, float(stretch)


def parse_rows(text: str, path: Path) -> tuple[list[FinalRow], bool]:
    """The rows in the text of final.jsonl, and whether its last line was cut off and is left out.

    Raises:
        UserError: another line is damaged; its number.
    """
    lines = text.split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):  # no line end: the write was broken off
                return rows, True
            raise UserError(
                f"{path} line {number} is of another form ({error!r}); remove the line, and run `scripts/tune.py final` again"
            ) from None
    return rows, False


def _row(row: Any) -> FinalRow:
    ablation = row["ablation"]
    if not (ablation is None or isinstance(ablation, str)):
        raise ValueError(f"ablation={ablation}")
    return FinalRow(
        contestant=str(row["contestant"]),
        variant=str(row["variant"]),
        batch=int(row["batch"]),
        ablation=ablation,
        seed=int(row["seed"]),
        trial=int(row["trial"]),
        point=dict(row["point"]),
        settings=dict(row["settings"]),
        stretch=float(row["stretch"]),
        processor=str(row.get("processor") or ""),
        outcome=None if row["outcome"] is None else outcome_from(row["outcome"]),
        error=str(row.get("error") or ""),
    )


def outcome_from(record: Mapping[str, Any], pruned: bool = False) -> Outcome:
    """An outcome from what `Outcome.record` made. Raises KeyError, TypeError or ValueError where it is of another form."""
    return Outcome(
        curve=[
            CurvePoint(int(samples), float(seconds), math.nan if accuracy is None else float(accuracy))
            for samples, seconds, accuracy in record["curve"]
        ],
        steps=int(record["steps"]),
        samples=int(record["samples"]),
        seconds=float(record["seconds"]),
        step_ms=float(record["step_ms"]),
        optimizer_ms=float(record["optimizer_ms"]),
        pruned=pruned,
        diverged=bool(record.get("diverged")),
    )
