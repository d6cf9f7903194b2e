"""The optimizer that a config names, and what a run must know of any optimizer.

A new optimizer is a subclass of `RunOptimizer`, a function that builds it, and an entry in `config.choices.OPTIMIZERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.config.choices import OPTIMIZERS, find


class RunOptimizer(torch.optim.Optimizer):
    """A torch optimizer with what checkpoints, sharding and the finite check must know of it.

    Every tensor must be treated on its own, as `BucketwiseOptimizer` steps over some at a time, and the state of a
    parameter must be made in its first step: restoring a checkpoint clears it and fills it again.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    """Names in a parameter's state of the tensors that have the parameter's shape and format, such as moments. A checkpoint
    holds them, and a sharded run divides them over ranks."""

    step_dtype: ClassVar[torch.dtype | None] = None
    """Dtype of `step`, a 0-dim tensor in a parameter's state that counts its updates; None where its state has none."""

    reads_found_inf: ClassVar[bool] = False
    """Whether `step` looks on the device at `found_inf`, an attribute that is then set before it (0-dim float32), and changes
    nothing where that is 1. Otherwise the host has to wait for the gradient's norm before every `step`."""

    share_squares: Callable[[list[torch.Tensor], torch.Tensor | None], torch.Tensor] | None = None
    """Set where parameters are pieces of tensors; an optimizer that needs norms of whole tensors calls it. It turns squared
    norms [k, n] of the parts (`bert_fast.parts`) that the given parameters hold, in order, into those of the whole parts. It
    is a collective: every rank calls it as often, with `([], None)` where it holds nothing."""

    share_sums: Callable[[Callable[[str], str], dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None
    """Set where parameters are pieces of tensors; an optimizer that needs norms over several tensors calls it. It turns sums
    [2] over this rank's pieces, by group, into those over all ranks; the function names the group of a parameter's name. The
    result has every group of the model. It is a collective: every rank calls it as often, with `{}` where it holds nothing."""


def has_decay(name: str) -> bool:
    """Whether weight decay applies: not to biases and LayerNorm."""
    return not name.endswith("bias") and "norm" not in name


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups, in this order on every rank: those with `weight_decay`, and biases and LayerNorm without."""
    named = list(named_parameters)
    return [
        {"params": [p for name, p in named if has_decay(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not has_decay(name)], "weight_decay": 0.0},
    ]


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """The optimizer `config.name` over the parameters, in the groups of `decay_groups`.

    Raises:
        UserError: it needs a package that is not installed.
    """
    optimizer: RunOptimizer = find(OPTIMIZERS, config.name)(named_parameters, config)
    return optimizer
