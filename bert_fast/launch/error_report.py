"""What a rank that fails tells its launcher: one JSON file per rank, which the launcher and the supervisor read."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bert_fast.command import one_line
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_json

ERROR_FOLDER = "BERT_FAST_ERROR_FOLDER"  # variable: the folder of the launcher that ranks write their reports to
REPORT_FILES = ("rank-*.json", ".rank-*.json.*.tmp")  # everything that ranks may leave in that folder, as patterns
_MAX_NAMED_RANKS = 8  # of a thousand ranks with the same error


@dataclass(frozen=True)
class ErrorReport:
    """Why a rank has ended.

    Attributes:
        rank: the rank that reports.
        exit_code: what it ends with, which is also the kind of the error.
        text: one line for the user.
        host: where it runs.
        lost_rank: for `ExitCode.LOST_RANK`, the rank that was lost (the first of several); None where it is not known.
        last_seen: how `lost_rank` was seen last, in words that begin with its name; empty where it is not known.
    """

    rank: int
    exit_code: ExitCode
    text: str
    host: str
    lost_rank: int | None = None
    last_seen: str = ""

    @property
    def kind(self) -> str:
        """The name of the exit code in lower case, such as "user_error"."""
        return self.exit_code.name.lower()

    @property
    def is_consequence(self) -> bool:
        """Whether the error only follows from the end of another rank, whose own report has the cause."""
        return self.exit_code is ExitCode.LOST_RANK


def report_error(text: str, code: ExitCode, lost_rank: int | None = None, last_seen: str = "") -> ExitCode:
    """Report the error of this process: to its launcher, so that ranks with the same error speak once, else on stderr.

    Returns:
        `code`, for the process to end with.
    """
    text, rank, folder = one_line(text), os.environ.get("RANK", ""), os.environ.get(ERROR_FOLDER)
    if folder and rank.isdecimal():
        try:
            write_report(folder, ErrorReport(int(rank), code, text, socket.gethostname(), lost_rank, last_seen))
            return code
        except (UserError, OSError):  # a disk that is full, perhaps what the text is about
            pass
    print(f"error: {f'rank {rank}: ' if rank else ''}{text}", file=sys.stderr, flush=True)
    return code


def write_report(folder: str | Path, report: ErrorReport) -> None:
    """Write a report into a launcher's error folder, atomically. Raises UserError or OSError where it cannot be written."""
    write_json(Path(folder) / f"rank-{report.rank}.json", {"kind": report.kind, **asdict(report)})


def read_reports(folder: str | Path) -> list[ErrorReport]:
    """The reports in an error folder, by rank. A file that is not a report, or that cannot be read, is left out."""
    reports = []
    for path in Path(folder).glob(REPORT_FILES[0]):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["exit_code"] = ExitCode(fields["exit_code"])
            del fields["kind"]  # the exit code says the same
            reports.append(ErrorReport(**fields))
        except (OSError, ValueError, KeyError, TypeError):  # an explanation that fails must not end the launcher
            continue
    return sorted(reports, key=lambda report: report.rank)


def causes_of(reports: Sequence[ErrorReport]) -> dict[str, list[int]]:
    """Every text of the reports once, with its ranks. Consequences are left out where there is a report of a cause."""
    texts: dict[str, list[int]] = {}
    for report in [report for report in reports if not report.is_consequence] or reports:
        texts.setdefault(report.text, []).append(report.rank)
    return texts


def describe_causes(reports: Sequence[ErrorReport]) -> str:
    """`causes_of` in one line; empty without reports."""
    return "; ".join(f"rank {format_ranks(ranks)}: {text}" for text, ranks in causes_of(reports).items())


def format_ranks(ranks: Sequence[int]) -> str:
    """Ranks for a message: "0, 1, 2", and of many ranks the first eight and the number of the others."""
    others = len(ranks) - _MAX_NAMED_RANKS
    return ", ".join(map(str, ranks[:_MAX_NAMED_RANKS])) + (f" and {others} more" if others > 0 else "")


def last_seen(reports: Sequence[ErrorReport], rank: int) -> str:
    """How the others saw a lost rank last, in words; empty if no report says so."""
    return next((report.last_seen for report in reports if report.lost_rank == rank and report.last_seen), "")
