#!/usr/bin/env python3
"""The contrastive loss beside other people's: time and memory of loss and gradients, and operations.

    python -m scripts.benchmarks.contrastive --json results/contrastive/loss.json

Memory is that of a process of its own: the growth of resident memory (of torch's allocations on a GPU) beyond inputs and their
gradients. Times are medians of calls in one process, the losses in turn. What would need more memory than `--limit-gib` by
its own arithmetic is left out and said, and so are rivals that are not installed (rivals.py has the commands).

Metrics: loss_ms/B/d/IMPLEMENTATION, cpu_ms/B/d/IMPLEMENTATION, extra_mib/B/d/IMPLEMENTATION, ratio_openclip_over_ours/B,
ratio_linear_cross_entropy_over_ours/B, flops_over_B2d, extra_mib_per_pair (slope over batches) and extra_mib_deviation from it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from typing import Any

import scripts.guard  # noqa: F401

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bert_fast.command import guarded, whole
from bert_fast.contrastive.loss import ContrastiveLoss
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result
from scripts.programs import ROOT

from .rivals import RIVALS
from .worker import embeddings

_GIB, _MIB = 2**30, 2**20
# fp32 matrices [B, B] that are alive at once
_MATRICES = {"full_logits": 4, "open_clip": 4}
_PACKAGES = {"open_clip": "open_clip", "sentence_transformers": "sentence_transformers"}


def run(rivals: list[str], pairs: int, width: int, args: argparse.Namespace) -> dict[str, Any]:
    """A process of its own (worker.py)."""
    task = {
        "rivals": rivals, "pairs": pairs, "width": width, "threads": args.threads, "rounds": args.rounds, "device": args.device
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.contrastive.worker"], input=json.dumps(task), capture_output=True,
        text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise UserError(f"{', '.join(rivals)} with {pairs:,} pairs: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def is_wanted(rival: str, pairs: int, limit_gib: float) -> bool:
    """Whether it is installed and fits; says so where not."""
    package = _PACKAGES.get(rival)
    if package and importlib.util.find_spec(package) is None:
        print(f"{rival}: not installed, left out")
        return False
    gib = _MATRICES.get(rival, 0) * 4 * pairs**2 / _GIB
    if gib > limit_gib:
        print(f"{rival} with {pairs:,} pairs: {gib:,.0f} GiB of scores, left out")
        return False
    return True


class _Products(TorchDispatchMode):
    """Counts operations of matrix products, a multiply-add as two."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def operations() -> float:
    """Operations of loss and gradients over B^2 d."""
    pairs, width = 512, 64
    queries, keys = (x.requires_grad_() for x in embeddings(pairs, width, "cpu"))
    with _Products() as counter:
        ContrastiveLoss(tile=(128, 128))(queries, keys).backward()
    return counter.operations / (pairs**2 * width)


def largest_deviation(pairs: list[int], bytes_by_pairs: list[float]) -> tuple[float, float]:
    """Slope of a line through the memory of several batches, and the largest deviation from it as a share of the largest."""
    slope, offset = np.polyfit(pairs, bytes_by_pairs, 1)
    off = np.abs(np.array(bytes_by_pairs) - (slope * np.array(pairs) + offset))
    return float(slope), float(off.max() / max(bytes_by_pairs))


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--pairs", type=whole(2, 2**24), nargs="*", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--widths", type=whole(1, 65536), nargs="*", default=[384, 768])
    parser.add_argument("--rounds", type=whole(1, 1000), default=3, help="calls of each loss, in turn (default 3)")
    parser.add_argument("--threads", type=whole(1, 1024), default=2, help="of a process (default 2)")
    parser.add_argument("--losses", nargs="*", choices=RIVALS, default=[name for name in RIVALS if name != "ours_bf16"])
    parser.add_argument(
        "--limit-gib", type=whole(1, 65536), default=12, help="scores that may be in memory (default 12)"
    )
    parser.add_argument(
        "--most-pairs-of-rivals", type=whole(2, 2**24), default=32768, help="larger batches are ours alone"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.widths, args.rounds = [1024, 2048], [384], 1
    metrics: dict[str, float] = {"flops_over_B2d": operations()}
    samples: dict[str, Any] = {}
    for width in args.widths:
        for pairs in args.pairs:
            losses = [
                name for name in args.losses
                if is_wanted(name, pairs, args.limit_gib) and (name.startswith("ours") or pairs <= args.most_pairs_timed)
            ]  # fmt: skip
            for name in losses:
                metrics[f"extra_mib/{pairs}/{width}/{name}"] = run([name], pairs, width, args)["extra_bytes"] / _MIB
            if pairs > args.most_pairs_timed or len(losses) < 2:
                continue
            found = run(losses, pairs, width, args)
            for name, calls in found.items():
                key = f"{pairs}/{width}/{name}"
                metrics[f"loss_ms/{key}"] = 1e3 * statistics.median(each["wall_s"] for each in calls)
                metrics[f"cpu_ms/{key}"] = 1e3 * statistics.median(each["cpu_s"] for each in calls)
                samples[key] = calls
                print(
                    f"{key}: {metrics[f'loss_ms/{key}']:,.0f} ms, {metrics[f'cpu_ms/{key}']:,.0f} ms of CPU, "
                    f"{metrics[f'extra_mib/{key}']:,.0f} MiB, loss {calls[0]['loss']:.6f}", flush=True,
                )  # fmt: skip
            for rival, name in (("open_clip", "openclip"), ("linear_cross_entropy", "linear_cross_entropy")):
                if rival in found and "ours" in found and width == max(args.widths):
                    ratios = [
                        theirs["wall_s"] / mine["wall_s"]
                        for theirs, mine in zip(found[rival], found["ours"], strict=True)
                    ]
                    metrics[f"ratio_{name}_over_ours/{pairs}"] = statistics.median(ratios)
    width = max(args.widths)
    if len(args.pairs) > 2 and "ours" in args.losses:
        taken = [metrics[f"extra_mib/{pairs}/{width}/ours"] for pairs in args.pairs]
        metrics["extra_mib_per_pair"], metrics["extra_mib_deviation"] = largest_deviation(args.pairs, taken)
    print(markdown_table(["metric", "value"], [[name, f"{value:.4g}"] for name, value in metrics.items()]))
    if args.json:
        described = {name: value for name, value in vars(args).items() if name != "json"}
        write_result(args.json, metrics, {**described, "torch": torch.__version__}, environment(), samples)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
