"""Training programs as the tools start them: a process of its own, run to its end, its record read."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.report.schema import RunRecord, read_record
from bert_fast.run_folder import RECORD

ROOT = Path(__file__).resolve().parents[1]
_RESULTS = (ExitCode.OK, ExitCode.TARGET_MISSED)  # a missed target is a result too
_NUM_TRACEBACK_LINES = 30


def pretrain(config: str, overrides: list[str], folder: Path, name: str) -> RunRecord:
    """Run run_pretraining.py with `config` and `overrides` into `folder`; its record. Raises what `run` raises."""
    program = [str(ROOT / "run_pretraining.py"), "--config", config, *overrides, f"run.folder={folder}"]
    run(program, folder / RECORD, name)
    return read_record(folder / RECORD)


def run(program: list[str], record: Path, name: str) -> dict[str, Any]:
    """Run a Python program to its end; the JSON object that it wrote to `record`.

    On Ctrl-C the program ends in its own time first: it may have ranks to stop and a checkpoint to write.

    Args:
        program: arguments of the interpreter: a script's path, or `-m` and a module, then the program's own.
        name: what the run is called in the error, such as "seed 3".

    Raises:
        UserError: the program failed or left no record; with its last line.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, *program], stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
    if code not in _RESULTS or not record.is_file():
        if code == ExitCode.BUG:
            print("\n".join(lines[-_NUM_TRACEBACK_LINES:-1]), file=sys.stderr)
        raise UserError(f"{name} ended with exit code {code}: {lines[-1].removeprefix('error: ')}")
    result: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return result
