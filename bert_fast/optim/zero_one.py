"""0/1 Adam (arXiv 2202.06009, algorithm 1): 1-bit Adam whose second moment learns ever more seldom, and with local steps.

    exact:   g is averaged over ranks; both moments; w <- w - lr m / sqrt(v)
    synced:  the momentum is averaged as signs; v stays
    local:   nothing is sent: each rank goes on with its own gradient, and adds up what it subtracts, u <- u + lr m
    synced after local steps: u is averaged; all ranks go on from the weights of the last exchange, with w <- w - u / sqrt(v)
             and m <- u / (sum of the rates)

Goes with `communication.reduce_dtype=zero_one`, which says what a step is. Between exchanges ranks have different weights, and
`sync_weights` makes them the same wherever weights are read. Weight decay is decoupled, and rates have Adam's bias correction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.adamw import adam_settings
from bert_fast.optim.build import RunOptimizer, decay_groups


class ZeroOneAdam(RunOptimizer):
    """`kind` says before each step whether it is `exact`, `synced` or `local`; a run sets it."""

    state_names = ("exp_avg", "exp_avg_sq")
    step_dtype = torch.float32
    scalar_names = {"variance_step": torch.float32}  # noqa: RUF012  # as the base class has it

    kind: Callable[[], str] = staticmethod(lambda: "exact")

    def __init__(self, groups: Iterable[Any], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        # Weights of the last exchange, if there was a local step since
        self._start: dict[torch.Tensor, torch.Tensor] = {}
        self._sum: dict[torch.Tensor, torch.Tensor] = {}  # u
        self.summed_rates = 0.0  # of the local steps since the last exchange
        self._decays = [1.0] * len(self.param_groups)  # what weight decay has left of a weight since then

    def rate(self) -> float:
        """The rate of the next update, bias correction included."""
        group = self.param_groups[0]
        return float(group["lr"] / (1 - group["betas"][0] ** (self._count("step") + 1)))

    def _count(self, name: str) -> float:
        """`step` or `variance_step`, which all parameters have alike."""
        return next((float(state[name]) for state in self.state.values()), 0.0)

    def local_sum(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """What this rank has added up for a parameter since the last exchange; None: there was no local step."""
        return self._sum.get(parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, of all parameters."""
        kind, rate = self.kind(), self.rate()
        variance_count = self._count("variance_step") + (kind == "exact")
        for number, group in enumerate(self.param_groups):
            decay = 1 - group["lr"] * group["weight_decay"]
            self._decays[number] *= decay
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(
                        parameter, parameter.grad, group, kind, rate, decay, self._decays[number], variance_count
                    )
        if kind == "local":
            self.summed_rates += rate
        else:
            self._forget_local_steps()

    def _step_one(
        self,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        group: dict[str, Any],
        kind: str,
        rate: float,
        decay: float,
        decay_since: float,
        variance_count: float,
    ) -> None:
        beta1, beta2 = group["betas"]
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["variance_step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        state["step"] += 1
        if kind == "synced":
            first.copy_(gradient)
        else:
            first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        if kind == "exact":
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            state["variance_step"] += 1
        elif kind == "local":
            first.mul_(second > 0)  # what has no second moment cannot be divided by it
            if parameter not in self._start:
                self._start[parameter], self._sum[parameter] = parameter.clone(), torch.zeros_like(parameter)
            self._sum[parameter].add_(first, alpha=rate)
        if kind != "local" and parameter in self._start:
            torch.mul(self._start[parameter], decay_since, out=parameter)
            rate += self.summed_rates
        else:
            parameter.mul_(decay)
        parameter.addcdiv_(first, _denominator(second, group, variance_count), value=-rate)

    def sync_weights(self, average: Callable[[torch.Tensor], None]) -> None:
        """Make the weights and momenta of all ranks the same after local steps. A collective, unless there was none.

        Args:
            average: puts the mean over ranks into a flat fp32 tensor.
        """
        if not self._start:
            return
        parameters = list(self._start)
        flat = torch.cat([self._sum[p].view(-1) for p in parameters])
        average(flat)
        variance_count = self._count("variance_step")
        group_of = {p: (number, group) for number, group in enumerate(self.param_groups) for p in group["params"]}
        with torch.no_grad():
            for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                number, group = group_of[parameter]
                state = self.state[parameter]
                state["exp_avg"].copy_(summed.view_as(parameter)).div_(self.summed_rates or 1.0)
                torch.mul(self._start[parameter], self._decays[number], out=parameter)
                parameter.addcdiv_(
                    summed.view_as(parameter), _denominator(state["exp_avg_sq"], group, variance_count), value=-1.0
                )
        self._forget_local_steps()

    def _forget_local_steps(self) -> None:
        self._start.clear()
        self._sum.clear()
        self.summed_rates = 0.0
        self._decays = [1.0] * len(self.param_groups)


def _denominator(second: torch.Tensor, group: dict[str, Any], count: float) -> torch.Tensor:
    return (second / (1 - group["betas"][1] ** count)).sqrt_().add_(group["eps"])


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """The optimizer in the groups of `decay_groups`."""
    return ZeroOneAdam(decay_groups(named_parameters, config.weight_decay), **adam_settings(config))
