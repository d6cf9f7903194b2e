"""Embeddings on one side of a comparison, and the gradient by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Vectors:
    """n embeddings and what a tile must know of them.

    values:  fp32 or bf16 [n, d]
    ids:     int64 [n]: vectors of one id on both sides are not compared; None: all are
    limits:  fp32 [W, n]: scores above do not count in this vector's softmax, for each width
    inverse: fp32 [W, n]: one over the length up to each width; None without widths
    """

    values: torch.Tensor
    ids: torch.Tensor | None = None
    limits: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    def cut(self, part: slice) -> Vectors:
        """Views of some."""
        return Vectors(
            self.values[part],
            None if self.ids is None else self.ids[part],
            None if self.limits is None else self.limits[:, part],
            None if self.inverse is None else self.inverse[:, part],
        )

    def take(self, numbers: torch.Tensor) -> Vectors:
        """Copies of those with these numbers, int64 [m]."""
        return Vectors(
            self.values[numbers],
            None if self.ids is None else self.ids[numbers],
            None if self.limits is None else self.limits[:, numbers],
            None if self.inverse is None else self.inverse[:, numbers],
        )


@dataclass(frozen=True)
class Gradient:
    """What tiles add up for n vectors.

    values:    fp32 [n, d]; with widths, without the part along the vector itself
    alignment: fp32 [W, n], sum_j G_j C_j of each width, of which that part is made, G with the factor of the scale; None
               without widths
    """

    values: torch.Tensor
    alignment: torch.Tensor | None = None

    @staticmethod
    def zeros(like: torch.Tensor, num_widths: int) -> Gradient:
        """Nothing yet, for vectors [n, d]. `num_widths` 0: without widths."""
        alignment = torch.zeros(num_widths, len(like), device=like.device) if num_widths else None
        return Gradient(torch.zeros(like.shape, device=like.device), alignment)

    def cut(self, part: slice) -> Gradient:
        """Views of some."""
        return Gradient(self.values[part], None if self.alignment is None else self.alignment[:, part])

    @staticmethod
    def of(tensors: Sequence[torch.Tensor]) -> Gradient:
        """From `tensors()`."""
        return Gradient(tensors[0], tensors[1].t() if len(tensors) > 1 else None)

    def tensors(self) -> list[torch.Tensor]:
        """All of it, with a first dimension of n."""
        return [self.values] if self.alignment is None else [self.values, self.alignment.t().contiguous()]

    def alignment_of(self, number: int) -> torch.Tensor:
        """fp32 [n] of a width."""
        assert self.alignment is not None
        return self.alignment[number]

    def add_at(self, numbers: torch.Tensor, other: Gradient) -> None:
        """Add to those with these numbers (int64 [m], all different), in place."""
        self.values.index_add_(0, numbers, other.values)
        if self.alignment is not None and other.alignment is not None:
            self.alignment.index_add_(1, numbers, other.alignment)

    def add(self, other: Gradient) -> None:
        """In place."""
        self.values.add_(other.values)
        if self.alignment is not None and other.alignment is not None:
            self.alignment.add_(other.alignment)


def inverse_lengths(values: torch.Tensor, widths: Sequence[int]) -> torch.Tensor | None:
    """One over the length of each vector up to each width, fp32 [W, n]; None without widths."""
    if not widths:
        return None
    squares = [values[:, start:stop].float().square().sum(1) for start, stop in pairwise((0, *widths))]
    return torch.stack(squares).cumsum(0).rsqrt()
