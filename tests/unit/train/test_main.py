"""From an error to one line and an exit code; what --print-config and --dry-run do."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from bert_fast.config import Config
from bert_fast.errors import TrainingError, UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.train import main as entry


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("mend this"), 2, "error: mend this\n"),
        (TrainingError("not finite"), 3, "error: not finite\n"),
        (KeyboardInterrupt(), 130, "error: interrupted before the first step; nothing was written\n"),
        (OSError(errno.ENOSPC, "No space", "runs/x"), 2, "error: disk full (runs/x); free space and --resume\n"),
        (
            RuntimeError("[gloo/transport] Connection closed by peer\nat line 3"),
            ExitCode.LOST_RANK,
            "error: lost contact with another rank: [gloo/transport] Connection closed by peer\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_errors_for_people_are_one_line_and_a_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)

    def action() -> int:
        raise error

    assert entry.guarded(action) == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError(errno.ENOENT, "x"), KeyError("bug")])
def test_bugs_keep_their_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def action() -> int:
        raise error

    assert entry.guarded(action) == ExitCode.BUG
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.splitlines()[-1].startswith(f"error: unexpected {type(error).__name__}")


def test_print_config_and_dry_run_start_nothing(
    tmp_path: Path, make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    from bert_fast.config import as_plain
    from bert_fast.config.load import load_config
    from bert_fast.config.yaml_files import to_yaml

    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(as_plain(make_config())))
    args = argparse.Namespace(
        config=str(path), overrides=["train.seed=5"], print_config=True, dry_run=False, resume=False
    )
    assert entry.run(args, 0.0) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed).train.seed == 5
    args.print_config, args.dry_run = False, True
    assert entry.run(args, 0.0) == 0
    assert not (tmp_path / "run").exists()
