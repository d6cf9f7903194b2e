"""Parameters in which several tensors of the published model are stacked, as in the query-key-value projection.

An optimizer that treats every tensor as a whole (LAMB's norms, an orthogonalized update) must treat each part separately.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_NAME = "bert_fast_parts"


def declare_parts(parameter: torch.Tensor, sizes: Sequence[int]) -> None:
    """Declare that `parameter` is a stack of tensors of `sizes` rows. A copy of the parameter does not know it.

    Raises:
        ValueError: the sizes are not positive or do not add up to the parameter's rows.
    """
    if min(sizes, default=0) < 1 or sum(sizes) != parameter.shape[0]:
        raise ValueError(f"parts of {list(sizes)} rows do not make up the {parameter.shape[0]} rows of a parameter")
    setattr(parameter, _NAME, tuple(sizes))


def parts_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """Rows (first dimension) of each part, in order; a single part where nothing was declared."""
    whole = (parameter.shape[0],) if parameter.dim() else (1,)
    sizes: tuple[int, ...] = getattr(parameter, _NAME, whole)
    return sizes
