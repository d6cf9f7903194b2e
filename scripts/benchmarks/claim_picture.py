#!/usr/bin/env python3
"""The picture of README.md, from records: what uneven ranks and exposed communication cost a training step.

python -m scripts.benchmarks.claim_picture --out docs/images/claim.svg

The left side is results/balance/step.json: forward and backward of the slowest of 1,024 ranks over an even share of the work.
The right side is results/overlap/layers-200mbit.json at ratio 1: the time of a training step, and how much of it is
exposed communication.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import scripts.guard  # noqa: F401

from bert_fast.command import guarded
from bert_fast.errors import UserError
from bert_fast.files import read_json

from ..plots import svg_figure

WORK, LOST = "#4c78a8", "#f58518"

# (label, strategy of the record), from the worst to the default.
BALANCE = [
    ("padded to the longest", "pad_to_longest"),
    ("random", "random"),
    ("exchange padding", "exchange"),
    ("stratified presort", "stratified_presort"),
    ("balanced (default)", "balanced"),
]
# (label, variant of the record)
OVERLAP = [
    ("clip the whole gradient first", "auto_clip_global_before"),
    ("DistributedDataParallel, default", "ddp_default"),
    ("planned buckets, clipped each", "auto"),
    ("and weights updated per bucket", "auto_shadow"),
]


def metric(record: dict[str, Any], name: str, path: Path) -> float:
    """One number of a record. Raises UserError where the record does not have it."""
    value = record["metrics"].get(name)
    if not isinstance(value, int | float):
        raise UserError(f"{path} has no metric {name}; measure it again with the command of its README")
    return float(value)


def slowest_over_even(path: Path) -> dict[str, float]:
    """Strategy to measured time of the slowest rank over the mean time of `balanced`."""
    record = read_record(path)
    return {name: metric(record, f"measured/{name}/max_over_balanced_mean", path) for _, name in BALANCE}


def step_and_exposed_s(path: Path) -> dict[str, tuple[float, float]]:
    """Variant to (whole step, exposed communication), in seconds."""
    record = read_record(path)
    figures = {}
    for _, name in OVERLAP:
        step_ms, exposed_ms = (metric(record, f"200mbit/1/{name}/{what}", path) for what in ("step_ms", "exposed_ms"))
        figures[name] = step_ms / 1000, exposed_ms / 1000
    return figures


def read_record(path: Path) -> dict[str, Any]:
    record = read_json(path, "record")
    if not isinstance(record.get("metrics"), dict):
        raise UserError(f"{path} is no record of a benchmark: it has no metrics")
    return record


def draw(balance: dict[str, float], overlap: dict[str, tuple[float, float]], path: Path) -> None:
    """Two rows of bars: work, and behind it what is lost."""
    with svg_figure(path, (9.8, 2.9), columns=2) as axes:
        left, right = axes[0]
        for row, (_, name) in enumerate(BALANCE):
            bar(
                left, row, 1, balance[name] - 1, f"{balance[name]:.2f}", ("an even share", "more: all other ranks wait")
            )
        for row, (_, name) in enumerate(OVERLAP):
            step_s, exposed_s = overlap[name]
            bar(right, row, step_s - exposed_s, exposed_s, f"{step_s:.2f} s", ("compute", "exposed communication"))
        left.set_title("The slowest of 1,024 ranks", fontsize=10)
        left.set_xlabel("forward and backward over an even share")
        right.set_title("One training step", fontsize=10)
        right.set_xlabel("seconds (2 hosts, 200 Mbit/s between them)")
        for axis, rows, width in ((left, BALANCE, 2.3), (right, OVERLAP, 4.6)):
            axis.set_yticks(range(len(rows)), [label for label, _ in rows])
            axis.set_xlim(0, width)
            axis.set_ylim(len(rows) - 0.5, -1.6)  # the worst on top, under the legend
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(loc="upper left", ncols=2, frameon=False, fontsize=8)


def bar(axis: Any, row: int, work: float, lost: float, text: str, labels: tuple[str, str]) -> None:
    """One bar of two parts, with its number at the end. Only the first row's labels go into the legend."""
    for start, length, colour, label in ((0, work, WORK, labels[0]), (work, max(lost, 0), LOST, labels[1])):
        axis.barh(row, length, left=start, color=colour, label=label if row == 0 else None)
    axis.text((work + lost) * 1.01, row, f" {text}", va="center")


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", default="results", help="folder of the records (default %(default)s)")
    parser.add_argument("--out", default="docs/images/claim.svg", help="where the picture goes (default %(default)s)")
    args = parser.parse_args()
    records = Path(args.records)
    balance = slowest_over_even(records / "balance/step.json")
    overlap = step_and_exposed_s(records / "overlap/layers-200mbit.json")
    draw(balance, overlap, Path(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
