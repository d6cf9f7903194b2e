"""MLPerf's own checkers, run on what we wrote, with their verdict read from their output."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Verdict:
    """What the compliance checker said of a log."""

    passed: bool
    text: str


def check_log(path: str | Path, ruleset: str) -> Verdict:
    """Run mlperf-logging's compliance checker on one result log."""
    with tempfile.TemporaryDirectory() as scratch:  # the checker drops a log file of its own
        done = subprocess.run(
            [
                sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training",
                "--ruleset", ruleset, "--log_output", str(Path(scratch) / "checker.log"), str(Path(path).resolve()),
            ],
            cwd=scratch, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        text = (done.stdout + done.stderr).strip()
    text = text.replace(str(Path(path).resolve()), Path(path).name).replace(f"{scratch}/", "")
    return Verdict(done.returncode == 0 and "SUCCESS" in text, text)
