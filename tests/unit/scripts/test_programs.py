"""Runs that the tools start: a record, a missed target, a failure in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

import programs
from bert_fast.errors import UserError

PROGRAM = """
import json, sys
code, record = int(sys.argv[1]), sys.argv[2]
if record:
    json.dump({"metrics": {"steps": 3}}, open(record, "w"))
print("the first line")
print("error: the disk is full", file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("code", [0, 1])
def test_a_missed_target_is_a_result(program: str, tmp_path: Path, code: int) -> None:
    record = tmp_path / "metrics.json"
    assert programs.run([program, str(code), str(record)], record, "seed 3") == {"metrics": {"steps": 3}}


@pytest.mark.parametrize("code", [2, 70])
def test_a_failure_has_the_last_line(
    program: str, tmp_path: Path, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "metrics.json"
    with pytest.raises(UserError, match=f"^seed 3 ended with exit code {code}: the disk is full$"):
        programs.run([program, str(code), str(record)], record, "seed 3")
    assert ("the first line" in capfd.readouterr().err) == (code == 70), "a bug shows its traceback"


def test_a_run_without_a_record_failed(program: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^seed 3 ended with exit code 0: "):
        programs.run([program, "0", ""], tmp_path / "metrics.json", "seed 3")
