"""What every benchmark script shares: its arguments, its JSON record, its description of the machine, its table."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bert_fast.files import write_json
from bert_fast.hardware import cpu_name

_PACKAGES = ("bert_fast", "torch", "transformers", "numpy", "pytorch_optimizer", "schedulefree", "torchao")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--json FILE` and `--quick`, which every benchmark has."""
    parser.add_argument("--json", metavar="FILE", help="write metrics, config, environment and raw repeats there")
    parser.add_argument(
        "--quick", action="store_true", help="under a minute: fewer and smaller repeats, to see it work"
    )


def write_result(
    path: str | Path,
    metrics: dict[str, Any],
    config: dict[str, Any],
    environment: dict[str, Any],
    samples: dict[str, Any],
) -> None:
    """One self-contained JSON object: metrics by name, what was run, where, and the raw repeats behind them."""
    write_json(path, {"metrics": metrics, "config": config, "environment": environment, "samples": samples})


def environment() -> dict[str, Any]:
    """Versions and hardware for the record; the load average tells whether the machine was busy with other work."""
    return {
        "python": platform.python_version(),
        "packages": {name: installed for name in _PACKAGES if (installed := _version(name)) is not None},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that also reads well on a terminal: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headers))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [cells[0], rule, *cells[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )
