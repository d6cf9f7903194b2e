"""The reports of ranks that fail: written whole, read as they were, consequences told from causes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bert_fast.exit_codes import ExitCode
from bert_fast.launch.error_report import (
    ERROR_FOLDER,
    ErrorReport,
    causes_of,
    describe_causes,
    format_ranks,
    last_seen,
    read_reports,
    report_error,
    write_report,
)

CAUSE = ErrorReport(1, ExitCode.BUG, "the cause", "node7")
SEEN = "rank 1 (node7) does not answer; last step 12, forward and backward"
CONSEQUENCE = ErrorReport(0, ExitCode.LOST_RANK, "lost contact", "node6", lost_rank=1, last_seen=SEEN)


def test_reports_come_back_in_the_order_of_ranks(tmp_path: Path) -> None:
    late = ErrorReport(10, ExitCode.LOST_RANK, "lost contact", "node8")
    for report in (late, CAUSE, CONSEQUENCE):
        write_report(tmp_path, report)
    assert read_reports(tmp_path) == [CONSEQUENCE, CAUSE, late]
    written = json.loads((tmp_path / "rank-0.json").read_text(encoding="utf-8"))
    assert (written["kind"], written["exit_code"], written["lost_rank"]) == ("lost_rank", 4, 1)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"rank": 1}', '{"rank": 1, "kind": "", "exit_code": 5, "text": "", "host": ""}']
)
def test_what_is_no_report_is_left_out(tmp_path: Path, text: str) -> None:
    write_report(tmp_path, CONSEQUENCE)
    (tmp_path / "rank-1.json").write_text(text, encoding="utf-8")
    assert read_reports(tmp_path) == [CONSEQUENCE]


def test_a_consequence_is_dropped_where_the_cause_is_known() -> None:
    assert causes_of([CONSEQUENCE, CAUSE]) == {"the cause": [1]}
    assert causes_of([CONSEQUENCE]) == {"lost contact": [0]}
    assert causes_of([]) == {}


def test_a_text_of_many_ranks_is_said_once() -> None:
    reports = [ErrorReport(rank, ExitCode.USER_ERROR, f"disk {rank // 10} is full", "node") for rank in range(12)]
    assert describe_causes(reports) == (
        "rank 0, 1, 2, 3, 4, 5, 6, 7 and 2 more: disk 0 is full; rank 10, 11: disk 1 is full"
    )
    assert format_ranks(range(8)) == "0, 1, 2, 3, 4, 5, 6, 7"


def test_how_a_lost_rank_was_seen_last() -> None:
    assert last_seen([CAUSE, CONSEQUENCE], 1) == SEEN
    assert last_seen([CAUSE, CONSEQUENCE], 0) == ""


def test_a_rank_reports_to_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ERROR_FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    assert report_error("two\nlines", ExitCode.LOST_RANK, 1, SEEN) is ExitCode.LOST_RANK
    (report,) = read_reports(tmp_path)
    assert (report.rank, report.exit_code, report.text) == (3, ExitCode.LOST_RANK, "two lines")
    assert (report.lost_rank, report.last_seen) == (1, SEEN)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "who"), [("3", "rank 3: "), ("", "")])
def test_where_no_report_can_be_written_the_error_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, who: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(ERROR_FOLDER, str(tmp_path / "file"))
    monkeypatch.setenv("RANK", rank)
    assert report_error("disk full", ExitCode.USER_ERROR) is ExitCode.USER_ERROR
    assert capsys.readouterr().err == f"error: {who}disk full\n"
