#!/usr/bin/env python3
"""The pictures of docs/balance.md: which rank gets what under each strategy, for one small global batch.

python -m scripts.benchmarks.balance.draw_strategies --out docs/images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import scripts.guard  # noqa: F401

import matplotlib
import numpy as np

from bert_fast.balance.cost import CostModel
from bert_fast.balance.lengths import wikipedia_like
from bert_fast.balance.planner import Plan, Planner
from bert_fast.command import guarded
from bert_fast.config import BalanceConfig
from bert_fast.config.choices import STRATEGIES

from ...plots import svg_figure

NUM_RANKS, MICRO_BATCH_SIZE, NODE, MAX_LEN = 8, 6, 4, 512


def segments(plan: Plan, lengths: np.ndarray, rank: int) -> list[tuple[int, bool]]:
    """(tokens, is padding) from left to right."""
    (part,) = plan.micro_batches(rank)
    if plan.rows is None:
        mine = np.sort(lengths[part])[::-1].tolist()
        padding = plan.tokens[rank, 0] - sum(mine)
        return [(n, False) for n in mine] + ([(int(padding), True)] if padding else [])
    bars: list[tuple[int, bool]] = []
    for row in range(plan.num_rows):
        inside = lengths[part][plan.rows[part] == row].tolist()
        bars += [(n, False) for n in inside] + [(MAX_LEN - sum(inside), True)]
    return bars


def draw(strategy: str, path: Path) -> None:
    """One bar per rank, as long as the tokens that it computes."""
    config = BalanceConfig(strategy=strategy, num_packs=3 if strategy == "packed" else None)
    planner = Planner(
        wikipedia_like(10_000),
        config,
        CostModel(613.7e6, 98304),
        world_size=NUM_RANKS,
        gradient_accumulation_steps=1,
        micro_batch_size=MICRO_BATCH_SIZE,
        node_size=NODE,
        max_seq_len=MAX_LEN,
        seed=3,
    )
    plan = planner.plan(0)
    lengths = planner.lengths_of(plan)
    colours = matplotlib.colormaps["viridis_r"]
    with svg_figure(path, (6.4, 2.5), font_size=8) as axes:
        axis = axes[0, 0]
        for rank in range(NUM_RANKS):
            left = 0
            for tokens, is_padding in segments(plan, lengths, rank):
                shade = colours(0.1 + 0.8 * tokens / MAX_LEN)
                style = {"color": "white", "hatch": "////"} if is_padding else {"color": shade}
                axis.barh(rank, tokens, left=left, height=0.82, edgecolor="grey", linewidth=0.6, **style)
                left += tokens
        axis.axvline(lengths.sum() / NUM_RANKS, color="black", linestyle="--", linewidth=1)
        axis.set_yticks(range(NUM_RANKS), [f"rank {rank}" for rank in range(NUM_RANKS)])
        axis.set_xlim(0, MICRO_BATCH_SIZE * MAX_LEN)
        axis.invert_yaxis()
        axis.set_xlabel("tokens computed (darker: longer sample; hatched: padding; dashed: even share)")
        axis.set_title(f"{strategy}: imbalance {plan.imbalance:.3f}", fontsize=10)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/images", help="folder of the pictures (default %(default)s)")
    args = parser.parse_args()
    folder = Path(args.out)
    for strategy in STRATEGIES:
        draw(strategy, folder / f"balance_{strategy}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
