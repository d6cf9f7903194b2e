"""The denominators of many softmaxes while their scores come tile by tile: a maximum and a sum each.

Both are kept instead of one log-sum-exp, because a logarithm of about 100 in fp32 has an error of 4e-6, which would be the
error of every probability.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# The maximum of no scores at all: exp(-inf - LOWEST) is 0, where exp(-inf + inf) would be no number
LOWEST = -1e30


class Denominators(NamedTuple):
    """Of n softmaxes, sum(exp(score - maximum)) each: fp32 [n] twice."""

    maximum: torch.Tensor
    total: torch.Tensor

    @staticmethod
    def empty(num: int, device: torch.device) -> Denominators:
        """Before the first score."""
        return Denominators(
            torch.full((num,), LOWEST, device=device, dtype=torch.float32), torch.zeros(num, device=device)
        )

    def add(self, other: Denominators) -> None:
        """Put further scores of the same softmaxes in, in place."""
        maximum = torch.maximum(self.maximum, other.maximum)
        total = self.total * (self.maximum - maximum).exp_() + other.total * (other.maximum - maximum).exp_()
        self.maximum.copy_(maximum)
        self.total.copy_(total)

    def with_scores(self, scores: torch.Tensor) -> Denominators:
        """Another one, with one further score in each softmax. `scores`: fp32 [n]."""
        both = Denominators(self.maximum.clone(), self.total.clone())
        both.add(Denominators(scores, torch.ones_like(scores)))
        return both

    def cut(self, part: slice) -> Denominators:
        """Views of some."""
        return Denominators(self.maximum[part], self.total[part])


class Weights(NamedTuple):
    """What turns scores into gradients: gradient = exp(score - maximum) * factor, for each of n softmaxes. fp32 [n] twice."""

    maximum: torch.Tensor
    factor: torch.Tensor

    def cut(self, part: slice) -> Weights:
        """Views of some."""
        return Weights(self.maximum[part], self.factor[part])


def weights_of(denominators: Denominators, factor: torch.Tensor, bounded: bool) -> Weights:
    """The gradient of `factor` (0-dim) times the sum of the logarithms of the denominators. One without scores has none.

    `bounded`: with 0 for all maxima.
    """
    maximum, total = denominators
    if bounded:
        maximum, total = torch.zeros_like(maximum), total * maximum.exp()
    return Weights(maximum, torch.where(total > 0, factor / total, 0.0))
