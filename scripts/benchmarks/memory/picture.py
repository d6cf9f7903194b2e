#!/usr/bin/env python3
"""Draw what is live over one step of BERT-large by way of recomputing, operation by operation, on fake tensors.

    python -m scripts.benchmarks.memory.picture --out results/memory/step.svg

Weights, their gradients (which stay) and the optimizer's state are left out: activations and temporaries alone, in bf16 at 56
samples of 512 tokens. The horizontal axis is the number of operations: a layer that runs again makes the step longer.
"""

from __future__ import annotations

import argparse
import sys

import scripts.guard  # noqa: F401

from bert_fast.command import guarded, whole
from scripts.plots import svg_figure

from .large import timeline

_GIB = 2**30
_POINTS = 1500  # of a line


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/memory/step.svg", metavar="FILE", help="default %(default)s")
    parser.add_argument("--layers", type=whole(1, 1024), default=24, help="of the encoder (default %(default)s)")
    args = parser.parse_args()
    with svg_figure(args.out, (7.5, 5.5), rows=2, sharex=True) as axes:
        for how, axis in (("none", 0), ("layer", 1), ("optimal", 1)):
            line = timeline(args.layers, how)
            every = max(1, len(line) // _POINTS)
            kept = [max(line[start : start + every]) / _GIB for start in range(0, len(line), every)]
            steps = [start * every for start in range(len(kept))]
            axes[axis][0].plot(steps, kept, label=f"recompute {how}: {max(line) / _GIB:.1f} GiB", linewidth=1)
        for row in axes:
            row[0].legend(loc="upper right", frameon=False)
            row[0].set_ylabel("GiB live")
            row[0].set_ylim(bottom=0)
        axes[1][0].set_xlabel("operations of one step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
