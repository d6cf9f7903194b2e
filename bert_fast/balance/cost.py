"""What a sample costs: cost(L) = a L + b L^2, and how unevenly a plan spreads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CostModel:
    """`linear` per token and `quadratic` per squared token, in any common unit (FLOPs, microseconds)."""

    linear: float
    quadratic: float

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        """Cost of samples of these lengths, float64, same shape."""
        lengths = lengths.astype(np.float64)
        return lengths * (self.linear + self.quadratic * lengths)


def imbalance(rank_costs: np.ndarray) -> float:
    """Max over ranks of the cost divided by the mean over ranks; 1.0 is perfect."""
    return float(rank_costs.max() / rank_costs.mean())
