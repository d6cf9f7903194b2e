"""The contrastive loss of a batch that is spread over ranks, without its matrix of scores.

Sources: InfoNCE (van den Oord et al., arXiv 1807.03748); tiles and a ring (Cheng et al., arXiv 2410.17243), here in one sweep
for both directions: 8 B^2 d operations for loss and gradients, where separate sweeps take 20.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.contrastive.computation import Computation
from bert_fast.contrastive.embeddings import Pairs, share
from bert_fast.contrastive.options import LossOptions, check_scale
from bert_fast.contrastive.ring import Ring


class ContrastiveLoss(nn.Module):
    """Mean over all pairs of all ranks of the cross entropy of choosing the positive, the same number on every rank.

    A module as CLIP's: with `learn_scale` the logarithm of the scale is a parameter, `log_scale`.

    Args:
        options: what is compared with what.
        scale: 1 / temperature, at the start.
        max_scale: of a learned scale.
        group: ranks that share the batch; None: all, or this process alone.
        ranks_per_node: consecutive ranks that exchange blocks among themselves first.
        tile: rows and columns of a tile; None: what is fastest here, measured once.
        backend: a key of `BACKENDS`; None: the device's.

    Raises:
        UserError: for a scale that is none, or nodes that the ranks do not fill.
    """

    def __init__(
        self,
        options: LossOptions | None = None,
        *,
        scale: float = 20.0,
        learn_scale: bool = False,
        max_scale: float = 100.0,
        group: dist.ProcessGroup | None = None,
        ranks_per_node: int | None = None,
        tile: tuple[int, int] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_scale(scale)
        check_scale(max_scale)
        self.options = options or LossOptions()
        self.ring = Ring(group, ranks_per_node)
        self._tile, self._backend, self._max_scale = tile, backend, max_scale
        self._scale = scale
        self.log_scale = nn.Parameter(torch.tensor(scale).log()) if learn_scale else None

    @property
    def scale(self) -> torch.Tensor:
        """1 / temperature, 0-dim. A learned one that has come to be above `max_scale` is set to that."""
        if self.log_scale is None:
            return torch.tensor(self._scale)
        return learned_scale(self.log_scale, self._max_scale)

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        positives: torch.Tensor | None = None,
        query_ids: torch.Tensor | None = None,
        key_ids: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss, fp32 0-dim. A collective, and so is its backward pass. Arguments as `Pairs` has them.

        Args:
            scale: 0-dim, in place of this module's.

        Raises:
            UserError: on every rank, for embeddings of a rank that are not finite, of another width or too few.
        """
        loss: torch.Tensor = _Loss.apply(
            queries,
            keys,
            self.scale if scale is None else scale,
            Pairs(queries.detach(), keys.detach(), positives, query_ids, key_ids),
            self,
        )
        return loss

    def computation(self, pairs: Pairs, scale: float) -> Computation:
        """Checked and ready to run, without autograd. A collective."""
        shares = share(pairs, scale, self.options, self.ring)
        return Computation(pairs, shares, self.options, self.ring, self._tile, self._backend)


def learned_scale(log_scale: torch.Tensor, max_scale: float) -> torch.Tensor:
    """The scale whose logarithm is learned; a logarithm that has come to be above that of `max_scale` is set to it."""
    with torch.no_grad():
        log_scale.clamp_(max=math.log(max_scale))
    return log_scale.exp()


class _Loss(torch.autograd.Function):
    """Connects the computation with autograd."""

    @staticmethod
    def forward(ctx, queries, keys, scale, pairs, module):  # type: ignore[no-untyped-def]
        ctx.computation = module.computation(pairs, float(scale.detach()))
        ctx.scale, ctx.dtypes = scale, (queries.dtype, keys.dtype)
        return ctx.computation.forward()

    @staticmethod
    def backward(ctx, factor):  # type: ignore[no-untyped-def]
        by_queries, by_keys, by_scale = ctx.computation.backward(factor)
        return (
            by_queries.to(ctx.dtypes[0]),
            by_keys.to(ctx.dtypes[1]),
            by_scale.to(ctx.scale) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )
