"""AdamW (Loshchilov and Hutter, arXiv 1711.05101): torch's fused form, or apex's. The one place that imports apex."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.optim.build import RunOptimizer, decay_groups
from bert_fast.optim.compact import CompactAdamW


class AdamW(torch.optim.AdamW, RunOptimizer):
    """torch's, which reads `found_inf` in its fused form."""

    state_names = ("exp_avg", "exp_avg_sq")
    step_dtype = torch.float32
    reads_found_inf = True


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """torch's AdamW, fused, or with moments in another format or place; or apex's. Raises UserError if apex is missing."""
    groups = decay_groups(named_parameters, config.weight_decay)
    if config.use_apex:
        return build_apex(groups, config, decoupled=True)
    if config.state_dtype != "fp32" or config.state_on_host:
        return CompactAdamW(
            groups, **adam_settings(config), state_dtype=config.state_dtype, on_host=config.state_on_host
        )
    return AdamW(groups, **adam_settings(config), fused=True)


def adam_settings(config: OptimizerConfig) -> dict[str, Any]:
    """What every optimizer of Adam's family takes beside its groups, as torch and apex name it."""
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}


def build_apex(groups: list[dict[str, Any]], config: OptimizerConfig, *, decoupled: bool) -> RunOptimizer:
    """apex's FusedAdam over the groups, with decoupled weight decay or with L2. Raises UserError if apex is missing."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        raise UserError("optimizer.use_apex=true: apex is not installed; install it or set use_apex=false") from None

    class ApexAdam(FusedAdam, RunOptimizer):  # type: ignore[misc]
        state_names = ("exp_avg", "exp_avg_sq")
        group_state_names = ("step",)  # it counts updates per group

    return ApexAdam(groups, **adam_settings(config) | {"adam_w_mode": decoupled})
