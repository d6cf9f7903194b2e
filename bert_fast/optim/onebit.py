"""1-bit Adam (arXiv 2102.02888): AdamW for some steps, then AdamW with a frozen second moment and a momentum that was averaged.

Goes with `communication.reduce_dtype=onebit`, which averages the momentum as signs once its exact steps are over. Until then it
is `adamw`, bit for bit. Weight decay is decoupled, and both moments have Adam's bias correction, the second that of the step at
which it was frozen (the paper's code has neither).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.adamw import AdamW, adam_settings
from bert_fast.optim.build import RunOptimizer, decay_groups


class TakesMomentum(RunOptimizer):
    """An optimizer whose gradients are, after some steps, the new momentum; a run sets both of these.

    takes_momentum:  says before each step whether they are
    num_exact_steps: the steps before
    """

    takes_momentum: Callable[[], bool] = staticmethod(lambda: False)
    num_exact_steps: int = 0


class OneBitAdam(AdamW, TakesMomentum):
    """See the module."""

    reads_found_inf = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        if not self.takes_momentum():
            super().step()
            return
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                count = float(state["step"])
                state["exp_avg"].copy_(parameter.grad)
                second = state["exp_avg_sq"] / (1 - beta2 ** min(count, self.num_exact_steps))
                denominator = second.sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**count))


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """The optimizer in the groups of `decay_groups`."""
    return OneBitAdam(decay_groups(named_parameters, config.weight_decay), **adam_settings(config), fused=True)
