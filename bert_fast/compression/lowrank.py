"""Low rank: a matrix as P Q^T, by one power iteration a step from the last step's Q (PowerSGD, arXiv 1905.13727, algorithm 1).

    P = M Q;  P = orthogonalize(P);  Q = M^T P;  M is sent as P Q^T

The two products are linear in M until P is orthogonalized, so that ranks can average P, and then Q, by all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def has_smaller_factors(rows: int, columns: int, rank: int) -> bool:
    """Whether P [rows, rank] and Q [columns, rank] have fewer numbers than the matrix; else it is better kept as it is."""
    return rank * (rows + columns) < rows * columns


class PowerIteration:
    """Bases of matrices from step to step, the same on all ranks: Q of each matrix, and its P in between.

    Matrices of one shape are multiplied as one batch.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int]], rank: int, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        """
        Args:
            shapes: rows and columns of the matrices, in the order in which they are given to `left`.
            rank: clamped to the smaller side of a matrix.
            seed: of the first Q; must be the same on all ranks.
        """
        self.shapes, self._device = list(shapes), device
        self.ranks = [min(rank, *shape) for shape in self.shapes]
        by_shape: dict[tuple[int, int], list[int]] = {}
        for number, shape in enumerate(self.shapes):
            by_shape.setdefault(shape, []).append(number)
        self._batches = list(by_shape.values())
        self._seed = seed
        self.start_anew()

    def start_anew(self) -> None:
        """The next step begins with the Q that the first one began with."""
        generator = torch.Generator().manual_seed(self._seed)
        self._right = []
        for batch in self._batches:
            columns, r = self.shapes[batch[0]][1], self.ranks[batch[0]]
            start = torch.randn(len(batch), columns, r, generator=generator).to(self._device)
            self._right.append(orthogonalize(start))

    @property
    def num_left(self) -> int:
        """Numbers in P of all matrices."""
        return sum(rows * rank for (rows, _), rank in zip(self.shapes, self.ranks, strict=True))

    @property
    def num_right(self) -> int:
        """Numbers in Q of all matrices."""
        return sum(columns * rank for (_, columns), rank in zip(self.shapes, self.ranks, strict=True))

    def left(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """P of each matrix before it is orthogonalized, flat [num_left], by batches."""
        stacked = self._stacked(matrices)
        return self._flat(torch.bmm(m, q) for m, q in zip(stacked, self._right, strict=True))

    def right(self, matrices: Sequence[torch.Tensor], left: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(P, Q): P of `left` [num_left] orthogonalized, and Q of each matrix with it, flat [num_right]."""
        bases = [orthogonalize(p) for p in self._unflat(left, side=0)]
        stacked = self._stacked(matrices)
        return self._flat(bases), self._flat(torch.bmm(m.mT, p) for m, p in zip(stacked, bases, strict=True))

    def product(self, left: torch.Tensor, right: torch.Tensor) -> list[torch.Tensor]:
        """P Q^T of each matrix, in the order of the shapes."""
        return [p @ q.mT for p, q in self.factors(left, right)]

    def factors(self, left: torch.Tensor, right: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """P [rows, rank] and Q [columns, rank] of each matrix, in the order of the shapes."""
        found: list[tuple[torch.Tensor, torch.Tensor]] = [(left, right)] * len(self.shapes)
        for batch, ps, qs in zip(self._batches, self._unflat(left, side=0), self._unflat(right, side=1), strict=True):
            for number, p, q in zip(batch, ps, qs, strict=True):
                found[number] = p, q
        return found

    def basis(self) -> torch.Tensor:
        """Q of each matrix that the next step begins with, flat [num_right]."""
        return self._flat(self._right)

    def start_from(self, right: torch.Tensor) -> None:
        """The next step begins with this Q [num_right]."""
        for mine, new in zip(self._right, self._unflat(right, side=1), strict=True):
            mine.copy_(new)

    def start_from_each(self, rights: Sequence[torch.Tensor]) -> None:
        """The next step begins with these Q [columns, rank], in the order of the shapes. Raises ValueError for others."""
        if [tuple(q.shape) for q in rights] != [(k, r) for (_, k), r in zip(self.shapes, self.ranks, strict=True)]:
            raise ValueError("the bases of a power iteration over other matrices, or of another rank")
        for mine, batch in zip(self._right, self._batches, strict=True):
            mine.copy_(torch.stack([rights[number] for number in batch]))

    def state_dict(self) -> dict[str, Any]:
        """Q of each batch, as copies."""
        return {"right": [q.clone() for q in self._right]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Raises ValueError where it is of other matrices or ranks."""
        if [q.shape for q in state["right"]] != [q.shape for q in self._right]:
            raise ValueError("the bases of a power iteration over other matrices, or of another rank")
        for mine, saved in zip(self._right, state["right"], strict=True):
            mine.copy_(saved)

    def _flat(self, batches: Iterable[torch.Tensor]) -> torch.Tensor:
        parts = [batch.reshape(-1) for batch in batches]
        return torch.cat(parts) if parts else torch.zeros(0, device=self._device)

    def _stacked(self, matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.stack([matrices[number] for number in batch]) for batch in self._batches]

    def _unflat(self, flat: torch.Tensor, side: int) -> list[torch.Tensor]:
        """P (side 0) or Q (side 1) of each batch [matrices, rows or columns, rank]."""
        shapes = [(len(b), self.shapes[b[0]][side], self.ranks[b[0]]) for b in self._batches]
        parts = flat.split([count * length * rank for count, length, rank in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of each [rows, rank] of a batch; of a matrix of zeros, zeros.

    By Gram-Schmidt in fp32, twice: one pass loses orthogonality where columns are nearly parallel.
    """
    columns: list[torch.Tensor] = []
    for column in matrices.unbind(-1):
        norm_before = torch.linalg.vector_norm(column, dim=-1, keepdim=True)
        for _ in range(2):
            for other in columns:
                column = column - other * (other * column).sum(dim=-1, keepdim=True)
        norm = torch.linalg.vector_norm(column, dim=-1, keepdim=True)
        # What is left of a column that the others span is rounding: no direction
        is_there = norm > 1e-6 * norm_before
        columns.append(torch.where(is_there, column / torch.where(is_there, norm, 1.0), 0.0))
    return torch.stack(columns, dim=-1)
