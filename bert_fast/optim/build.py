"""The optimizer a config asks for, with decay on matrices only. The one place that imports apex."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
    """AdamW (torch, fused; apex's with `use_apex`) or LAMB (ours). Raises UserError if apex is missing."""
    named = list(named_parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if has_decay(name)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if not has_decay(name)], "weight_decay": 0.0},
    ]
    settings = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name == "lamb":
        # The reference leaves out the same names from weight decay and from layer adaptation, whatever the rate of decay
        groups[0]["layer_adaptation"], groups[1]["layer_adaptation"] = True, False
        return Lamb(groups, **settings, weight_decay=config.weight_decay)
    if config.use_apex:
        try:
            from apex.optimizers import FusedAdam
        except ImportError:
            raise UserError(
                "optimizer.use_apex=true: apex is not installed; install it or set use_apex=false"
            ) from None
        return FusedAdam(groups, **settings, adam_w_mode=True)
    return torch.optim.AdamW(groups, **settings, fused=True)
