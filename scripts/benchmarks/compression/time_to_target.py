#!/usr/bin/env python3
"""Time to the mini benchmark's target over slow links by wire format: steps to the target times the step that is measured.

    sudo python -m scripts.benchmarks.compression.time_to_target --json results/compression/time_to_target.json

Two hosts made of network namespaces train configs/mini_cpu.yaml for some steps in every format over every link, and the
median step without the first ones counts; formats take turns. Of a format with exact steps both kinds are measured, and as
many of each count as its runs had. `zero_one_adam`, whose steps are of three kinds, is left out. The steps to the target are
those of --runs, which scripts.benchmarks.compression.learning has made without a limited link: what a format learns does not
depend on the link. So a format that sends less and learns slower shows both. Needs root and iproute2.

Metrics: LINK/FORMAT/{step_ms,exact_step_ms,time_to_target_s,over_bf16}.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import scripts.guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.errors import UserError
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result
from bert_fast.report.metrics import of_kind, read_metrics
from bert_fast.report.schema import StepLine
from scripts.programs import ROOT

from ..overlap.__main__ import LINKS
from ..overlap.hosts import hosts, start_on
from .learning import BASELINE, CONFIG, EXACT_STEPS, FORMATS, add_runs_argument, has_exact_steps, metrics_of, read_runs

_SKIPPED = 4  # log intervals before the first that counts
_EVERY = 5  # steps of an interval
_GLOBAL_BATCH = 64
_TARGET = 0.30
_LONGEST_S = 600


def step_ms(link: str, name: str, steps: int, exact: bool = False) -> list[float]:
    """Milliseconds of a step of a format over a link, by log interval; of its exact steps, or of those afterwards.

    Raises:
        UserError: the run failed.
    """
    overrides = [
        *FORMATS[name], f"train.max_steps={steps}", f"train.log_every_steps={_EVERY}", "system.ranks_per_node=1",
        "evaluation.every_samples=1000000", "evaluation.target_accuracy=null", "run.tensorboard=false",
        "run.measure_peak_flops=false", "system.bind_cores=false", "system.threads_per_rank=1",
    ]  # fmt: skip
    if has_exact_steps(name):
        overrides.append(f"communication.exact_steps={steps - 1 if exact else _EVERY}")
    with tempfile.TemporaryDirectory() as scratch, hosts(2, LINKS[link]) as names:
        folder = Path(scratch) / "run"
        program = [
            sys.executable,
            str(ROOT / "run_pretraining.py"),
            "--config",
            CONFIG,
            *overrides,
            f"run.folder={folder}",
        ]
        processes = start_on(names, program)
        try:
            outputs = [process.communicate(timeout=_LONGEST_S)[0] for process in processes]
        except subprocess.TimeoutExpired:
            raise UserError(f"{name} over {link}: no end after {_LONGEST_S} s") from None
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, outputs, strict=True):
            if process.returncode:
                said = output.strip().splitlines() or ["it said nothing"]
                raise UserError(f"{name} over {link}: exit code {process.returncode}: {said[-1]}")
        lines = of_kind(read_metrics(folder), StepLine)
    return [1e3 * _GLOBAL_BATCH / line.samples_per_s for line in lines[_SKIPPED:]]


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", default=["50mbit", "200mbit", "1gbit"], choices=LINKS, help="default all")
    parser.add_argument(
        "--formats", nargs="+", choices=list(FORMATS), metavar="FORMAT", help="default: those of --runs"
    )
    parser.add_argument("--steps", type=whole(30, 10**6), default=80, help="of a run (default %(default)s)")
    add_runs_argument(parser)
    add_arguments(parser)
    args = parser.parse_args()
    if os.geteuid() != 0:
        raise UserError("network namespaces need root; run with sudo")
    if args.quick:
        args.links, args.steps = ["1gbit"], 40
    learned = metrics_of(read_runs(args.runs), _TARGET)
    names = args.formats or [name for name in FORMATS if f"samples_to_target/{name}/mean" in learned]
    names = [name for name in names if name != "zero_one_adam"]
    machine = environment()
    metrics: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    for link in args.links:
        rows = []
        for name in names:
            samples[f"{link}/{name}"] = step_ms(link, name, args.steps)
            exact = samples[f"{link}/{name}/exact"] = (
                step_ms(link, name, args.steps, True) if has_exact_steps(name) else []
            )
            values = _values(samples[f"{link}/{name}"], exact, learned.get(f"samples_to_target/{name}/mean"))
            metrics |= {f"{link}/{name}/{key}": value for key, value in values.items()}
        for name in names:
            key = f"{link}/{name}"
            baseline = metrics.get(f"{link}/{BASELINE}/time_to_target_s")
            if baseline and f"{key}/time_to_target_s" in metrics:
                metrics[f"{key}/over_{BASELINE}"] = metrics[f"{key}/time_to_target_s"] / baseline
            rows.append((
                name, f"{metrics[f'{key}/step_ms']:,.1f}", _cell(learned, f"samples_to_target/{name}/mean", ",.0f"),
                _cell(metrics, f"{key}/time_to_target_s", ",.0f"), _cell(metrics, f"{key}/over_{BASELINE}", ".2f"),
            ))  # fmt: skip
        print(f"### {link}\n")
        print(
            markdown_table(("format", "step ms", "samples to target", "time to target s", f"over {BASELINE}"), rows)
            + "\n"
        )
    if args.json:
        write_result(args.json, metrics, {"config": CONFIG, "steps": args.steps, "links": args.links}, machine, samples)
    return 0


def _values(measured: list[float], exact: list[float], samples: float | None) -> dict[str, float]:
    values = {"step_ms": statistics.median(measured)}
    num_exact = EXACT_STEPS if exact else 0
    if exact:
        values["exact_step_ms"] = statistics.median(exact)
    if samples is not None:
        others = samples / _GLOBAL_BATCH - num_exact
        values["time_to_target_s"] = (num_exact * values.get("exact_step_ms", 0.0) + others * values["step_ms"]) / 1e3
    return values


def _cell(values: dict[str, Any], name: str, form: str) -> str:
    return format(values[name], form) if name in values else "-"


if __name__ == "__main__":
    sys.exit(main())
