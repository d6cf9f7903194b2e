"""One tile of scores: what its rows and columns add to their softmaxes, and the gradient of the loss by its scores.

A score is computed once in forward and once more in backward, for rows and columns together. The score of a pair itself is not
in a tile: what remains of a softmax without it, over the whole, is the gradient by it, which keeps its digits so where the
pair's probability is nearly 1. Where all scores of a tile are
near enough to each other, one exponential does for both: exp(x - top), times exp(top - maximum) for each row and each column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bert_fast.contrastive.softmax import LOWEST, Denominators, Weights

# Sums of exponentials of scores up to this need no maximum: exp(40) * 2**40 samples are within fp32
BOUND = 40.0
# How far a row's or a column's maximum may be below the tile's, so that scores 27 below that are still normal numbers
_SPREAD = 60.0


@dataclass(frozen=True)
class Mask:
    """Scores of a tile [r, c] that do not count.

    positives:               int64 [r]: the column of each row's positive, whose score is left out; a number that is no column:
                             it has none here
    row_ids, column_ids:     int64 [r], [c]: where both are equal, the score counts in no softmax
    row_limits, column_limits: fp32 [r], [c]: a score above it does not count in the softmax of the row, or of the column
    """

    positives: torch.Tensor | None = None
    row_ids: torch.Tensor | None = None
    column_ids: torch.Tensor | None = None
    row_limits: torch.Tensor | None = None
    column_limits: torch.Tensor | None = None


def denominators_of(
    scores: torch.Tensor, mask: Mask, with_columns: bool, bounded: bool
) -> tuple[Denominators, Denominators | None]:
    """What a tile adds to the softmaxes of its rows and, `with_columns`, of its columns.

    Args:
        scores: fp32 [r, c]; overwritten.
        bounded: no score is above `BOUND` or below minus that, and every maximum is 0.
    """
    _leave_out(scores, mask)
    if mask.row_limits is not None or mask.column_limits is not None:
        of_rows = _of_rows(_limited(scores, mask.row_limits, 1), bounded)
        return of_rows, _of_rows(_limited(scores, mask.column_limits, 0).t(), bounded) if with_columns else None
    if bounded:
        exps = scores.exp_()
        of_columns = Denominators(exps.new_zeros(exps.shape[1]), exps.sum(0)) if with_columns else None
        return Denominators(exps.new_zeros(exps.shape[0]), exps.sum(1)), of_columns
    if not with_columns:
        return _of_rows(scores, bounded), None
    row_max = scores.amax(1).clamp_min_(LOWEST)
    column_max = scores.amax(0).clamp_min_(LOWEST)
    top = row_max.max()
    if top - min(row_max.min(), column_max.min()) > _SPREAD:
        exps = (scores - row_max[:, None]).exp_()
        of_rows = Denominators(row_max, exps.sum(1))
        return of_rows, Denominators(column_max, scores.sub_(column_max).exp_().sum(0))
    exps = scores.sub_(top).exp_()
    return (
        Denominators(row_max, exps.sum(1).mul_((top - row_max).exp_())),
        Denominators(column_max, exps.sum(0).mul_((top - column_max).exp_())),
    )


def gradient_of(
    scores: torch.Tensor,
    mask: Mask,
    row_weights: Weights,
    column_weights: Weights | None,
    bounded: bool,
    spare: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient by each score, fp32 [r, c].

    Args:
        scores: fp32 [r, c]; overwritten.
        column_weights: None: columns have no softmax.
        spare: memory as large as the scores; overwritten.
    """
    _leave_out(scores, mask)
    row_max, row_factor = row_weights
    if mask.row_limits is not None or mask.column_limits is not None:
        exps = (_limited(scores, mask.row_limits, 1) - row_max[:, None]).exp_().mul_(row_factor[:, None])
        if column_weights is not None:
            limited = _limited(scores, mask.column_limits, 0)
            exps.add_(limited.sub_(column_weights.maximum).exp_().mul_(column_weights.factor))
        return exps
    if column_weights is None:
        if not bounded:
            scores.sub_(row_max[:, None])
        return scores.exp_().mul_(row_factor[:, None])
    column_max, column_factor = column_weights
    if not bounded:
        top = torch.minimum(row_max.max(), column_max.max())  # no score of the tile is above it
        if top - min(row_max.min(), column_max.min()) > _SPREAD:
            exps = (scores - row_max[:, None]).exp_().mul_(row_factor[:, None])
            return exps.add_(scores.sub_(column_max).exp_().mul_(column_factor))
        row_factor, column_factor = row_factor * (top - row_max).exp_(), column_factor * (top - column_max).exp_()
        scores.sub_(top)
    factor = torch.add(row_factor[:, None], column_factor, out=spare)
    return scores.exp_().mul_(factor)


def _leave_out(scores: torch.Tensor, mask: Mask) -> None:
    if mask.positives is not None:
        last = scores.shape[1] - 1
        here = (mask.positives >= 0) & (mask.positives <= last)
        column = mask.positives.clamp(0, last)[:, None]
        kept = scores.gather(1, column).masked_fill_(here[:, None], -torch.inf)
        scores.scatter_(1, column, kept)  # no selection of rows, for which a GPU would wait
    if mask.row_ids is not None and mask.column_ids is not None:
        scores.masked_fill_(mask.row_ids[:, None] == mask.column_ids, -torch.inf)


def _limited(scores: torch.Tensor, limits: torch.Tensor | None, dim: int) -> torch.Tensor:
    """A copy without what is above the limits of rows (dim 1) or of columns (dim 0)."""
    if limits is None:
        return scores.clone()
    return scores.masked_fill(scores > limits.unsqueeze(dim), -torch.inf)


def _of_rows(scores: torch.Tensor, bounded: bool) -> Denominators:
    """Of each row alone; overwrites the scores."""
    if bounded:
        return Denominators(scores.new_zeros(len(scores)), scores.exp_().sum(1))
    maximum = scores.amax(1).clamp_min_(LOWEST)
    return Denominators(maximum, scores.sub_(maximum[:, None]).exp_().sum(1))
