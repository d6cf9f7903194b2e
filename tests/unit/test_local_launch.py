"""The launcher of one machine, with processes that no test could start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bert_fast.launch import local


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


def test_a_rank_that_not_even_sigkill_ends_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "_REAP_S", 0.05)
    (tmp_path / "rank-0").write_text("lost contact with another rank: rank 1 (node7) ...", encoding="utf-8")
    ranks = local._Ranks(tmp_path)
    left, stuck = Rank(local.EXIT_LOST_RANK), Rank(None)
    processes: list[Any] = [left, stuck]
    ranks._processes = processes
    with ranks.signals_forwarded():
        assert ranks.watch() == local.EXIT_LOST_RANK
    assert stuck.signals == [15, 9, 9]
    assert capsys.readouterr().err == "error: rank 0: lost contact with another rank: rank 1 (node7) ...\n"
