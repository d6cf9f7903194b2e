"""Pretraining losses as sums plus counts, so that any split of a batch adds up to the same loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


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
    mlm_sum = F.cross_entropy(_at_least_fp32(mlm_logits_MV), labels_M, reduction="sum")
    nsp_sum = F.cross_entropy(_at_least_fp32(nsp_logits_B2), nsp_labels_B, reduction="sum")
    if not with_accuracy:
        return LossSums(mlm_sum, nsp_sum)
    return LossSums(
        mlm_sum,
        nsp_sum,
        (mlm_logits_MV.argmax(-1) == labels_M).sum(),
        (nsp_logits_B2.argmax(-1) == nsp_labels_B).sum(),
    )


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
