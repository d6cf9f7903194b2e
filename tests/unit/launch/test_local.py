"""The launcher of one machine, with processes that no test could start."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.launch.error_report import ErrorReport, write_report
from bert_fast.launch.local import RankProcesses, run_local
from bert_fast.launch.slurm import adopt_slurm


class Rank:
    """A rank's process as the launcher sees it. Without a code it waits for a disk: no signal ends it."""

    def __init__(self, code: int | None) -> None:
        self.returncode = code
        self.signals: list[int] = []

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.send_signal(9)


def started(errors: Path, *ranks: Rank) -> RankProcesses:
    """A launcher that has started these ranks."""
    left = iter(ranks)
    start_process: Any = lambda *_, **__: next(left)  # noqa: E731
    processes = RankProcesses(errors, start_process, reap_s=0.05)
    for _ in ranks:
        processes.start([], {})
    return processes


def test_a_rank_that_not_even_sigkill_ends_keeps_nobody_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(tmp_path, ErrorReport(0, ExitCode.LOST_RANK, "lost contact with rank 1", "node6"))
    left, stuck = Rank(ExitCode.LOST_RANK), Rank(None)
    ranks = started(tmp_path, left, stuck)
    with ranks.signals_forwarded():
        assert ranks.watch() == ExitCode.LOST_RANK
    assert stuck.signals == [signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]
    assert capsys.readouterr().err == "error: rank 0: lost contact with rank 1\n"


def test_a_killed_rank_is_named_with_where_it_was_seen_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = "rank 1 (node7) does not answer; last step 12, evaluation"
    write_report(tmp_path, ErrorReport(0, ExitCode.LOST_RANK, "lost contact", "node6", lost_rank=1, last_seen=seen))
    assert started(tmp_path, Rank(ExitCode.LOST_RANK), Rank(-signal.SIGKILL)).watch() == ExitCode.LOST_RANK
    assert capsys.readouterr().err == (
        f"error: a rank was killed: rank 1 by SIGKILL; the others were stopped; {seen}. Start again, or --resume from the "
        "last checkpoint\n"
    )


@pytest.mark.parametrize(
    ("codes", "code", "line"),
    [
        ((ExitCode.LOST_RANK, ExitCode.BUG, ExitCode.LOST_RANK), ExitCode.BUG, "rank 1: text of bug"),
        ((ExitCode.USER_ERROR,) * 3, ExitCode.USER_ERROR, "text of user_error"),
        ((ExitCode.OK, ExitCode.LOST_RANK, ExitCode.LOST_RANK), ExitCode.LOST_RANK, "rank 1, 2: text of lost_rank"),
    ],
)
def test_of_ranks_that_fail_the_cause_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: tuple[ExitCode, ...], code: ExitCode, line: str
) -> None:
    for rank, each in enumerate(codes):
        if each != ExitCode.OK:
            write_report(tmp_path, ErrorReport(rank, each, f"text of {each.name.lower()}", "node6"))
    assert started(tmp_path, *map(Rank, codes)).watch() == code
    assert capsys.readouterr().err == f"error: {line}\n"


def page_of(message: str) -> str:
    """The section of the page that a message points to."""
    found = re.search(r"\(docs/(\w+)\.md, ([^,)]+)[,)]", message)
    assert found, message
    text = (ROOT / f"docs/{found[1]}.md").read_text(encoding="utf-8")
    return text[text.index(f"**{found[2]}.**") :].split("\n\n**")[0]


def test_pages_that_errors_of_srun_point_to_hold_the_answer(
    monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Config]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        adopt_slurm()
    assert "export MASTER_ADDR=" in page_of(str(caught.value))
    settings = (
        "system.world_size=16",
        "system.ranks_per_node=8",
        "batch.micro_batch_size=1",
        "batch.global_batch_size=16",
    )
    with pytest.raises(UserError) as caught:
        run_local(make_config(*settings), [])
    assert "srun --ntasks-per-node=1 torchrun" in page_of(str(caught.value))


def test_pages_named_in_the_program_exist() -> None:
    files = [*ROOT.glob("bert_fast/**/*.py"), *ROOT.glob("scripts/**/*.py"), ROOT / "run_pretraining.py"]
    named = {name for file in files for name in re.findall(r"docs/\w+\.md", file.read_text(encoding="utf-8"))}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_a_rank_that_left_no_report_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = started(tmp_path, Rank(ExitCode.OK), Rank(ExitCode.BUG))
    with ranks.signals_forwarded():
        assert ranks.watch() == ExitCode.BUG
    assert capsys.readouterr().err.startswith("error: rank 1 ended with exit code 70 and left no report;")


@pytest.mark.parametrize("code", [128 + signal.SIGTERM, 128 + signal.SIGINT, ExitCode.TARGET_MISSED])
def test_ranks_that_saved_or_missed_the_target_have_nothing_to_report(
    code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = started(tmp_path, Rank(code), Rank(code))
    with ranks.signals_forwarded():
        assert ranks.watch() == code
    assert not capsys.readouterr().err
