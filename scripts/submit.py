#!/usr/bin/env python3
"""A submission from runs: run ten seeds or collect finished logs, lay out the package, run every checker, print one verdict.

    python scripts/submit.py --describe my_system.yaml                       # a YAML to fill in
    python scripts/submit.py --config configs/mini_cpu.yaml --system my_system.yaml --out submission/
    python scripts/submit.py --logs runs/*/result_0.txt --system my_system.yaml --out submission/
    python scripts/submit.py --check submission/my_org                        # a finished package, of anyone

Runs go to OUT/runs/seed-N; one that is there and finished is not run again, so a stopped command goes on where it was. The
exit code is 0 if every check passed, 1 if one failed, 2 for bad input. The checkers work on a copy: results/ stays as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import guard  # noqa: F401

from bert_fast.claims import claimed
from bert_fast.command import guarded, whole
from bert_fast.config import as_plain
from bert_fast.config.load import load_config
from bert_fast.config.yaml_files import to_yaml
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import create_atomically, write_json
from bert_fast.mlperf.convergence import NUM_RUNS
from bert_fast.mlperf.rules import RULESET
from bert_fast.mlperf.score import read_events
from bert_fast.mlperf.submission import SUBMISSION, check_names, check_submission, lay_out
from bert_fast.mlperf.system import collect_system, complete_system, read_given_fields, template
from bert_fast.report.bench import markdown_table
from bert_fast.report.schema import read_record
from bert_fast.run_folder import CONFIG, PENDING_RECORD, RECORD, RESULT_LOG, RUN, clear_run
from programs import ROOT, pretrain

_SOURCES = (
    "bert_fast",
    "configs",
    "scripts",
    "slurm",
    "run_pretraining.py",
    "pyproject.toml",
    "constraints.txt",
    "LICENSE",
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="run this config with ten seeds, one after the other")
    what.add_argument("--logs", nargs="+", metavar="PATH", help="finished logs, or folders with result_*.txt in them")
    what.add_argument("--check", metavar="ORG_FOLDER", help="only check a package")
    what.add_argument("--describe", metavar="FILE", help="write what this machine says of itself as a YAML to fill in")
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.field=value", help="of the config (--config)")
    add("--system", metavar="FILE", help="the system description's YAML")
    add("--out", metavar="FOLDER", default="submission", help="gets the organization's folder (default %(default)s)")
    add("--runs", type=whole(1, 10**6), default=NUM_RUNS, help="how many seeds (default %(default)s)")
    add("--first-seed", type=whole(0, 2**63 - 1), default=0, help="default %(default)s")
    add("--ruleset", default=RULESET, help="default %(default)s, the last that admits BERT")
    add("--name", help="name of the system's folder (default: from system_name)")
    add("--json", metavar="FILE", help="write the metrics and the table there")
    return parser


def run_seeds(args: argparse.Namespace, out: Path) -> list[Path]:
    """Run what is missing of the seeds. Raises UserError if a run breaks; finished ones are kept."""
    load_config(args.config, args.overrides)  # a bad one is found at once
    logs = []
    for seed in range(args.first_seed, args.first_seed + args.runs):
        folder = out / "runs" / f"seed-{seed}"
        overrides = [*args.overrides, f"run.folder={folder}", f"train.seed={seed}"]
        wanted = to_yaml(as_plain(load_config(args.config, overrides)))
        if (folder / RECORD).is_file():
            if (folder / CONFIG).read_text(encoding="utf-8") != wanted:
                raise UserError(f"{folder} holds a run of another config; choose another --out, or remove it")
        else:
            print(f"seed {seed}: running", flush=True)
            if not (folder / PENDING_RECORD).is_file():  # of a run that was stopped: it has no time
                with claimed(folder, RUN):
                    clear_run(folder)
            pretrain(args.config, [*args.overrides, f"train.seed={seed}"], folder, f"seed {seed}")
        logs.append(folder / RESULT_LOG)
        metrics = read_record(folder / RECORD).metrics
        reached = "" if metrics.target_reached else ", target not reached"
        print(f"seed {seed}: {metrics.time_to_train_s:.1f} s, {metrics.samples_to_target:,} samples{reached}")
    return logs


def collect(paths: list[str]) -> list[Path]:
    """Logs in the order given; those of a folder by number."""
    logs: list[Path] = []
    for path in map(Path, paths):
        inner = sorted(path.glob("result_*.txt"), key=_number) if path.is_dir() else [path]
        if not inner or not all(each.is_file() for each in inner):
            raise UserError(f"{path}: no result log there")
        logs += inner
    return logs


def _number(path: Path) -> int:
    digits = re.search(r"\d+", path.stem)
    return int(digits.group()) if digits else 0


def facts_of(log: Path) -> dict[str, Any]:
    """Organization, platform, division and number of nodes, as the log says them."""
    values = {event["key"]: event["value"] for event in read_events(log)}
    missing = [key for key in ("submission_division", "submission_org", "submission_platform") if key not in values]
    if missing:
        raise UserError(f"{log}: the log has no {missing[0]}")
    return values


def sources() -> list[Path]:
    """Files of this project that a reader needs to repeat the runs."""
    kept = []
    for name in _SOURCES:
        path = ROOT / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        kept += [file for file in files if file.is_file() and "__pycache__" not in file.parts]
    return kept


def notes(args: argparse.Namespace, logs: list[Path]) -> str:
    command = f"--config {args.config} {' '.join(args.overrides)}".strip() if args.config else "(collected logs)"
    lines = [f"{n}. seed {facts_of(log).get('seed', 'unknown')}" for n, log in enumerate(logs)]
    return (
        "# bert_fast\n\nHow these results were made: install with the pinned versions (`constraints.txt`), then\n\n"
        f"    python scripts/submit.py {command}\n\nResults, in the order of their numbers:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _names(args: argparse.Namespace, description: dict[str, str]) -> tuple[str, str]:
    """Folder names of organization and system."""
    system = args.name or re.sub(r"[^A-Za-z0-9._+-]+", "_", description["system_name"])
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", description["submitter"]), system


def build(args: argparse.Namespace) -> Path:
    """Run or collect, and lay the package out. Returns the organization's folder."""
    if not args.system:
        raise UserError("--system FILE is missing; make one with --describe FILE and fill it in")
    given, out = read_given_fields(args.system), Path(args.out)
    collected = collect_system()
    if args.config:  # what would fail at the end is found before hours of runs
        config = load_config(args.config, args.overrides)
        first = complete_system(collected, given, config.mlperf.division, 1)
        check_names(*_names(args, first))
        if args.runs != NUM_RUNS:
            raise UserError(f"--runs {args.runs}: a package has {NUM_RUNS} results")
    with claimed(out, SUBMISSION):
        return _build(args, out, given, collected)


def _build(args: argparse.Namespace, out: Path, given: dict[str, Any], collected: dict[str, Any]) -> Path:
    logs = run_seeds(args, out) if args.config else collect(args.logs)
    facts = facts_of(logs[0])
    nodes = int(facts.get("number_of_nodes", 1))
    description = complete_system(collected, given, facts["submission_division"], nodes)
    organization, system = _names(args, description)
    return lay_out(
        logs,
        out,
        organization=organization,
        system=system,
        description=description,
        sources=sources(),
        root=ROOT,
        notes=notes(args, logs),
    )


@guarded
def main() -> int:
    args = build_parser().parse_intermixed_args()
    try:
        if args.describe:
            try:
                create_atomically(args.describe, template(collect_system()))
            except FileExistsError:
                raise UserError(f"{args.describe} is there already; choose another name") from None
            except OSError as error:
                raise UserError(f"cannot write {args.describe}: {error.strerror}; choose another name") from None
            print(f"{args.describe}: fill in what is empty")
            return 0
        package = Path(args.check) if args.check else build(args)
        rows, metrics = check_submission(package, args.ruleset)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return ExitCode.INTERRUPTED
    for row in rows:
        if row.passed is False:
            print(f"FAILED {row.check}: {row.detail}")
    print(markdown_table(("check", "verdict"), [(row.check, row.word) for row in rows]))
    for row in rows:
        if row.passed and row.detail and ("score" in row.check or "samples to converge" in row.check):
            print(f"{row.check}: {row.detail}")
    passed = bool(metrics["package_passed"])
    print(f"{package}: {'every check passed' if passed else 'not to be submitted as it is'}")
    if args.json:
        write_json(args.json, {"metrics": metrics, "rows": [[row.check, row.word, row.detail] for row in rows]})
    return ExitCode.OK if passed else ExitCode.TARGET_MISSED


if __name__ == "__main__":
    sys.exit(main())
