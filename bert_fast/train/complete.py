"""The last files of a run that is done: compliance, cost, report, figures. Can be repeated, by a process without ranks.

`finishing.json` holds the run's record as soon as its last step is done. Whatever ends a process from then on, the next start
in the folder makes the files that are missing; `metrics.json`, the last one, says that none is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast import claims
from bert_fast.balance.cost import CostModel, cost_record, fit_cost
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_json
from bert_fast.mlperf.compliance import check_log
from bert_fast.report.console import print_table, run_rows
from bert_fast.report.html import write_report
from bert_fast.report.metrics import cost_rows
from bert_fast.run_folder import PENDING_RECORD, RUN, TARGET_MISSED


def complete(folder: Path) -> dict[str, Any]:
    """Make the files that follow from `finishing.json`, which goes when they are there. Returns the whole record."""
    record: dict[str, Any] = json.loads((folder / PENDING_RECORD).read_text(encoding="utf-8"))
    _write_cost(folder, record["cost"])
    mlperf = record["config"]["mlperf"]
    if mlperf["enabled"]:
        verdict = check_log(folder / "result_0.txt", mlperf["ruleset"])
        timing = "" if record["sessions"] == 1 else "; resumed, so not a valid timing"
        word = "PASSED" if verdict.passed else "FAILED"
        record["compliance"] = {
            "summary": f"{word}: compliance_checker, {mlperf['division']} division, ruleset {mlperf['ruleset']}{timing}",
            "passed": verdict.passed, "text": verdict.text,
        }  # fmt: skip
        record["metrics"]["compliance_passed"] = int(verdict.passed)
    report = write_report(folder, record)
    write_json(folder / "metrics.json", record)
    (folder / PENDING_RECORD).unlink()
    config = record["config"]
    print_table(f"{config['run']['name']}, seed {config['train']['seed']}", run_rows(record))
    if record["compliance"].get("passed") is False:
        print(record["compliance"]["text"])
    print(f"report: {report}   log: {folder / 'result_0.txt'}   figures: {folder / 'metrics.json'}", flush=True)
    return record


def finished_again(folder: Path) -> ExitCode | None:
    """Finish what a run that was done had left to do; its exit code. None: there is no such run here.

    Raises:
        UserError: a living process is at it.
    """
    if not claims.is_marked(folder, RUN):
        return None
    if (folder / PENDING_RECORD).is_file():
        with claims.claimed(folder, RUN):
            if (folder / "metrics.json").is_file():
                (folder / PENDING_RECORD).unlink(missing_ok=True)
            else:
                print(f"{folder}: the run was done; its last files are made now", flush=True)
                complete(folder)
        return exit_code_of(folder)
    if (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    ):  # torchrun starts all ranks again for one that was killed
        return exit_code_of(folder)
    return None


def is_over(folder: Path) -> bool:
    """Whether the run in `folder` has no more steps to do."""
    return (folder / PENDING_RECORD).is_file() or (folder / "metrics.json").is_file()


def exit_code_of(folder: Path) -> ExitCode | None:
    """What the finished run in `folder` ended with; None if it has not."""
    try:
        record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return ExitCode.TARGET_MISSED if record.get("status") == TARGET_MISSED else ExitCode.OK


def _write_cost(folder: Path, cost: dict[str, Any]) -> None:
    """The run's cost model, with what its own times say; `balance.cost` of a later run may name this file."""
    try:
        fitted = fit_cost(np.array(cost_rows(folder)))
    except ValueError:  # too short a run, or batches that are too much alike
        fitted = None
    write_json(folder / "cost.json", cost_record(CostModel(cost["linear"], cost["quadratic"]), cost["source"], fitted))
