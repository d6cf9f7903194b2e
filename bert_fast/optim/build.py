"""The optimizer a config asks for, with decay on matrices only. The one place that imports apex."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.optim.lamb import Lamb


def has_decay(name: str) -> bool:
    """Whether weight decay applies: not to biases and LayerNorm."""
    return not name.endswith("bias") and "norm" not in name


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """AdamW (torch, fused) or LAMB (ours), or apex's forms with `use_apex`. Raises UserError if apex is missing."""
    named = list(named_parameters)
    groups = [
        {"params": [p for name, p in named if has_decay(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not has_decay(name)], "weight_decay": 0.0},
    ]
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.use_apex:
        try:
            from apex.optimizers import FusedAdam, FusedLAMB
        except ImportError:
            raise UserError(
                "optimizer.use_apex=true: apex is not installed; install it or set use_apex=false"
            ) from None
        if config.name == "lamb":  # max_grad_norm off: clipping is the communication engine's
            return FusedLAMB(groups, **settings, max_grad_norm=0.0, use_nvlamb=False)
        return FusedAdam(groups, **settings, adam_w_mode=True)
    if config.name == "lamb":
        return Lamb(groups, **settings, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, **settings, fused=True)
