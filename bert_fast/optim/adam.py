"""Adam with L2 regularization (Kingma and Ba, arXiv 1412.6980): torch's fused form, or apex's.

Weight decay is added to the gradient, and so passes through both moments, unlike AdamW's (arXiv 1711.05101, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.adamw import adam_settings, build_apex
from bert_fast.optim.build import RunOptimizer, decay_groups


class Adam(torch.optim.Adam, RunOptimizer):
    """torch's, which reads `found_inf` in its fused form."""

    state_names = ("exp_avg", "exp_avg_sq")
    step_dtype = torch.float32
    reads_found_inf = True


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """torch's Adam, fused; apex's with `use_apex`. Raises UserError if apex is missing."""
    groups = decay_groups(named_parameters, config.weight_decay)
    if config.use_apex:
        return build_apex(groups, config, decoupled=False)
    return Adam(groups, **adam_settings(config), fused=True)
