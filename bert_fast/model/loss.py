"""Pretraining losses as sums plus counts, so that any split of a batch adds up to the same loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class LossSums(NamedTuple):
    """Scalars (fp32 sums; counts are tensors only where they must be counted on the device)."""

    mlm_sum: torch.Tensor
    nsp_sum: torch.Tensor
    mlm_correct: torch.Tensor | None = None
    nsp_correct: torch.Tensor | None = None


def loss_sums(
    mlm_logits_MV: torch.Tensor,
    labels_M: torch.Tensor,
    nsp_logits_B2: torch.Tensor,
    nsp_labels_B: torch.Tensor,
    with_accuracy: bool = False,
) -> LossSums:
    """Cross-entropies summed over masked positions and over samples, computed in fp32 at least."""
    mlm_sum = SummedCrossEntropy.apply(mlm_logits_MV, labels_M)
    nsp_sum = SummedCrossEntropy.apply(nsp_logits_B2, nsp_labels_B)
    if not with_accuracy:
        return LossSums(mlm_sum, nsp_sum)
    return LossSums(
        mlm_sum,
        nsp_sum,
        (mlm_logits_MV.argmax(-1) == labels_M).sum(),
        (nsp_logits_B2.argmax(-1) == nsp_labels_B).sum(),
    )


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over rows, in fp32 at least; keeps only its gradient, in the logits' own format.

    Rows with a label below 0 do not count.

    Against `F.cross_entropy(logits.float())` it spares the fp32 log-probabilities and one pass over them.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        wide = logits_MV.float() if logits_MV.dtype in (torch.bfloat16, torch.float16) else logits_MV
        counts = labels_M[:, None] >= 0
        column = labels_M[:, None].clamp_min(0)
        log_sum = torch.logsumexp(wide, 1, keepdim=True)
        loss = ((log_sum - wide.gather(1, column)) * counts).sum()
        if ctx.needs_input_grad[0]:
            # a row that does not count: exp(x - inf) = 0, and nothing is taken off at its label
            gradient = (wide - log_sum.masked_fill(~counts, torch.inf)).exp_()
            gradient.scatter_add_(1, column, -counts.to(gradient.dtype))
            ctx.save_for_backward(gradient.to(logits_MV.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None  # a 0-dim factor: computed in fp32, kept in the gradient's format
