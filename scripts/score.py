#!/usr/bin/env python3
"""Score MLPerf BERT result logs, of anyone: time to train, samples, steps, time of a step, rate per accelerator, start-up.

    python scripts/score.py results/mini_cpu ORG/results/SYSTEM/bert --csv scores.csv --plot accuracy.svg

A folder holds result_*.txt of one system; with ORG/systems/SYSTEM.json beside, accelerators are counted from it.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import guard  # noqa: F401

from bert_fast.command import guarded
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_atomically
from bert_fast.foreign import shown
from bert_fast.mlperf.convergence import judge
from bert_fast.mlperf.rules import RULESET
from bert_fast.mlperf.score import SystemScore, score_folder
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result
from plots import svg_figure

COLUMNS = (
    "system",
    "division",
    "accelerators",
    "global batch",
    "runs",
    "converged",
    "minutes",
    "samples",
    "steps",
    "step ms",
    "samples/s/accelerator",
    "start-up s",
    "reference convergence",
    "samples read from",
)


def row_of(score: SystemScore, ruleset: str) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    first, step = score.runs[0], score.mean("step_s")
    return [
        score.name,
        first.division,
        number(score.accelerators, ","),
        number(score.global_batch_size, ","),
        str(len(score.runs)),
        str(sum(run.converged for run in score.runs)),
        number(score.scaled_minutes, ".4f"),
        number(score.mean("samples"), ",.0f"),
        number(score.mean("steps"), ",.0f"),
        number(None if step is None else 1e3 * step, ",.1f"),
        number(score.rate, ",.1f"),
        number(score.mean("startup_s"), ".2f"),
        convergence(score, ruleset),
        score.samples_keys,
    ]


def with_unique_names(scores: list[SystemScore], folders: list[str]) -> list[SystemScore]:
    """Two results of one system name are told apart by the folders above, as far as they differ."""
    names = [score.name for score in scores]
    for depth in range(1, 8):
        twice = {name for name in names if names.count(name) > 1}
        if not twice:
            break
        parts = [Path(folder).resolve().parts for folder in folders]
        names = [
            shown("/".join((*own[max(0, len(own) - 3 - depth) : -3], score.name))) if name in twice else name
            for name, own, score in zip(names, parts, scores, strict=True)
        ]
    return [replace(score, name=name) for score, name in zip(scores, names, strict=True)]


def convergence(score: SystemScore, ruleset: str) -> str:
    """Verdict of the reference convergence points: for open runs in brackets, as it does not bind them."""
    first, samples, batch = score.runs[0], score.samples_to_converge, score.global_batch_size
    if samples is None or batch is None:
        return "-"
    verdict = judge(samples, batch, ruleset)
    if verdict.samples is None:
        return "-"
    word = "passed" if verdict.passed else "too few samples" if verdict.point else "no reference"
    if verdict.scale != 1.0:
        word += f", x {verdict.scale:.5f}"
    return word if first.division == "closed" else f"({word})"


def draw(path: Path, scores: list[SystemScore]) -> None:
    """Accuracy against time: one line per run, one colour per system."""
    with svg_figure(path, (8, 5)) as axes:
        axis = axes[0, 0]
        for number, score in enumerate(scores):
            for index, run in enumerate(score.runs):
                points = [(e.time_s, e.accuracy) for e in run.evaluations if e.time_s > 0 and 0 <= e.accuracy <= 1]
                times, accuracies = zip(*points, strict=True) if points else ((), ())
                label = score.name.replace("$", r"\$")  # the dollar starts mathematics there
                axis.plot(times, accuracies, color=f"C{number}", lw=0.8, label=label if index == 0 else None)
        axis.set(xlabel="seconds after run_start", ylabel="masked-LM accuracy", xscale="log")
        axis.legend(fontsize=8)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="with result_*.txt of one system, or one log")
    parser.add_argument("--csv", metavar="FILE", help="write the table there")
    parser.add_argument("--plot", metavar="FILE", help="write accuracy against time there, as SVG")
    parser.add_argument("--ruleset", default=RULESET, help="whose reference convergence points (default %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()
    try:
        scores = with_unique_names([score_folder(folder) for folder in args.folders], args.folders)
        rows = [row_of(score, args.ruleset) for score in scores]
    except UserError as error:
        print(f"error: {shown(str(error), 1000)}", file=sys.stderr)
        return ExitCode.USER_ERROR
    print(markdown_table(COLUMNS, rows))
    if args.csv:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows(
            [COLUMNS, *([cell.replace(",", "") for cell in row] for row in rows)]
        )
        write_atomically(args.csv, out.getvalue())
    if args.plot:
        draw(Path(args.plot), scores)
    if args.json:
        metrics = {f"score_minutes/{score.name}": score.scaled_minutes for score in scores}
        samples = {score.name: [run.time_s for run in score.runs] for score in scores}
        write_result(args.json, metrics, {"folders": [shown(each) for each in args.folders]}, environment(), samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
