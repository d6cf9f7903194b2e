"""Pretraining losses as sums and counts, so that any split of a batch adds up to the same loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch


class LossSums(NamedTuple):
    """Sums of losses and counts of right predictions of a batch.

    mlm_sum, nsp_sum: scalars, at least fp32. mlm_correct, nsp_correct: int64 scalars, None unless accuracy was asked for.
    Those of next sentences are None for a model that does not predict them.
    """

    mlm_sum: torch.Tensor
    nsp_sum: torch.Tensor | None
    mlm_correct: torch.Tensor | None = None
    nsp_correct: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        """All losses in one sum, 0-dim."""
        return self.mlm_sum if self.nsp_sum is None else self.mlm_sum + self.nsp_sum


_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of fp32 logits in memory at a time


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of logits that are computed together for a vocabulary of this size on this type of device."""
    return max(16, _CHUNK_BYTES.get(device, _CHUNK_BYTES["cuda"]) // (4 * vocabulary))


class ProjectedCrossEntropy(torch.autograd.Function):
    """Vocabulary projection and summed cross-entropy by chunks of rows, so that the logits are never all in memory.

    The gradient is known up to one factor as soon as the loss is, so forward computes it as well and keeps no logits. Rows with
    a label below 0 do not count. Products are in the dtype of the hidden states, sums in at least fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor,
        labels_M: torch.Tensor,
        rows: int,
        with_accuracy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = hidden_MD.dtype
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        narrow_VD, narrow_V = weight_VD.to(dtype), bias_V.to(dtype)
        total, correct = (torch.zeros((), dtype=kind, device=hidden_MD.device) for kind in (wide, torch.int64))
        wants_gradient = any(ctx.needs_input_grad[:3])
        d_hidden, d_weight, d_bias = [], None, torch.zeros_like(bias_V, dtype=wide)
        for hidden, labels in zip(hidden_MD.split(rows), labels_M.split(rows), strict=True):
            logits = torch.addmm(narrow_V, hidden, narrow_VD.t())
            if with_accuracy:
                correct += (logits.argmax(-1) == labels).sum()
            loss, gradient = _cross_entropy(logits, labels, wants_gradient)
            total += loss
            if gradient is not None:
                d_hidden.append(gradient @ narrow_VD)
                part = gradient.t() @ hidden
                d_weight = part if d_weight is None else d_weight.to(wide).add_(part)
                d_bias += gradient.sum(0, dtype=wide)
        if wants_gradient:
            d_weight = torch.zeros_like(weight_VD) if d_weight is None else d_weight
            ctx.save_for_backward(torch.cat(d_hidden) if d_hidden else hidden_MD, d_weight, d_bias)
            ctx.kinds = (weight_VD.dtype, bias_V.dtype)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_kind, bias_kind = ctx.kinds
        wide = d_weight.to(weight_kind)
        # The table's gradient is large: where it was cast, the cast is ours to change
        d_weight = wide * grad if wide is d_weight else wide.mul_(grad)
        return d_hidden * grad, d_weight, (d_bias * grad).to(bias_kind), None, None, None


def loss_sums(
    masked_MD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor,
    labels_M: torch.Tensor,
    nsp_logits_B2: torch.Tensor | None,
    nsp_labels_B: torch.Tensor,
    with_accuracy: bool = False,
) -> LossSums:
    """Cross-entropies summed over masked positions, which are projected to the vocabulary here, and over samples.

    Args:
        masked_MD: what the masked-LM head projects; weight_VD, bias_V: the decoder's; labels_M: int64.
        nsp_logits_B2, nsp_labels_B: of the next-sentence head, int64 labels; no logits: it is not there.
        with_accuracy: also count right predictions.
    """
    device = masked_MD.device.type
    rows = chunk_rows(len(weight_VD), device)
    narrow = device != "meta" and torch.is_autocast_enabled(device)
    if narrow:
        masked_MD = masked_MD.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False) if narrow else nullcontext():
        mlm_sum, correct = ProjectedCrossEntropy.apply(masked_MD, weight_VD, bias_V, labels_M, rows, with_accuracy)
    mlm_correct = correct if with_accuracy else None
    if nsp_logits_B2 is None:
        return LossSums(mlm_sum, None, mlm_correct)
    nsp_sum = SummedCrossEntropy.apply(nsp_logits_B2, nsp_labels_B)
    nsp_correct = (nsp_logits_B2.argmax(-1) == nsp_labels_B).sum() if with_accuracy else None
    return LossSums(mlm_sum, nsp_sum, mlm_correct, nsp_correct)


class SummedCrossEntropy(torch.autograd.Function):
    """Cross-entropy summed over rows, in at least fp32; keeps only its gradient, in the logits' dtype.

    Rows with a label below 0 do not count.

    Unlike `F.cross_entropy(logits.float())` it needs no fp32 log-probabilities and no second pass over them.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        loss, gradient = _cross_entropy(logits_MV, labels_M, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None  # a 0-dim factor: computed in fp32, stored in the gradient's dtype


def _cross_entropy(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Summed loss in at least fp32, and its gradient in the dtype of the logits."""
    wide = logits_MV.float() if logits_MV.dtype in (torch.bfloat16, torch.float16) else logits_MV
    counts = labels_M[:, None] >= 0
    column = labels_M[:, None].clamp_min(0)
    log_sum = torch.logsumexp(wide, 1, keepdim=True)
    loss = ((log_sum - wide.gather(1, column)) * counts).sum()
    if not wants_gradient:
        return loss, None
    # a row that does not count: exp(x - inf) = 0, and nothing is subtracted at its label
    gradient = (wide - log_sum.masked_fill(~counts, torch.inf)).exp_()
    gradient.scatter_add_(1, column, -counts.to(gradient.dtype))
    return loss, gradient.to(logits_MV.dtype)
