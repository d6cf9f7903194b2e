"""Tiles of torch's own operations, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bert_fast.contrastive.scores import Mask, denominators_of, gradient_of
from bert_fast.contrastive.softmax import Denominators, Weights
from bert_fast.contrastive.tiles.base import Buffers, add_product, product
from bert_fast.contrastive.vectors import Gradient, Vectors


class TorchTiles:
    """A tile of scores in memory, of the vectors as they are.

    Args:
        scale: 1 / temperature.
        bounded: no score is above `scores.BOUND` or below minus that.
    """

    def __init__(self, scale: float, bounded: bool) -> None:
        self._scale, self._bounded = scale, bounded
        self._buffer = Buffers()

    def forward(
        self,
        rows: Vectors,
        columns: Vectors,
        of_rows: Sequence[Denominators],
        of_columns: Sequence[Denominators] | None,
        positives: torch.Tensor | None,
    ) -> None:
        mask = mask_of(rows, columns, positives, 0)
        scores = self._scores(rows.values, columns.values)
        row_sums, column_sums = denominators_of(scores, mask, of_columns is not None, self._bounded)
        of_rows[0].add(row_sums)
        if of_columns is not None and column_sums is not None:
            of_columns[0].add(column_sums)

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
        mask = mask_of(rows, columns, positives, 0)
        scores = self._scores(rows.values, columns.values)
        column_weights = None if of_columns is None else of_columns[0]
        spare = self._buffer("factors", len(rows), len(columns), scores.device)
        gradient = gradient_of(scores, mask, of_rows[0], column_weights, self._bounded, spare)
        add_product(by_rows.values, gradient, columns.values)
        add_product(by_columns.values, gradient.t(), rows.values)

    def _scores(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        out = self._buffer("scores", len(rows), len(columns), rows.device)
        if rows.dtype == torch.float32:
            return product(rows * self._scale, columns.t(), out)
        return product(rows, columns.t(), out).mul_(self._scale)  # rows times the scale would be rounded once more


def mask_of(rows: Vectors, columns: Vectors, positives: torch.Tensor | None, number: int) -> Mask:
    """What does not count, for a width."""
    return Mask(
        positives,
        rows.ids,
        columns.ids,
        None if rows.limits is None else rows.limits[number],
        None if columns.limits is None else columns.limits[number],
    )
