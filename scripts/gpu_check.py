#!/usr/bin/env python3
"""What works on this machine's GPU, and how fast: run this first on a new machine. Nine minutes, no network needed.

    python scripts/gpu_check.py --out results/gpu/NAME                  # everything, most important first
    python scripts/gpu_check.py --only environment,run --out /tmp/check
    python scripts/gpu_check.py --out results/gpu/NAME --resume         # what failed or found no time, again
    python scripts/gpu_check.py --device cpu --out /tmp/check           # a tiny form of every stage, without a GPU
    python scripts/gpu_check.py --out results/gpu/NAME --markdown docs/gpu.md   # no run: the records as a table

Every stage is a process of its own with a time limit: a crash or a hang costs that stage only. FOLDER holds NAME.json and
NAME.log of every stage, and gpu_check.json, which is written again after every stage. Exit code 1 if a stage failed, 2 for
wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import guard  # noqa: F401

from bert_fast.claims import Kind, claimed
from bert_fast.command import guarded, positive
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_atomically, write_json
from bert_fast.report.bench import environment, markdown_table
from gpu.stage import (
    FAILED,
    NO_TIME,
    PASSED,
    UNAVAILABLE,
    Context,
    Stage,
    run_in_process,
)

ROOT = Path(__file__).resolve().parents[1]

# In order of value: what comes first decides whether training works at all.
STAGES: dict[str, Stage] = {
    "environment": Stage("gpu.machine", 35, "versions, card, driver; peaks of matmul, memory and launches"),
    "run": Stage(
        "gpu.training",
        100,
        "the mini benchmark to its target, checked log, stop and resume with the same losses",
    ),
    "tests": Stage("gpu.tests", 90, "the tests marked gpu"),
    "attention": Stage("gpu.attention", 45, "every attention backend against a loop in fp64; time and memory of each"),
    "synchronization": Stage(
        "gpu.synchronization", 45, "no host synchronization in a step: engines, optimizers, loss scale"
    ),
    "step_large": Stage(
        "gpu.step", 110, "BERT-large's step against transformers: rates, MFU, memory", {"size": "large"}
    ),
    "overlap": Stage("gpu.overlap", 60, "communication hidden behind the real backward, on a modelled link"),
    "memory": Stage("gpu.memory", 70, "switches that save memory: equal losses, predicted and measured peaks"),
    "step_base": Stage("gpu.step", 60, "BERT-base's step against transformers", {"size": "base"}),
    "profile": Stage("gpu.profile", 30, "kernels of the best step: trace.json and shares"),
    "optimizer": Stage("gpu.optimizers", 35, "updates alone, against the bytes they must move"),
    "two_ranks": Stage("gpu.two_ranks", 40, "two ranks on this device over gloo: equal weights, right gradients"),
    "checkpoint": Stage("gpu.checkpoints", 35, "a checkpoint beside training: stall and slow-down"),
    "energy": Stage("gpu.energy", 15, "joules per 1,000 sequences by NVML"),
}
FOLDER = Kind(
    "a GPU check",
    (
        *(f"{name}.{suffix}" for name in STAGES for suffix in ("json", "log")),
        "gpu_check.json",
        "trace.json",
        "top.md",
        "tests.xml",
        "run/*",
    ),
    "choose another --out",
)
GOALS = {  # of a run on a GPU
    "mfu/large/ours_best": ("at least", 0.55),
    "ratio/large/ours_over_hf_default": ("at least", 3.0),
    "ratio/large/ours_over_hf_best": ("at least", 1.5),
    "memory_estimate_error": ("at most", 0.05),
    "memory_prediction_error_max": ("at most", 0.05),
    "hidden_share_error": ("at most", 0.05),
}
_LEAST_S = 5.0  # a stage is not begun with less
CPU_LIMIT_FACTOR = 4
"""Times the limit that a stage has on a CPU: limits are of a GPU machine, and a CPU may be in use by others as well."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a tiny form of every stage (default %(default)s)",
    )
    add("--only", metavar="A,B", help="run these stages alone, in the order of --list")
    add("--skip", metavar="A,B", help="leave these stages out")
    add("--budget-s", type=positive, default=540.0, metavar="S", help="seconds for all stages (default %(default)g)")
    add("--list", action="store_true", help="name the stages and exit")
    add("--out", metavar="FOLDER", help="where records, logs and traces go (default results/gpu/last)")
    add("--json", metavar="FILE", help="where the whole record goes (default FOLDER/gpu_check.json)")
    add("--resume", action="store_true", help="leave out stages that FOLDER has as passed or not available")
    add("--markdown", metavar="FILE", help="write the records of FOLDER as a table into FILE, and run nothing")
    return parser


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of the stages to run. Raises UserError for a name that is none."""
    only = args.only.split(",") if args.only else list(STAGES)
    skip = args.skip.split(",") if args.skip else []
    for name in (*only, *skip):
        if name not in STAGES:
            raise UserError(f"no stage '{name}'; known: {', '.join(STAGES)}")
    return [name for name in STAGES if name in only and name not in skip]


def check_device(name: str) -> None:
    """Raises UserError where there is no such device."""
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"--device cuda: torch {torch.__version__} sees no CUDA device here; check nvidia-smi and that torch is a CUDA "
                "build, or use --device cpu for a tiny form of the stages"
            )


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """The record of every stage that a folder has, in the order of the stages."""
    records = {}
    for name in STAGES:
        path = folder / f"{name}.json"
        if path.is_file():
            try:
                records[name] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{path} is no record of a stage ({error}); remove it or choose another --out"
                ) from None
    return records


def run_stage(name: str, args: argparse.Namespace, out: Path, scratch: Path, seconds: float) -> dict[str, Any]:
    """Run one stage in a process of its own, for at most `seconds`. Its record, which is also in `out`."""
    stage = STAGES[name]
    own = stage.limit_s * (CPU_LIMIT_FACTOR if args.device == "cpu" else 1)
    limit = min(own, seconds)
    record = out / f"{name}.json"
    record.unlink(missing_ok=True)
    start = time.monotonic()
    context = Context(args.device, out, scratch, time.time() + limit, record=record)
    process = multiprocessing.get_context("forkserver").Process(
        target=run_in_process, args=(stage, context, out / f"{name}.log")
    )
    process.start()
    try:
        process.join(limit)
        killed = process.is_alive()
    finally:  # also where this script is interrupted
        if process.pid is not None:
            end_group(process.pid)
    process.join()
    try:
        result = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = {
            "status": FAILED,
            "why": "",
            "summary": "",
            "metrics": {},
            "details": {},
            "left_out": [],
            "failures": [],
        }
    if killed:
        cut = limit < own
        result["status"] = NO_TIME if cut and not result["failures"] else FAILED
        result["why"] = f"ended after {limit:.0f} s" + (" (--budget-s)" if cut else ", its limit")
    elif process.exitcode != 0:
        code = process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        result["status"], result["why"] = FAILED, f"its process ended with {how}; see {name}.log"
    result["seconds"] = round(time.monotonic() - start, 2)
    result["device"] = args.device
    write_json(record, result)
    return result


def end_group(leader: int) -> None:
    """End a stage's process and all that it has started."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # all have ended, or it did not come to having a group
        try:
            os.kill(leader, signal.SIGKILL)
        except ProcessLookupError:
            return


def summarize(records: dict[str, dict[str, Any]], args: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """The whole record: metrics of all stages by name, goals and whether they are met, the stages' own records."""
    metrics: dict[str, Any] = {}
    for name, record in records.items():
        metrics[f"stages/{name}/passed"] = record["status"] == PASSED
        metrics[f"stages/{name}/seconds"] = record.get("seconds")
        metrics |= record["metrics"]
    goals = {}
    for metric, (kind, value) in GOALS.items():
        if metric in metrics and args.device == "cuda":
            measured = metrics[metric]
            goals[metric] = {
                "measured": measured,
                kind: value,
                "met": measured >= value if kind == "at least" else abs(measured) <= value,
            }
    details = records.get("environment", {}).get("details", {})
    return {
        "metrics": metrics,
        "goals": goals,
        "config": {"device": args.device, "budget_s": args.budget_s},
        "environment": {**machine, **details},
        "stages": records,
    }


def outcome(record: dict[str, Any]) -> str:
    """Status of a stage and why, for the table."""
    text = record["status"] + (f": {record['why']}" if record.get("why") else "")
    return text if len(text) <= 100 else text[:97] + "..."


def table(records: dict[str, dict[str, Any]]) -> str:
    rows = [(name, outcome(r), f"{r.get('seconds', 0):.0f}", r.get("summary", "")) for name, r in records.items()]
    return markdown_table(("stage", "outcome", "s", "summary"), rows)


def markdown(whole: dict[str, Any]) -> str:
    """A record as a section of docs/gpu.md."""
    machine = whole["environment"]
    card = machine.get("card") or machine.get("cpu", "unknown device")
    lines = [f"### {card}", ""]
    lines.append(", ".join(f"{key} {machine[key]}" for key in ("torch", "cuda", "driver", "nccl") if machine.get(key)))
    lines += ["", table(whole["stages"]), ""]
    for metric, goal in whole["goals"].items():
        kind = "at least" if "at least" in goal else "at most"
        lines.append(
            f"- {metric}: {goal['measured']:.3f} ({kind} {goal[kind]:g}: {'met' if goal['met'] else 'not met'})"
        )
    missing = [f"- {name}: {each}" for name, record in whole["stages"].items() for each in record.get("left_out", [])]
    if missing:
        lines += ["", "Not run:", "", *missing]
    return "\n".join(lines).rstrip() + "\n"


BEGIN, END = "<!-- records: begin -->", "<!-- records: end -->"


def write_markdown(path: Path, section: str) -> None:
    """Put a record's section between the marks of a page, in place of what is there; a page without marks is made anew."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if BEGIN in old and END in old:
        section = old[: old.index(BEGIN)] + f"{BEGIN}\n\n{section}\n{END}" + old[old.index(END) + len(END) :]
    elif old:
        raise UserError(f"--markdown {path}: the file has no lines '{BEGIN}' and '{END}' to write between; add them")
    write_atomically(path, section)


def check(args: argparse.Namespace) -> int:
    if args.list:
        for name, stage in STAGES.items():
            print(f"{name:16} {stage.limit_s:4.0f} s  {stage.what}")
        return 0
    names = chosen(args)
    out = Path(args.out) if args.out else ROOT / "results" / "gpu" / "last"
    target = Path(args.json) if args.json else out / "gpu_check.json"
    if args.markdown:
        try:
            whole = json.loads(target.read_text(encoding="utf-8"))
            section = markdown(whole)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--markdown: {target} is no record of this script ({error}); run it first") from None
        write_markdown(Path(args.markdown), section)
        return 0
    check_device(args.device)
    with claimed(out, FOLDER):
        return run_stages(args, names, out, target)


def run_stages(args: argparse.Namespace, names: list[str], out: Path, target: Path) -> int:
    """Run the stages one after the other into a folder that is ours. The exit code."""
    records = read_records(out)
    others = sorted({r.get("device", "?") for r in records.values()} - {args.device})
    if args.resume and others:
        raise UserError(f"--resume: {out} holds records of device {others[0]}, not {args.device}; choose another --out")
    if not args.resume:
        for name in set(records) & set(names):
            (out / f"{name}.json").unlink()
        records = {name: record for name, record in records.items() if name not in names and not others}
    end = time.monotonic() + args.budget_s
    machine = environment()
    scratch = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # the server of processes and what stages start find both
    # The server imports once what every stage needs, and each stage's process is forked from it. It never touches CUDA.
    multiprocessing.set_forkserver_preload(["bert_fast.train.setup.build", "gpu.stage", "benchmarks.step.variants"])
    try:
        for name in names:
            if args.resume and records.get(name, {}).get("status") in (PASSED, UNAVAILABLE):
                continue
            left = end - time.monotonic()
            if left < _LEAST_S:
                records[name] = {
                    "status": NO_TIME,
                    "why": "",
                    "summary": "",
                    "metrics": {},
                    "left_out": [],
                    "seconds": 0.0,
                }
                (out / f"{name}.json").unlink(missing_ok=True)
            else:
                print(f"{name} ...", flush=True)
                records[name] = run_stage(name, args, out, scratch, left)
                print(f"{name}: {outcome(records[name])} ({records[name]['seconds']:.0f} s)", flush=True)
            records = {each: records[each] for each in STAGES if each in records}
            write_json(target, summarize(records, args, machine))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    whole = summarize(records, args, machine)
    write_json(target, whole)
    print(f"\n{table(records)}")
    for metric, goal in whole["goals"].items():
        print(f"goal {metric}: {goal['measured']:.3f}, {'met' if goal['met'] else 'not met'}")
    print(f"record: {target}")
    failed = any(records[name]["status"] == FAILED for name in names if name in records)
    return ExitCode.TARGET_MISSED if failed else ExitCode.OK


@guarded
def main() -> int:
    return check(build_parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
