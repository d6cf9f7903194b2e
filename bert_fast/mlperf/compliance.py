"""Runs MLPerf's own checkers on what we wrote, and reads their verdict from their output.

Two of them (package, system description) exit with 0 on failure, so their text is read. The package checker writes
`scaling.json` beside the results of a closed package, so it is given a copy.
"""

from __future__ import annotations

import csv
import io
import logging
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bert_fast.errors import UserError

_TIMEOUT_S = 600


@dataclass(frozen=True)
class CheckerVerdict:
    """What one of MLPerf's checkers says: `text` is its whole output, `reasons` the lines of it that tell why it failed."""

    passed: bool
    text: str

    @property
    def reasons(self) -> list[str]:
        marks = ("ERROR", "failed", "Failed", "FAILED", "Error:", "Exception")
        lines = [line.strip() for line in self.text.splitlines() if any(mark in line for mark in marks)]
        return list(dict.fromkeys(re.sub(r"^(ERROR|INFO|WARNING)\s*-\s*", "", line) for line in lines))


@contextmanager
def _scratch() -> Iterator[Path]:
    """A working folder for the checkers, which leave log files where they are started."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _run(module: str, arguments: list[str], scratch: Path) -> tuple[int, str]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"mlperf_logging.{module}", *arguments],
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"mlperf_logging.{module} did not end within {_TIMEOUT_S} s") from None
    return done.returncode, (done.stdout + done.stderr).strip()


def check_log(path: str | Path, ruleset: str) -> CheckerVerdict:
    """The compliance checker on one result log."""
    full = str(Path(path).resolve())
    with _scratch() as scratch:
        code, text = _run(
            "compliance_checker",
            ["--usage", "training", "--ruleset", ruleset, "--log_output", str(scratch / "checker.log"), full],
            scratch,
        )
        text = text.replace(full, Path(path).name).replace(f"{scratch}/", "")
    return CheckerVerdict(code == 0 and "SUCCESS" in text, text)


def check_logs(paths: list[Path], ruleset: str) -> list[CheckerVerdict]:
    """The compliance checker on many logs, in one process: starting it takes far longer than a log."""
    from mlperf_logging.compliance_checker import mlp_compliance

    verdicts = []
    for path in paths:
        output = io.StringIO()
        handler = logging.StreamHandler(output)
        root = logging.getLogger()
        level, others = root.level, root.handlers[:]
        root.handlers[:], root.level = [handler], logging.INFO
        try:
            checker = mlp_compliance.make_checker("training", ruleset, quiet=False, werror=False)
            passed = mlp_compliance.main(str(path), f"training_{ruleset}/common.yaml", checker)[0]
        except Exception as error:  # raised by the rules, which are code that is evaluated over the log
            passed = False
            output.write(f"ERROR - {type(error).__name__}: {error}\n")
        finally:
            root.handlers[:], root.level = others, level
        verdicts.append(CheckerVerdict(bool(passed), output.getvalue().replace(str(path), path.name)))
    return verdicts


def check_system(path: str | Path, ruleset: str) -> CheckerVerdict:
    """The system description checker."""
    with _scratch() as scratch:
        _, text = _run("system_desc_checker", [str(Path(path).resolve()), "training", ruleset], scratch)
    return CheckerVerdict("checker passed" in text and "checker failed" not in text and "Traceback" not in text, text)


def check_convergence(results: str | Path, ruleset: str) -> CheckerVerdict:
    """The RCP checker on a folder of result logs (closed division)."""
    with _scratch() as scratch:
        copied = _copied(Path(results), scratch / "results")
        code, text = _run(
            "rcp_checker", [str(copied), "--rcp_version", ruleset, "--log_output", str(scratch / "rcp.log")], scratch
        )
    return CheckerVerdict(code == 0 and "PASSED" in text, text.replace(f"{scratch}/", ""))


@dataclass(frozen=True)
class PackageVerdicts:
    """What MLPerf's package checker and result summarizer say of a package."""

    checker: CheckerVerdict
    scaling: dict[str, float]  # by system: the factor that the reference convergence puts on the score
    minutes: dict[str, float]  # by system: the summarizer's score
    summarizer: CheckerVerdict


def check_package(organization: str | Path, ruleset: str) -> PackageVerdicts:
    """The package checker and the result summarizer on `<org>/` (with results/ and systems/), in a copy of it."""
    with _scratch() as scratch:
        copied = _copied(Path(organization), scratch / Path(organization).resolve().name)
        _, text = _run(
            "package_checker", [str(copied), "training", ruleset, "--log_output", str(scratch / "package.log")], scratch
        )
        passed = "PACKAGE CHECKER FOUND NO ERRORS" in text and "Traceback" not in text
        scaling = {path.parent.parent.name: _scaling(path) for path in copied.glob("results/*/bert/scaling.json")}
        table = scratch / "summary.csv"
        code, summary = _run("result_summarizer", [str(copied), "training", ruleset, "--csv", str(table)], scratch)
        minutes = _minutes(table) if table.is_file() else {}
        summarizer = CheckerVerdict(code == 0 and bool(minutes), summary.replace(f"{scratch}/", ""))
    return PackageVerdicts(CheckerVerdict(passed, text.replace(f"{scratch}/", "")), scaling, minutes, summarizer)


def _copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("scaling.json", "*.log"))
    return target


def _scaling(path: Path) -> float:
    factor = re.search(r"[-+0-9.eE]+", path.read_text(encoding="utf-8").partition(":")[2])
    return float(factor.group()) if factor else 1.0


def _minutes(table: Path) -> dict[str, float]:
    """Minutes by system from the summarizer's table, whose first lines may be headings."""
    rows = list(csv.reader(table.read_text(encoding="utf-8").splitlines()))
    head = next((n for n, row in enumerate(rows) if any(cell.strip().lower() == "bert" for cell in row)), None)
    if head is None:
        return {}
    names = [cell.strip().lower() for cell in rows[head]]
    value, system = names.index("bert"), next((n for n, name in enumerate(names) if "system" in name), 0)
    minutes = {}
    for row in rows[head + 1 :]:
        try:
            minutes[row[system]] = float(row[value])
        except (ValueError, IndexError):
            continue
    return minutes
