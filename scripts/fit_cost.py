#!/usr/bin/env python3
"""Fit the cost of a sample, cost(L) = a L + b L^2, to the step times in the logs of one or more runs.

    python scripts/fit_cost.py runs/mini_cpu-seed0 --out cost.json
    python run_pretraining.py --config ... balance.cost=cost.json

Runs with balance.strategy=random tell most: their ranks differ most.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

import guard  # noqa: F401

import numpy as np

from bert_fast.balance.cost import cost_record, fit_cost
from bert_fast.command import guarded
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_json
from bert_fast.report.metrics import cost_rows


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="RUN", help="folders of runs (with metrics.jsonl)")
    parser.add_argument("--out", metavar="FILE", help="write the cost model there, for balance.cost")
    args = parser.parse_args()
    try:
        rows = [row for folder in args.folders for row in cost_rows(folder)]
        fit = fit_cost(np.array(rows))
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; give folders of runs", file=sys.stderr)
        return ExitCode.USER_ERROR
    except ValueError as error:
        print(f"error: {', '.join(args.folders)}: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    for name, value in asdict(fit).items():
        print(f"{name:10} {value:.6g}")
    if args.out:
        write_json(args.out, cost_record(fit.model, "fit of " + ", ".join(args.folders), fit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
