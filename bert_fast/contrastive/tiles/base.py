"""What every way to compute tiles has in common: its interface, and matrix products that sum in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from bert_fast.contrastive.softmax import Denominators, Weights
from bert_fast.contrastive.vectors import Gradient, Vectors


class Tiles(Protocol):
    """Computes the scores of some rows with some columns, scale times their products, and what follows from them.

    positives: int64 [rows]: the column of each row's positive, whose score is left out; a number that is no column: it has none
               here. None: no row has.
    """

    def forward(
        self,
        rows: Vectors,
        columns: Vectors,
        of_rows: Sequence[Denominators],
        of_columns: Sequence[Denominators] | None,
        positives: torch.Tensor | None,
    ) -> None:
        """Add the scores to the softmaxes of rows and, if there are any, of columns, one of each width."""

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
        """Add the gradients of the loss by rows and columns, without the factor of the scale."""


class Buffers:
    """Memory for tiles, used again for every one."""

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(
        self, name: str, num_rows: int, num_columns: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """[rows, columns] with any content; the next call by this name returns the same memory."""
        kept, size = self._kept.get(name), num_rows * num_columns
        if kept is None or kept.numel() < size or kept.device != device or kept.dtype != dtype:
            kept = self._kept[name] = torch.empty(size, device=device, dtype=dtype)
        return kept[:size].view(num_rows, num_columns)


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a @ b in `out` (fp32), whatever the operands' dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return out.copy_(torch.mm(a, b, out_dtype=torch.float32))
    # CPUs have no product of bf16 that returns its fp32 sums
    return torch.mm(a.float(), b.float(), out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b to `total` (fp32). On CUDA `a` is rounded to the dtype of `b`."""
    if b.dtype == torch.float32:
        total.addmm_(a, b)
    elif b.device.type == "cuda":
        total.add_(torch.mm(a.to(b.dtype), b, out_dtype=torch.float32))
    else:
        total.addmm_(a.float(), b.float())
