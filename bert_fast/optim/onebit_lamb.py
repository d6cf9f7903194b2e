"""1-bit LAMB (arXiv 2104.06069, algorithm 1): LAMB for some steps, then LAMB on a momentum that was averaged as signs.

The second moment is frozen, as in 1-bit Adam, and so is the trust ratio of each tensor, at its moving average over the exact
steps. What the ratio would have become is followed by a factor: the largest quotient of the frozen and a fresh denominator,
the fresh one made of gradients that are worked out from two averaged momenta. The factor has bounds, and a bound to its change.

Goes with `communication.reduce_dtype=onebit`. Until that sends momentum it is `lamb`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.build import RunOptimizer, decay_groups
from bert_fast.optim.lamb import Lamb, norms_of
from bert_fast.optim.onebit import TakesMomentum
from bert_fast.parts import parts_of

_RATIO_DECAY = 0.9  # of the moving average of trust ratios, a step
_MOST_CHANGE = 0.1  # of the factor, from step to step


class OneBitLamb(TakesMomentum, Lamb):
    """See the module. A parameter's state has, beside LAMB's: `ratio` and `factor`, one number for each of its parts, and from
    the first step that takes momentum `fresh`, its second moment as it goes on."""

    has_opaque_state: ClassVar[bool] = True  # numbers for each part of a tensor

    def __init__(self, *arguments: Any, factor_min: float, factor_max: float) -> None:
        """
        Args:
            arguments: LAMB's.
            factor_min, factor_max: bounds of the factor.
        """
        super().__init__(*arguments)
        self._factor_min, self._factor_max = factor_min, factor_max

    def _record_ratios(self, parameters: list[torch.Tensor], ratios: list[torch.Tensor]) -> None:
        rest = iter(ratios)
        for parameter in parameters:
            now = torch.stack([next(rest) for _ in parts_of(parameter)])
            state = self.state[parameter]
            average = state.setdefault("ratio", torch.zeros_like(now))
            average.mul_(_RATIO_DECAY).add_(now, alpha=1 - _RATIO_DECAY)

    def _take(
        self, parameter: torch.Tensor, momentum: torch.Tensor, group: dict[str, Any], count: float, second_count: float
    ) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        if "fresh" not in state:
            state["fresh"] = state["exp_avg_sq"].clone()
            state["factor"] = torch.ones(len(parts_of(parameter)), device=parameter.device)
        gradient = torch.sub(momentum, state["exp_avg"], alpha=beta1).div_(1 - beta1)
        state["exp_avg"].copy_(momentum)
        state["fresh"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        frozen = (state["exp_avg_sq"] / (1 - beta2**second_count)).sqrt_().add_(group["eps"])
        fresh = (state["fresh"] / (1 - beta2**count)).sqrt_().add_(group["eps"])
        adam = momentum / (1 - beta1**count) / frozen
        update = adam.add(parameter, alpha=group["weight_decay"])
        if group["layer_adaptation"]:
            sizes = list(parts_of(parameter))
            largest = torch.stack([quotient.max() for quotient in (frozen / fresh).split(sizes)])
            self._move_factor(state["factor"], largest, adam.split(sizes), update.split(sizes))
            ratios = state["ratio"] / (1 - _RATIO_DECAY**second_count) * state["factor"]
            torch._foreach_mul_(list(update.split(sizes)), list(ratios.unbind()))
        parameter.sub_(update, alpha=group["lr"])

    def _move_factor(
        self,
        factor: torch.Tensor,
        largest: torch.Tensor,
        adam: Iterable[torch.Tensor],
        update: Iterable[torch.Tensor],
    ) -> None:
        """Bring the factors of a parameter's parts up to date: towards `largest` in the share that is not weight decay."""
        norms = zip(norms_of(list(adam)), norms_of(list(update)), strict=True)
        share = torch.stack([torch.where(whole > 0, part / whole, 1.0) for part, whole in norms]).clamp_(max=1.0)
        wanted = (largest * share + (1 - share)).clamp_(self._factor_min, self._factor_max)
        factor.copy_(torch.clamp(wanted, factor * (1 - _MOST_CHANGE), factor * (1 + _MOST_CHANGE)))


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """With the groups of `lamb`, and a trust ratio for each tensor."""
    decayed, plain = decay_groups(named_parameters, config.weight_decay)
    groups = [{**decayed, "layer_adaptation": True}, {**plain, "layer_adaptation": False}]
    betas, bounds = (config.beta1, config.beta2), {"factor_min": config.factor_min, "factor_max": config.factor_max}
    return OneBitLamb(groups, config.lr, betas, config.eps, config.weight_decay, **bounds)
