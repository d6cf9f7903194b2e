"""Imported first by every program of scripts/: from there on, a missing package is one line on stderr, and so is Ctrl-C.

A tool is started by its path, so it finds this module beside itself (`import guard`); a benchmark or a drill is started with
`python -m` from the root of the repository (`import scripts.guard`).
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    from bert_fast.command import guard_imports
except ModuleNotFoundError as error:
    if error.name != "bert_fast":
        raise
    root = Path(__file__).resolve().parents[1]
    print(
        f"error: the package bert_fast is not installed; run `make env` and use .venv/bin/python, or set PYTHONPATH={root}",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

guard_imports()
