"""The last files of a run that is done: compliance, cost, report, metrics. Can be repeated, by a process without ranks.

`finishing.json` holds the run's record as soon as its last step is done. Whatever ends a process from then on, the next start
in the folder makes the files that are missing; `metrics.json`, the last one, says that all are there.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from bert_fast import claims
from bert_fast.balance.cost import CostModel, cost_record, fit_cost
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_json
from bert_fast.mlperf.compliance import check_log
from bert_fast.report.console import print_table, run_rows
from bert_fast.report.html import write_report
from bert_fast.report.metrics import cost_rows
from bert_fast.report.schema import TARGET_MISSED, ComplianceRecord, CostRecord, RunRecord, read_record
from bert_fast.run_folder import COST, PENDING_RECORD, RECORD, RESULT_LOG, RUN


def complete(folder: Path) -> None:
    """Make the files that follow from `finishing.json`, which goes when they are there. Prints what the run came to.

    Raises:
        UserError: `finishing.json` holds no record of this form.
    """
    record = read_record(folder / PENDING_RECORD)
    _write_cost(folder, record.cost)
    if record.config["mlperf"]["enabled"]:
        record = _checked(folder, record)
    report = write_report(folder, record)
    write_json(folder / RECORD, record.as_json())
    (folder / PENDING_RECORD).unlink()
    print_table(f"{record.name}, seed {record.seed}", run_rows(record))
    if record.compliance.passed is False:
        print(record.compliance.text)
    print(f"report: {report}   log: {folder / RESULT_LOG}   metrics: {folder / RECORD}", flush=True)


def _checked(folder: Path, record: RunRecord) -> RunRecord:
    """The record with what the compliance checker says of the run's log."""
    mlperf = record.config["mlperf"]
    verdict = check_log(folder / RESULT_LOG, mlperf["ruleset"])
    word = "PASSED" if verdict.passed else "FAILED"
    timing = "" if record.sessions == 1 else "; resumed, so not a valid timing"
    compliance = ComplianceRecord(
        summary=f"{word}: compliance_checker, {mlperf['division']} division, ruleset {mlperf['ruleset']}{timing}",
        passed=verdict.passed,
        text=verdict.text,
    )
    metrics = replace(record.metrics, compliance_passed=int(verdict.passed))
    return replace(record, metrics=metrics, compliance=compliance)


def finished_again(folder: Path) -> ExitCode | None:
    """Finish what a run that was done had left to do; its exit code. None: there is no such run here.

    Raises:
        UserError: a living process is at it, or its record is of another form.
    """
    if not claims.is_marked(folder, RUN):
        return None
    if (folder / PENDING_RECORD).is_file():
        with claims.claimed(folder, RUN):
            if (folder / RECORD).is_file():
                (folder / PENDING_RECORD).unlink(missing_ok=True)
            else:
                print(f"{folder}: the run was done; its last files are made now", flush=True)
                complete(folder)
        return exit_code_of(folder)
    # torchrun starts all ranks again for one that was killed
    return exit_code_of(folder) if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 else None


def is_over(folder: Path) -> bool:
    """Whether the run in `folder` has no more steps to do."""
    return (folder / PENDING_RECORD).is_file() or (folder / RECORD).is_file()


def exit_code_of(folder: Path) -> ExitCode | None:
    """What the finished run in `folder` ended with; None if no run has finished there. Raises UserError as `read_record`."""
    if not (folder / RECORD).is_file():
        return None
    missed = read_record(folder / RECORD).status == TARGET_MISSED
    return ExitCode.TARGET_MISSED if missed else ExitCode.OK


def _write_cost(folder: Path, cost: CostRecord) -> None:
    """The run's cost model, with what its own times say; `balance.cost` of a later run may name this file."""
    rows = np.array(cost_rows(folder))
    try:
        fitted = fit_cost(rows)
    except ValueError:  # too short a run, or batches that are too much alike
        fitted = None
    write_json(folder / COST, cost_record(CostModel(cost.linear, cost.quadratic), cost.source, fitted))
