"""All tiles of some vectors with others.

Matrix products are 2 B^2 d operations in forward and 6 B^2 d in backward for B rows and B columns of d numbers; memory is that
of a few tiles beside the vectors and their gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from bert_fast.contrastive.softmax import Denominators, Weights
from bert_fast.contrastive.tiles.base import Tiles
from bert_fast.contrastive.vectors import Gradient, Vectors


class Sweep:
    """Cuts rows and columns into tiles of at most `size` (rows, columns). Arguments of its methods as `Tiles` has them."""

    def __init__(self, tiles: Tiles, size: tuple[int, int]) -> None:
        self._tiles, self._size = tiles, size

    def forward(
        self,
        rows: Vectors,
        columns: Vectors,
        of_rows: Sequence[Denominators],
        of_columns: Sequence[Denominators] | None,
        positives: torch.Tensor | None,
    ) -> None:
        for r, c in self._parts(len(rows), len(columns)):
            self._tiles.forward(
                rows.cut(r),
                columns.cut(c),
                [sums.cut(r) for sums in of_rows],
                None if of_columns is None else [sums.cut(c) for sums in of_columns],
                _from(positives, r, c),
            )

    def backward(
        self,
        rows: Vectors,
        columns: Vectors,
        of_rows: Sequence[Weights],
        of_columns: Sequence[Weights] | None,
        positives: torch.Tensor | None,
        by_rows: Gradient,
        by_columns: Gradient,
    ) -> None:
        for r, c in self._parts(len(rows), len(columns)):
            self._tiles.backward(
                rows.cut(r),
                columns.cut(c),
                [weights.cut(r) for weights in of_rows],
                None if of_columns is None else [weights.cut(c) for weights in of_columns],
                _from(positives, r, c),
                by_rows.cut(r),
                by_columns.cut(c),
            )

    def _parts(self, num_rows: int, num_columns: int) -> Iterator[tuple[slice, slice]]:
        for row in range(0, num_rows, self._size[0]):
            for column in range(0, num_columns, self._size[1]):
                yield slice(row, row + self._size[0]), slice(column, column + self._size[1])


def _from(positives: torch.Tensor | None, rows: slice, columns: slice) -> torch.Tensor | None:
    """Of some rows, counted from the first of some columns."""
    return None if positives is None else positives[rows] - columns.start
