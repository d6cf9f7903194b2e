"""Gradient clipping, before or after the reduction, without a host synchronisation.

The modes are in `config.choices.CLIP_MODES`: which norm is clipped, and what follows from that for an engine.

`bucket_before_reduce` (arXiv 2402.02447): with K groups and threshold c, the local gradient g_k of group k is scaled by
min(1, (c / sqrt(K)) / |g_k|), so that the clipped squares of a rank add up to at most c^2; no later clip. With a loss
scale S norms are compared with S c. A norm that is not finite makes the gradient NaN, so that it reaches every rank's
overflow check instead of vanishing in a zero coefficient.
"""

from __future__ import annotations

import math

import torch


def coefficient(norm: torch.Tensor, threshold: float, scale: torch.Tensor | None = None) -> torch.Tensor:
    """min(1, threshold * scale / norm) as a 0-dim tensor; NaN where the norm is not finite."""
    limit = threshold if scale is None else threshold * scale
    # Few operations, as there is one of these for every group. At norm 0 the ratio is infinite and clamped to 1; the last
    # term is 0, or NaN where the norm is not finite.
    return (limit / norm).clamp_max_(1.0).add_(norm, alpha=0.0)


def group_threshold(max_norm: float, num_groups: int) -> float:
    """A group's share of the threshold: c / sqrt(K)."""
    return max_norm / math.sqrt(num_groups)


class ClipStatistics:
    """How often and how strongly each group was clipped, kept on the device until asked for."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self._clipped = torch.zeros(len(names), device=device)
        self._coefficients = torch.zeros(len(names), device=device)
        self._this_step = torch.ones(len(names), device=device)
        self._places = list(self._this_step.unbind())
        self._added = False
        self._count = 0
        self.num_per_step = 1  # clips of a group in one step: one for each virtual rank, if there are any

    def add(self, group: int, value: torch.Tensor) -> None:
        """Note a group's clip coefficient of this step."""
        self._places[group].copy_(value)
        self._added = True

    def end_step(self) -> None:
        """Count what was noted of a step, or of a virtual rank in it: a few operations for all groups."""
        if self._added:
            self._clipped += self._this_step < 1.0
            self._coefficients += self._this_step.nan_to_num()
            self._count += 1
            self._added = False

    def count_replay(self) -> None:
        """A captured step ran again: its device operations did, this count did not."""
        self._count += self.num_per_step

    def read(self) -> dict[str, dict[str, float]]:
        """Share of clips that changed a group's gradient, and the mean coefficient. Synchronises; resets.

        A group is clipped once in a step, or once for each virtual rank of it.
        """
        count = max(1, self._count)
        clipped, coefficients = (self._clipped / count).tolist(), (self._coefficients / count).tolist()
        self._clipped.zero_()
        self._coefficients.zero_()
        self._count = 0
        return {
            name: {"clipped_share": share, "mean_coefficient": mean}
            for name, share, mean in zip(self.names, clipped, coefficients, strict=True)
        }
