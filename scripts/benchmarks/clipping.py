#!/usr/bin/env python3
"""Loss curves of clipping modes side by side: the same config, seeds and number of steps, modes in turn.

    python -m scripts.benchmarks.clipping --config configs/mini_cpu.yaml --seeds 5 --out results/overlap/clipping

Writes clipping.json (metrics by name, curves of every run), clipping.md (a table) and clipping.svg.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import scripts.guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.config.choices import CLIP_MODES
from bert_fast.files import write_atomically
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result
from bert_fast.report.metrics import read_metrics

from ..plots import svg_figure
from ..programs import pretrain

COLOURS = {"bucket_before_reduce": "#e6550d", "global_before_reduce": "#3182bd", "none": "#969696"}


def curves_of(folder: Path) -> dict[str, Any]:
    """Loss by step, accuracy by samples, and what share of the clip groups' norms was clipped."""
    rows = [line.as_json() for line in read_metrics(folder)]
    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] == "eval"]
    clipped = [group["clipped_share"] for row in steps for group in row["clip"].values()]
    return {
        "step": [row["step"] for row in steps],
        "loss": [round(row["loss"], 5) for row in steps],
        "samples": [row["samples"] for row in evaluations],
        "accuracy": [round(row["accuracy"], 5) for row in evaluations],
        "clipped_share": statistics.fmean(clipped) if clipped else 0.0,
    }


def draw(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Thin lines are seeds, the thick one their mean."""
    with svg_figure(path, (11, 4), columns=2) as axes:
        left, right = axes[0]
        for mode, curves in runs.items():
            colour = COLOURS.get(mode, "#31a354")
            for axis, x, y in ((left, "step", "loss"), (right, "samples", "accuracy")):
                for curve in curves:
                    axis.plot(curve[x], curve[y], color=colour, lw=0.5, alpha=0.5)
                mean = [statistics.fmean(values) for values in zip(*(curve[y] for curve in curves), strict=True)]
                axis.plot(curves[0][x], mean, color=colour, lw=2, label=mode)
        left.set(xlabel="step", ylabel="training loss")
        right.set(xlabel="samples", ylabel="masked-LM accuracy")
        left.legend(fontsize=8)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/mini_cpu.yaml", help="default %(default)s")
    parser.add_argument("--seeds", type=whole(1, 10**6), default=5, help="default %(default)s")
    parser.add_argument("--steps", type=whole(1, 10**9), default=750, help="of every run (default %(default)s)")
    default = ["bucket_before_reduce", "global_before_reduce"]
    parser.add_argument(
        "--modes", nargs="+", default=default, choices=CLIP_MODES, help="default: both that clip before"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    add_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps = 1, 60
    machine = environment()
    common = [
        f"train.max_steps={args.steps}",
        "evaluation.target_accuracy=null",
        "mlperf.enabled=false",
        "run.tensorboard=false",
        *args.overrides,
    ]
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in args.modes}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(1, args.seeds + 1):
            for mode in args.modes:
                folder = Path(scratch) / f"{mode}-{seed}"
                overrides = [*common, f"communication.clip={mode}", f"train.seed={seed}"]
                pretrain(args.config, overrides, folder, f"seed {seed} with {mode}")
                runs[mode].append(curves_of(folder))
                last = runs[mode][-1]
                print(f"seed {seed}, {mode}: loss {last['loss'][-1]:.4f}, accuracy {last['accuracy'][-1:]}", flush=True)
    metrics: dict[str, float] = {}
    rows = []
    for mode, curves in runs.items():
        losses = [statistics.fmean(curve["loss"][-5:]) for curve in curves]
        accuracies = [curve["accuracy"][-1] if curve["accuracy"] else float("nan") for curve in curves]
        metrics |= {
            f"{mode}/final_loss": statistics.fmean(losses),
            f"{mode}/final_accuracy": statistics.fmean(accuracies),
            f"{mode}/clipped_share": statistics.fmean(curve["clipped_share"] for curve in curves),
        }
        spread = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in (losses, accuracies)]
        rows.append(
            (
                mode,
                f"{metrics[f'{mode}/final_loss']:.4f} ± {spread[0]:.4f}",
                f"{metrics[f'{mode}/final_accuracy']:.4f} ± {spread[1]:.4f}",
                f"{100 * metrics[f'{mode}/clipped_share']:.0f} %",
            )
        )
    if len(args.modes) == 2:
        first, second = (runs[mode] for mode in args.modes)
        paired = [
            statistics.fmean(a["loss"][-5:]) - statistics.fmean(b["loss"][-5:])
            for a, b in zip(first, second, strict=True)
        ]
        metrics["paired_loss_difference"] = statistics.fmean(paired)
    text = markdown_table(("clipping", "loss of the last lines", "last accuracy", "norms clipped"), rows)
    print("\n" + text)
    out = Path(args.out)
    write_atomically(out / "clipping.md", text + "\n")
    draw(out / "clipping.svg", runs)
    config = {"config": args.config, "seeds": args.seeds, "steps": args.steps, "overrides": common}
    write_result(args.json or out / "clipping.json", metrics, config, machine, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
