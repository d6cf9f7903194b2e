"""1-bit Adam (arXiv 2102.02888): AdamW for some steps, then AdamW with a frozen second moment and a momentum that was averaged.

Goes with `communication.reduce_dtype=onebit`, which averages the momentum as signs once its exact steps are over. Until then it
is `adamw`, bit for bit. Weight decay is decoupled, and both moments have Adam's bias correction, the second that of the step at
which it was frozen (the paper's code has neither).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.adamw import AdamW, adam_settings
from bert_fast.optim.build import RunOptimizer, decay_groups


class TakesMomentum(RunOptimizer):
    """An optimizer whose gradients are, after some steps, the new momentum. Comes before the exact one among the bases.

    takes_momentum: says before each step whether they are; a run sets it

    A parameter's state has `second_step`, the step at which its second moment was frozen, or the last one.
    """

    reads_found_inf = False
    takes_momentum: Callable[[], bool] = staticmethod(lambda: False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        if not self.takes_momentum():
            super().step()
            for state in self.state.values():
                if "second_step" in state:
                    state["second_step"].copy_(state["step"])
                else:
                    state["second_step"] = state["step"].clone()
            return
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            state = self.state[parameters[0]]  # all have the same counts, for which the host would wait each time
            count, second_count = float(state["step"]) + 1, float(state["second_step"])
            for parameter in parameters:
                self.state[parameter]["step"] += 1
                self._take(parameter, parameter.grad, group, count, second_count)

    @abstractmethod
    def _take(
        self, parameter: torch.Tensor, momentum: torch.Tensor, group: dict[str, Any], count: float, second_count: float
    ) -> None:
        """Update a parameter with an averaged momentum.

        Args:
            count: of this step.
            second_count: steps before the second moment was frozen.
        """


class OneBitAdam(TakesMomentum, AdamW):
    """See the module."""

    scalar_names: ClassVar[dict[str, torch.dtype]] = {"second_step": torch.float32}

    def _take(
        self, parameter: torch.Tensor, momentum: torch.Tensor, group: dict[str, Any], count: float, second_count: float
    ) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        state["exp_avg"].copy_(momentum)
        second = state["exp_avg_sq"] / (1 - beta2**second_count)
        denominator = second.sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**count))


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """The optimizer in the groups of `decay_groups`."""
    return OneBitAdam(decay_groups(named_parameters, config.weight_decay), **adam_settings(config), fused=True)
