"""Stages that go wrong, for test_gpu_check.py."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from gpu.stage import CheckFailed, Context, NotAvailable


def run(context: Context, how: str) -> None:
    context.result.metrics["begun"] = 1
    context.save()
    if how == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hangs":
        child = subprocess.Popen(["sleep", "600"])
        Path(context.out, "child").write_text(str(child.pid), encoding="ascii")
        time.sleep(600)
    if how == "raises":
        raise ValueError("the first line\nanother line")
    if how == "lacks":
        raise NotAvailable("no such card")
    context.case("right", lambda: None)
    context.case("lacking", _lacking)
    if how == "fails a case":
        context.case("wrong", _wrong)
    context.result.summary = "42"


def _lacking() -> None:
    raise NotAvailable("no such kernel")


def _wrong() -> None:
    raise CheckFailed("7 for 8")
