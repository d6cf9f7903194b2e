"""Lines and records are read back as they were written; other forms are refused in one line."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.run_files import evaluation_line, run_record, step_line, write_run

from bert_fast.errors import UserError
from bert_fast.report.schema import (
    FORMAT,
    Line,
    RunRecord,
    SkippedLine,
    TimeSplit,
    parse_line,
    parse_record,
    read_record,
)

RECORD_KEYS = [
    "format", "metrics", "config", "environment", "samples", "status", "target_accuracy", "evaluations", "time_split_s",
    "init_s", "cost", "sessions", "peak_memory", "stragglers", "checkpoints", "hosts", "energy", "data", "shared_text",
    "compliance",
]  # fmt: skip
LINE_KEYS = {
    "step": "kind step samples time_s loss mlm_loss nsp_loss lr grad_norm samples_per_s imbalance compute_imbalance "
    "compute_ms data_ms_rank exposed_ms_rank exposed_ms data_ms optimizer_ms capped cost clip",
    "eval": "kind step samples time_s accuracy mlm_loss nsp_accuracy nsp_loss",
    "skipped": "kind step bad_step ranks",
}
SPLIT_KEYS = [
    "forward and backward", "exposed communication", "waiting for the slowest rank", "optimizer", "data wait", "evaluation",
    "checkpoint", "other",
]  # fmt: skip
LINES: list[Line] = [
    step_line(10), evaluation_line(20, 0.25), SkippedLine(step=30, bad_step=28, ranks=[0, 3]),
    step_line(10, nsp_loss=None), replace(evaluation_line(20, 0.25), nsp_accuracy=None, nsp_loss=None),
]  # fmt: skip


def text_of(tree: Any) -> bytes:
    return json.dumps(tree).encode()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.kind)
def test_a_line_is_read_as_it_was_written(line: Line) -> None:
    assert list(line.as_json()) == LINE_KEYS[line.kind].split()
    assert parse_line(text_of(line.as_json()), "a line") == line


def test_the_loss_of_an_evaluation_is_the_sum_of_what_is_there() -> None:
    line = evaluation_line(20, 0.25)
    assert line.loss == line.mlm_loss + 0.65
    assert replace(line, nsp_accuracy=None, nsp_loss=None).loss == line.mlm_loss


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = run_record([evaluation_line(10, 0.125), evaluation_line(20, 0.25)], shared_text=(3, 900))
    write_run(tmp_path, record, [])
    assert read_record(tmp_path / "metrics.json") == record
    tree = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert list(tree) == RECORD_KEYS
    assert tree["format"] == FORMAT
    assert tree["evaluations"][1] == {
        name: v for name, v in evaluation_line(20, 0.25).as_json().items() if name != "kind"
    }
    assert tree["samples"] == {"eval_accuracy": [0.125, 0.25], "eval_samples": [640, 1280], "eval_time_s": [1.0, 2.0]}
    assert tree["data"]["eval"]["samples of training text"] == "5 of 900, compared with 12 %"
    assert "samples of training text" not in tree["data"]["train"]
    assert "checkpoint" not in tree["time_split_s"], "there was none"
    assert "kind" not in tree["checkpoints"][0]


def test_the_names_of_the_time_split_have_spaces() -> None:
    split = TimeSplit(**{field.name: 1.0 for field in fields(TimeSplit)})
    assert list(split.as_json()) == SPLIT_KEYS


def test_a_diverged_run_is_read(tmp_path: Path) -> None:
    line = parse_line(text_of(step_line(10, loss=math.nan, grad_norm=math.inf).as_json()), "a line")
    assert line is not None
    assert math.isnan(line.loss)
    assert line.grad_norm == math.inf


def test_each_part_refuses_what_it_does_not_know() -> None:
    """A new name in any of them is another form."""
    record = run_record([evaluation_line(10, 0.125)])
    tree = record.as_json()
    parts = [name for name, value in vars(record).items() if is_dataclass(value)]
    assert len(parts) == 8
    for name in parts:
        with pytest.raises(UserError, match=rf"^file is not as '{FORMAT}' has it: {name}.*\.surprise: "):
            parse_record(text_of({**tree, name: {**tree[name], "surprise": 1}}), "file")


OTHER_RECORDS: list[tuple[str, Any, str]] = [
    (
        "before the format",
        {"format": None},
        "file was written before the settings were renamed (it has no format); read it",
    ),
    (
        "another format",
        {"format": "bert_fast run 1"},
        "file has the format 'bert_fast run 1' and this code reads 'bert_fast",
    ),
    ("a number as text", {"init_s": "3.0"}, "has it: init_s: Input should be a valid number"),
    ("a fraction of a session", {"sessions": 1.5}, "has it: sessions: Input should be a valid integer"),
    ("a bool as a number", {"sessions": True}, "has it: sessions: Input should be a valid integer"),
    ("an unknown status", {"status": "fine"}, "has it: status: Input should be 'success' or 'target not reached'"),
    ("no energy", {"energy": None}, "has it: energy: "),
    ("a config without its sections", {"config": {"run": {}}}, "has it: config.run.name should be a str"),
    (
        "lines",
        {"metrics": None, "config": None},
        "file is not the record of a run (it has no metrics and config); give",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"), [case[1:] for case in OTHER_RECORDS], ids=[c[0] for c in OTHER_RECORDS]
)
def test_records_of_another_form_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    tree = {**run_record().as_json(), **changes}
    tree = {name: value for name, value in tree.items() if value is not None or name not in changes}
    with pytest.raises(UserError) as error:
        parse_record(text_of(tree), "file")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"5", b"null"], ids=range(7))
def test_files_that_are_no_record(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "metrics.json").write_bytes(text)
    with pytest.raises(UserError, match=r"metrics\.json is not (JSON|the record of a run)"):
        read_record(tmp_path / "metrics.json")
    with pytest.raises(UserError, match=r"nowhere/metrics\.json does not exist"):
        read_record(tmp_path / "nowhere" / "metrics.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "10"}, "step.step: Input should be a valid integer"), ({"kind": "note"}, "Input tag 'note'"),
        ({"surprise": 1}, "step.surprise: "), ({"clip": {"all": {"clipped_share": 1.0}}}, "mean_coefficient"),
    ],
)  # fmt: skip
def test_lines_of_another_form_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_line(text_of({**step_line(10).as_json(), **change}), "file, line 7,")
    assert str(error.value).startswith(f"file, line 7, is not as '{FORMAT}' has it: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_that_was_cut_off_is_none() -> None:
    assert parse_line(text_of(step_line(10).as_json())[:50], "a line") is None


def test_every_field_is_in_the_file() -> None:
    """So that a new one cannot be forgotten in `as_json`."""
    assert [field.name for field in fields(RunRecord)] == RECORD_KEYS
