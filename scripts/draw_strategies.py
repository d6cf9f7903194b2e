#!/usr/bin/env python3
"""The pictures of docs/balance.md: which rank gets what under each strategy, for one small global batch.

python scripts/draw_strategies.py --out docs/images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bert_fast.command import guard_imports, guarded  # noqa: E402

guard_imports()

import matplotlib  # noqa: E402

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from bert_fast.balance.cost import CostModel  # noqa: E402
from bert_fast.balance.lengths import wikipedia_like  # noqa: E402
from bert_fast.balance.planner import Plan, Planner  # noqa: E402
from bert_fast.config import BalanceConfig  # noqa: E402
from bert_fast.config.choices import STRATEGIES  # noqa: E402

RANKS, MICRO_BATCH_SIZE, NODE, MAX_LEN = 8, 6, 4, 512


def segments(plan: Plan, lengths: np.ndarray, rank: int, strategy: str) -> list[tuple[int, bool]]:
    """(tokens, is padding) from left to right."""
    (part,) = plan.micro_batches(rank)
    if plan.rows is None:
        mine = np.sort(lengths[part])[::-1].tolist()
        padding = plan.tokens[rank, 0] - sum(mine)
        return [(n, False) for n in mine] + ([(int(padding), True)] if padding else [])
    found: list[tuple[int, bool]] = []
    for row in range(plan.num_rows):
        inside = lengths[part][plan.rows[part] == row].tolist()
        found += [(n, False) for n in inside] + [(MAX_LEN - sum(inside), True)]
    return found


def draw(strategy: str, path: Path) -> None:
    """One bar a rank, as long as the tokens it computes."""
    config = BalanceConfig(strategy=strategy, num_packs=3 if strategy == "packed" else None)
    planner = Planner(
        wikipedia_like(10_000), config, CostModel(613.7e6, 98304), world_size=RANKS,
        gradient_accumulation_steps=1, micro_batch_size=MICRO_BATCH_SIZE, node_size=NODE, max_seq_len=MAX_LEN, seed=3,
    )  # fmt: skip
    plan = planner.plan(0)
    lengths = planner.lengths_of(plan)
    figure, axis = plt.subplots(figsize=(6.4, 2.5))
    colours = plt.get_cmap("viridis_r")
    for rank in range(RANKS):
        left = 0
        for tokens, is_padding in segments(plan, lengths, rank, strategy):
            style = (
                {"color": "white", "hatch": "////"} if is_padding else {"color": colours(0.1 + 0.8 * tokens / MAX_LEN)}
            )
            axis.barh(rank, tokens, left=left, height=0.82, edgecolor="grey", linewidth=0.6, **style)
            left += tokens
    axis.axvline(lengths.sum() / RANKS, color="black", linestyle="--", linewidth=1)
    axis.set_yticks(range(RANKS), [f"rank {r}" for r in range(RANKS)])
    axis.set_xlim(0, MICRO_BATCH_SIZE * MAX_LEN)
    axis.invert_yaxis()
    axis.set_xlabel("tokens computed (darker: longer sample; hatched: padding; dashed: even share)")
    axis.set_title(f"{strategy}: imbalance {plan.imbalance:.3f}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="docs/images", help="folder of the pictures (default %(default)s)")
    args = parser.parse_args()
    matplotlib.rcParams.update({"svg.hashsalt": "strategies", "svg.fonttype": "none", "font.size": 8})
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for strategy in STRATEGIES:
        draw(strategy, folder / f"balance_{strategy}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
