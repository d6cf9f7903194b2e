"""Which version of the code runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

COMMIT = "COMMIT"  # file beside a copy of the code that was made for a job


def commit() -> str:
    """The code's commit, marked if the tree differs from it; `unknown` outside of a checkout."""
    root = Path(__file__).resolve().parents[2]
    if (root / COMMIT).is_file():  # a copy of the code, made for a job
        return (root / COMMIT).read_text(encoding="utf-8").strip()
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
