#!/usr/bin/env python3
"""Search hyper-parameters of several contestants fairly: the same number of trials, sampler, seeds and pruner for each.

    python scripts/tune.py run configs/tune/mini.yaml --out runs/tune --workers 2   # goes on where it stopped
    python scripts/tune.py final configs/tune/mini.yaml --out runs/tune             # the best points on fresh seeds
    python scripts/tune.py report configs/tune/mini.yaml --out runs/tune

`worker` is one worker of `run`, for clusters: slurm/tune.sbatch. What a study file holds: docs/optimizers.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from tuning.study_file import EXAMPLE, Study, read_study

if TYPE_CHECKING:
    from tuning.search import Search


def main_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], epilog="docs/optimizers.md tells how a search is done.",
        allow_abbrev=False,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "search with workers on this machine until every contestant has its trials"),
        ("worker", "compute trials in this process until none is left (for a Slurm array)"),
        ("final", "run the best point of each contestant on fresh seeds, then ablations"),
        ("report", "write tune.json, report.md and report.html from what is there"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("study", help=f"the study file, such as {EXAMPLE}")
        command.add_argument(
            "--out", required=True, type=Path, help="folder of the journal, the records and the report"
        )
        command.add_argument("--contestants", help="only these, separated by commas (default: all)")
        command.add_argument("--trials", type=whole(1, 100_000), help="trials per contestant, variant and batch")
        if name in ("run", "final"):
            command.add_argument("--workers", type=whole(1, 1024), default=1, help="processes (default 1)")
        if name == "worker":
            command.add_argument(
                "--requeue", action="store_true", help="have Slurm start the job again after it has stopped it"
            )
        if name == "final":
            command.add_argument(
                "--part", type=_part, metavar="I/N", help="in this process, the I-th of N parts of the runs"
            )
            command.add_argument("--no-ablations", action="store_true", help="the best points alone")
    return parser


@guarded
def main() -> int:
    """Read the study, check all of it, do what the command says."""
    args = main_parser().parse_args()
    names = args.contestants.split(",") if args.contestants else None
    study = read_study(args.study, names, args.trials)
    options = [args.study, "--out", str(args.out)]
    options += ["--contestants", args.contestants] if args.contestants else []
    options += ["--trials", str(args.trials)] if args.trials else []
    return _do(args, study, options)


def _do(args: argparse.Namespace, study: Study, options: list[str]) -> int:
    if args.command == "report":
        from tuning.report import write_report

        write_report(study, args.out)
        print(f"wrote tune.json, report.md and report.html in {args.out}")
        return ExitCode.OK
    from tuning.journal import JOURNAL
    from tuning.search import Search
    from tuning.trial import check_runs
    from tuning.workers import run_workers, work

    if args.command == "final" and not (args.out / JOURNAL).is_file():
        raise UserError(
            f"{args.out / JOURNAL} is not there: nothing was searched; run `tune.py run` first, or correct --out"
        )
    check_runs(study)
    if args.command == "worker":
        return work(study, args.out, args.requeue)
    search = Search(study, args.out)  # refuses a journal of another study before anything starts
    if args.command == "run":
        code = run_workers(args.workers * [["worker", *options]], args.out)
        print(search.progress() + ("; next: tune.py final" if search.is_complete else ""), flush=True)
        return code
    return _final(args, study, search, options)


def _final(args: argparse.Namespace, study: Study, search: Search, options: list[str]) -> int:
    """The last round: in this process with --part, in workers without."""
    from tuning.final import final_runs, run_part
    from tuning.workers import run_workers

    if args.part is None:
        final_runs(study, search)  # refuses a search without a complete trial before anything starts
        parts = [["final", *options, "--part", f"{index}/{args.workers}"] for index in range(args.workers)]
        # Ablations are of the winner, which is known when all workers are done
        code = run_workers([[*part, "--no-ablations"] for part in parts], args.out)
        return code if code or args.no_ablations else run_workers(parts, args.out)
    missing = run_part(study, args.out, *args.part, ablations=not args.no_ablations)
    if missing and args.part == (0, 1):
        raise UserError(f"{len(missing)} runs of the last round are missing: {', '.join(missing[:3])}")
    return ExitCode.OK


def _part(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count) <= 1024):
        raise argparse.ArgumentTypeError(f"{text} is not of the form I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main())
