"""The names of a run's files are spelled in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from bert_fast import run_folder

FOLDERS = {run_folder.CHECKPOINTS, run_folder.MODEL, run_folder.FLIGHT, run_folder.TENSORBOARD}
FILES = {
    run_folder.CONFIG, run_folder.COMMIT, run_folder.NODES, run_folder.PREFLIGHT, run_folder.SUPERVISION,
    run_folder.STOPPED, run_folder.RESULT_LOG, run_folder.METRICS_LINES, run_folder.TRACE, run_folder.PROFILER_TRACE,
    run_folder.BUCKETS_CONFIG, run_folder.BUCKETS_RECORD, run_folder.COST, run_folder.PENDING_RECORD, run_folder.REPORT,
    run_folder.RECORD, run_folder.CHECKPOINT_MANIFEST, run_folder.CHECKPOINT_TENSORS, run_folder.checkpoint_name(0)[:5],
}  # fmt: skip
PLACES = {"run_folder.py", "config"}  # the settings' help, which comes before the run's folder, mentions a few


def spelled(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string that spells a name: a file's anywhere but in a docstring, a folder's in a path."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
        if is_text and any(name in node.value for name in FILES):
            yield node.lineno, node.value
        right = node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else None
        if isinstance(right, ast.Constant) and right.value in FOLDERS:
            yield node.lineno, str(right.value)


def modules() -> Iterator[Any]:
    package = ROOT / "bert_fast"
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in PLACES:
            yield pytest.param(path, id=name.as_posix())


@pytest.mark.parametrize("module", list(modules()))
def test_no_module_spells_a_name(module: Path) -> None:
    assert list(spelled(module.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('folder / "metrics.json"', 1), ('f"{folder}/result_0.txt"', 1), ('folder / "model"', 1), ('name = "step-*/x"', 1),
        ('"""metrics.json"""', 0), ('kind = "model"', 0), ("folder / RECORD", 0), ("folder / 'models'", 0),
    ],
)  # fmt: skip
def test_what_counts_as_spelled(source: str, count: int) -> None:
    assert len(list(spelled(source))) == count
