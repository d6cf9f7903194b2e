"""The numbers of exit codes: what users are told of them, and which of them another start may help."""

from __future__ import annotations

import re
import signal

from support.paths import ROOT

from bert_fast.exit_codes import ExitCode, is_restartable, of_signal


def test_the_table_for_users_has_every_code() -> None:
    text = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    table = text[text.index("## Exit codes") :].split("\n\n")[1]
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert codes == sorted(ExitCode)
    assert "| 128 + n |" in table


def test_codes_of_signals() -> None:
    assert of_signal(signal.SIGINT) == ExitCode.INTERRUPTED
    assert of_signal(signal.SIGPIPE) == ExitCode.PIPE


def test_what_another_start_may_help() -> None:
    restartable = [ExitCode.TRAINING_ERROR, ExitCode.LOST_RANK, ExitCode.BUG]
    assert [code for code in ExitCode if code.restartable] == restartable
    assert [code for code in range(256) if is_restartable(code)] == restartable
    assert not is_restartable(-signal.SIGKILL)
