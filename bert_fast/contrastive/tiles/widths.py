"""Matryoshka's widths in one sweep: they share the matrix products.

The products of a width are those of the next smaller one and a slice's, and its scores are these over the lengths of the
vectors up to there. With C the cosines and G the gradient by the scores, the gradient by a vector u up to a width is

    s sum_j G_j v_j / (|u| |v_j|)  -  u s sum_j G_j C_j / |u|^2

of which the first term is summed over widths before it is multiplied by a slice's v.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from bert_fast.contrastive.scores import denominators_of, gradient_of
from bert_fast.contrastive.softmax import Denominators, Weights
from bert_fast.contrastive.tiles.base import Buffers, add_product, product
from bert_fast.contrastive.tiles.plain import mask_of
from bert_fast.contrastive.vectors import Gradient, Vectors


class WidthTiles:
    """Tiles of cosines of each width. Arguments as `TorchTiles` has them; `widths` ascend."""

    def __init__(self, scale: float, bounded: bool, widths: Sequence[int]) -> None:
        self._scale, self._bounded = scale, bounded
        self._slices = list(pairwise((0, *widths)))
        self._buffer = Buffers()

    def forward(
        self,
        rows: Vectors,
        columns: Vectors,
        of_rows: Sequence[Denominators],
        of_columns: Sequence[Denominators] | None,
        positives: torch.Tensor | None,
    ) -> None:
        for number, scores in enumerate(self._scores(rows, columns)):
            mask = mask_of(rows, columns, positives, number)
            row_sums, column_sums = denominators_of(scores, mask, of_columns is not None, self._bounded)
            of_rows[number].add(row_sums)
            if of_columns is not None and column_sums is not None:
                of_columns[number].add(column_sums)

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
        by_product = []
        for number, scores in enumerate(self._scores(rows, columns)):
            mask = mask_of(rows, columns, positives, number)
            column_weights = None if of_columns is None else of_columns[number]
            kept = self._buffer(f"gradient {number}", len(rows), len(columns), scores.device).copy_(scores)
            gradient = gradient_of(kept, mask, of_rows[number], column_weights, self._bounded)
            aligned = scores.mul_(gradient)
            by_rows.alignment_of(number).add_(aligned.sum(1), alpha=1 / self._scale)
            by_columns.alignment_of(number).add_(aligned.sum(0), alpha=1 / self._scale)
            by_product.append(self._over_lengths(gradient, rows, columns, number))
        total = torch.zeros_like(by_product[-1])
        for (start, stop), part in zip(reversed(self._slices), reversed(by_product), strict=True):
            total.add_(part)  # a slice is in the scores of its own width and of all wider ones
            add_product(by_rows.values[:, start:stop], total, columns.values[:, start:stop])
            add_product(by_columns.values[:, start:stop], total.t(), rows.values[:, start:stop])

    def _scores(self, rows: Vectors, columns: Vectors) -> Iterator[torch.Tensor]:
        """fp32 [rows, columns] of each width, from narrow to wide; may be overwritten."""
        device = rows.values.device
        products = self._buffer("products", len(rows), len(columns), device)
        scores = self._buffer("scores", len(rows), len(columns), device)
        for number, (start, stop) in enumerate(self._slices):
            a, b = rows.values[:, start:stop], columns.values[:, start:stop].t()
            if number == 0:
                product(a, b, products)
            else:
                products.add_(product(a, b, scores))
            yield self._over_lengths(scores.copy_(products), rows, columns, number).mul_(self._scale)

    @staticmethod
    def _over_lengths(tile: torch.Tensor, rows: Vectors, columns: Vectors, number: int) -> torch.Tensor:
        """In place, divided by the lengths up to a width."""
        assert rows.inverse is not None
        assert columns.inverse is not None
        return tile.mul_(rows.inverse[number][:, None]).mul_(columns.inverse[number])
