"""NAdam (Dozat, ICLR 2016 workshop) with decoupled weight decay (arXiv 1711.05101): torch's, by foreach operations.

Adam with Nesterov's momentum, whose weight grows over the steps: mu_t = beta1 (1 - 0.5 * 0.96 ** (0.004 t)).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.adamw import adam_settings
from bert_fast.optim.build import RunOptimizer, decay_groups


class NAdamW(torch.optim.NAdam, RunOptimizer):
    """torch's. The host waits for the gradient's norm before each step, as it does not read `found_inf`."""

    state_names = ("exp_avg", "exp_avg_sq")
    step_dtype = torch.float32
    scalar_names: ClassVar[dict[str, torch.dtype]] = {"mu_product": torch.float32}
    """`mu_product`: the product of mu_1 to mu_t, which corrects the first moment's bias."""


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> NAdamW:
    """torch's NAdam with decoupled decay, in the groups of `decay_groups`."""
    named = list(named_parameters)
    # On CUDA `step` and `mu_product` stay on the device, so that no update waits for them
    on_device = any(parameter.is_cuda for _, parameter in named)
    return NAdamW(
        decay_groups(named, config.weight_decay),
        **adam_settings(config),
        decoupled_weight_decay=True,
        foreach=True,
        capturable=on_device,
    )
