"""Made-up lengths for the tests of balance."""

from __future__ import annotations

import numpy as np

from bert_fast.balance.cost import CostModel

COST = CostModel(1.0, 0.01)
MAX_LEN = 128


def make_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Like real stores: a third at full length, the rest uniform."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, MAX_LEN + 1, count)
    lengths[rng.random(count) < 0.3] = MAX_LEN
    return lengths.astype(np.uint16)


def costs_of(count: int, seed: int) -> np.ndarray:
    """Whole-number costs, as the planner has them."""
    return COST.table(MAX_LEN)[0][make_lengths(count, seed)]
