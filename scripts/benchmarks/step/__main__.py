#!/usr/bin/env python3
"""One rank's training step against peers on the same machine: tokens/s, model-FLOPs utilisation, peak memory, breakdown.

    python -m scripts.benchmarks.step --size base --json results/step/base.json --out results/step
    python -m scripts.benchmarks.step --size mini --variants all --json results/step/mini.json     # what each choice bought
    python -m scripts.benchmarks.step --size large --device cuda --precision bf16                   # on a GPU

Every variant gets the same samples, dropout, optimizer and clipping, and runs in a process of its own (an allocator setting
cannot be taken back). The variants run in turn, for several rounds; the results are medians, and ratios are of the same round.
MFU counts the FLOPs that the mathematics needs for the real tokens, over the best matmul measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import scripts.guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_atomically
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result

from ...plots import svg_figure
from .setting import add_setting
from .variants import PEERS, VARIANTS

METRICS = ("tokens_per_s", "samples_per_s", "mfu", "peak_mib", "step_s")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    add = parser.add_argument
    add("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"], help="default both")
    add("--variants", nargs="+", default=list(PEERS), metavar="NAME", help=f"of {', '.join(VARIANTS)}; or all")
    add("--rounds", type=whole(1, 10**6), default=3, help="default %(default)s")
    add("--warmup", type=whole(0, 10**6), default=1, help="steps before those that count (default %(default)s)")
    add("--steps", type=whole(1, 10**6), default=2, help="steps of a variant in a round (default %(default)s)")
    add("--out", metavar="FOLDER", help="write the table and the picture there")
    add("--child", nargs=2, metavar=("WHAT", "PRECISION"), help=argparse.SUPPRESS)
    add_arguments(parser)
    return parser


def child(args: argparse.Namespace) -> dict[str, float]:
    """What a process of one variant prints."""
    what, precision = args.child
    if what == "data":
        from .measure import data_seconds

        return {"data_s": data_seconds(args, precision)}
    if what == "breakdown":
        from .breakdown import profile

        return profile(args, precision)[0]
    from .measure import measure

    return measure(args, what, precision)


def run_child(args: argparse.Namespace, what: str, precision: str) -> dict[str, float]:
    """One process. Raises RuntimeError with its last words."""
    command = [sys.executable, "-m", "scripts.benchmarks.step", "--child", what, precision]
    command += ["--warmup", str(args.warmup), "--steps", str(args.steps)]
    for name in ("size", "mix", "batch", "layers", "dropout", "threads", "device"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what}, {precision}: {done.stderr.strip()[-400:]}")
    metrics: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return metrics


def draw(metrics: dict[str, float], args: argparse.Namespace, path: Path) -> None:
    """Tokens/s of every variant, and the breakdown of our step, as SVG."""
    with svg_figure(path, (10, 0.5 * len(args.variants) + 2.2), columns=2) as axes:
        left, right = axes[0]
        for offset, precision in enumerate(args.precision):
            rates = [metrics[f"{args.size}/{precision}/{name}/tokens_per_s"] for name in args.variants]
            left.barh([n + 0.38 * offset for n in range(len(rates))], rates, height=0.36, label=precision)
        left.set(yticks=range(len(args.variants)), yticklabels=args.variants, xlabel="real tokens/s")
        left.invert_yaxis()
        left.legend()
        for row, precision in enumerate(args.precision):
            at = 0.0
            prefix = f"{args.size}/{precision}/breakdown/"
            for number, name in enumerate(n for n in metrics if n.startswith(prefix)):
                share, label = metrics[name], name.removeprefix(prefix)
                right.barh(row, share, left=at, color=f"C{number}", label=label if row == 0 else None)
                at += share
        right.set(
            yticks=range(len(args.precision)), yticklabels=args.precision, xlabel="share of our step", xlim=(0, 1)
        )
        right.legend(fontsize=7)


@guarded
def main() -> int:
    args = build_parser().parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return 0
    if args.variants == ["all"]:
        args.variants = list(VARIANTS)
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown:
        print(f"error: no variant {unknown[0]}; known: {', '.join(VARIANTS)}", file=sys.stderr)
        return ExitCode.USER_ERROR
    if args.quick:
        args.rounds, args.steps, args.layers, args.batch = 1, 1, 1, 4
    machine = environment()
    samples: dict[str, list[float]] = {}
    try:
        for number in range(args.rounds):
            for precision in args.precision:
                for name in args.variants:
                    measured = run_child(args, name, precision)
                    for metric in METRICS:
                        samples.setdefault(f"{args.size}/{precision}/{name}/{metric}", []).append(measured[metric])
                    samples.setdefault(f"ceiling_tflops/{precision}", []).append(measured["ceiling_tflops"])
                    print(
                        f"round {number + 1}: {precision} {name}: {measured['tokens_per_s']:,.0f} tokens/s", flush=True
                    )
        metrics = {name: statistics.median(values) for name, values in samples.items()}
        for precision in args.precision:
            if "ours" in args.variants:
                data = run_child(args, "data", precision)["data_s"]
                metrics[f"{args.size}/{precision}/data_share"] = data / metrics[f"{args.size}/{precision}/ours/step_s"]
                for part, share in run_child(args, "breakdown", precision).items():
                    metrics[f"{args.size}/{precision}/breakdown/{part}"] = share
    except RuntimeError as error:
        print(f"error: variant {error}", file=sys.stderr)
        return ExitCode.TRAINING_ERROR
    if "ours" in args.variants:
        metrics["data_share"] = max(metrics[f"{args.size}/{precision}/data_share"] for precision in args.precision)
    add_ratios(metrics, samples, args)
    table = tabulate(metrics, args)
    print(table)
    if args.out:
        write_atomically(Path(args.out) / f"{args.size}-{args.mix}.md", table + "\n")
        draw(metrics, args, Path(args.out) / f"{args.size}-{args.mix}.svg")
    if args.json:
        write_result(
            args.json, metrics, {key: value for key, value in vars(args).items() if key != "child"}, machine, samples
        )
    return 0


def add_ratios(metrics: dict[str, float], samples: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Ours over each variant: tokens/s of the same round, and memory; and our bf16 over transformers' fp32 default."""

    def ratio(ours: str, theirs: str) -> float:
        pairs = zip(samples[ours], samples[theirs], strict=True)
        return statistics.median(a / b for a, b in pairs)

    for precision in args.precision if "ours" in args.variants else ():
        own = f"{args.size}/{precision}/ours"
        for name in args.variants:
            if name != "ours":
                theirs = f"{args.size}/{precision}/{name}"
                metrics[f"ratio/{args.size}/{precision}/ours_over_{name}"] = ratio(
                    f"{own}/tokens_per_s", f"{theirs}/tokens_per_s"
                )
                metrics[f"ratio/{args.size}/{precision}/memory_over_{name}"] = ratio(
                    f"{own}/peak_mib", f"{theirs}/peak_mib"
                )
    if {"fp32", "bf16"} <= set(args.precision) and {"ours", "hf_default"} <= set(args.variants):
        metrics[f"ratio/{args.size}/ours_bf16_over_hf_default_fp32"] = ratio(
            f"{args.size}/bf16/ours/tokens_per_s", f"{args.size}/fp32/hf_default/tokens_per_s"
        )


def tabulate(metrics: dict[str, float], args: argparse.Namespace) -> str:
    rows = []
    for precision in args.precision:
        for name in args.variants:
            prefix = f"{args.size}/{precision}/{name}"
            speed, memory = (
                metrics.get(f"ratio/{args.size}/{precision}/{what}_over_{name}") for what in ("ours", "memory")
            )
            rows.append(
                (
                    f"{precision} {name}",
                    f"{metrics[f'{prefix}/tokens_per_s']:,.0f}",
                    f"{metrics[f'{prefix}/samples_per_s']:,.2f}",
                    f"{100 * metrics[f'{prefix}/mfu']:.1f} %",
                    f"{metrics[f'{prefix}/peak_mib']:,.0f}",
                    "-" if speed is None else f"{speed:.2f}",
                    "-" if memory is None else f"{100 * memory:.0f} %",
                )
            )
    headers = ("variant", "tokens/s", "samples/s", "MFU", "peak MiB", "ours is faster by", "our memory of its")
    lines = [markdown_table(headers, rows), ""]
    for precision in args.precision:
        lines.append(f"matmul ceiling in {precision}: {metrics[f'ceiling_tflops/{precision}']:.3f} TFLOP/s")
        parts = [
            (name.rpartition("/")[2], share) for name, share in metrics.items() if f"{precision}/breakdown/" in name
        ]
        if parts:
            lines.append("our step: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in parts))
            lines.append(f"data path: {100 * metrics[f'{args.size}/{precision}/data_share']:.2f} % of the step")
    both = metrics.get(f"ratio/{args.size}/ours_bf16_over_hf_default_fp32")
    if both:
        lines.append(f"our bf16 over transformers' fp32 default: {both:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
