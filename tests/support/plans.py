"""Planners over made-up lengths, and a digest of what they plan that another process can compute as well."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from bert_fast.balance.planner import Planner
from bert_fast.config import BalanceConfig
from bert_fast.config.choices import STRATEGIES
from support.lengths import COST, MAX_LEN, make_lengths

LENGTHS = make_lengths(1000)


def make_planner(
    lengths: np.ndarray, strategy: str, *, world: int = 4, accumulation: int = 2, local: int = 3, node: int = 2,
    seed: int = 0, num_steps: int | None = None, virtual: int = 1, **settings: Any,
) -> Planner:  # fmt: skip
    config = BalanceConfig(strategy=strategy, num_strata=2, **settings)
    return Planner(
        lengths, config, COST, world_size=world, gradient_accumulation_steps=accumulation, micro_batch_size=local,
        node_size=node, max_seq_len=MAX_LEN, seed=seed, num_steps=num_steps, virtual_ranks=virtual,
    )  # fmt: skip


def digest() -> str:
    """A hash of plans of every strategy."""
    found = hashlib.sha256()
    for strategy in STRATEGIES:
        for step in (0, 7, 100_000):
            plan = make_planner(LENGTHS, strategy).plan(step)
            found.update(plan.ids.tobytes() + plan.starts.tobytes())
    return found.hexdigest()
