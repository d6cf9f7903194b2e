"""LAMB (You et al., arXiv 1904.00962) with the semantics of MLPerf's reference.

Bias-corrected moments; weight decay added to the update before the trust ratio |w| / |update|, which is taken tensor by
tensor of the reference: a parameter that declares parts (`bert_fast.parts`) has one ratio per part. Whether a group decays
(`weight_decay`) and whether it is adapted (`layer_adaptation`) are two settings. Clipping is not done here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.build import RunOptimizer, decay_groups
from bert_fast.parts import parts_of

_ROW = 1024  # elements whose squares are added up at a time


class Lamb(RunOptimizer):
    """Vectorised over tensors (foreach)."""

    state_names = ("exp_avg", "exp_avg_sq")
    step_dtype = torch.float64
    reads_found_inf = True
    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        layer_adaptation: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "layer_adaptation": layer_adaptation,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. Where `found_inf` is 1, weights, moments and counts stay as they are."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)
            elif self.share_squares and group["layer_adaptation"]:
                self.share_squares([], None)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=self.step_dtype, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _update(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        states = [self._state_of(p) for p in parameters]
        gradients: list[torch.Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        first, second = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
        weight1: Any = 1 - beta1
        weight2: Any = 1 - beta2
        rate: Any = group["lr"]
        counted: Any = 1.0
        if self.found_inf is not None:  # leave moments, count and weights as they are, without asking the host
            keep = 1.0 - self.found_inf
            gradients = [torch.where(keep > 0, g, 0.0) for g in gradients]
            weight1, weight2, rate, counted = weight1 * keep, weight2 * keep, rate * keep, keep
        for state in states:
            state["step"] += counted
        torch._foreach_mul_(first, 1 - weight1)
        torch._foreach_add_(first, torch._foreach_mul(gradients, weight1))
        torch._foreach_mul_(second, 1 - weight2)
        torch._foreach_add_(second, torch._foreach_mul(torch._foreach_mul(gradients, gradients), weight2))
        count = states[0]["step"].clamp_min(1.0)
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        denominators = torch._foreach_sqrt(torch._foreach_div(second, correction2))
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(torch._foreach_div(first, correction1), denominators)
        if group["weight_decay"] > 0:
            torch._foreach_add_(updates, torch._foreach_mul(parameters, group["weight_decay"]))
        if group["layer_adaptation"]:
            parts = [update.split(parts_of(p)) for p, update in zip(parameters, updates, strict=True)]
            flat = [part for of_one in parts for part in of_one]
            ratios = [
                torch.where((w > 0) & (u > 0), w / u, 1.0) for w, u in zip(*self._norms(parameters, flat), strict=True)
            ]
            torch._foreach_mul_(flat, ratios)
        torch._foreach_sub_(parameters, torch._foreach_mul(updates, rate))

    def _norms(self, parameters: list[torch.Tensor], updates: list[torch.Tensor]) -> Iterable[Iterable[torch.Tensor]]:
        """Norms of weights and of updates, of whole parts. `updates` are those of the parameters' parts, in order."""
        parts = [part for p in parameters for part in p.split(parts_of(p))]
        weights, steps = norms_of(parts), norms_of(updates)
        if self.share_squares is None:
            return weights, steps
        squares = self.share_squares(parameters, torch.stack([torch.stack(weights), torch.stack(steps)]).square())
        return squares.sqrt().unbind()


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> Lamb:
    """LAMB with the groups of MLPerf's reference.

    It leaves out the same names from weight decay and from layer adaptation, whatever the rate of decay.
    """
    decayed, plain = decay_groups(named_parameters, config.weight_decay)
    groups = [{**decayed, "layer_adaptation": True}, {**plain, "layer_adaptation": False}]
    return Lamb(groups, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay)


def norms_of(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The 2-norm of each tensor, 0-dim and of its dtype; the tensors, of which there is at least one, are on one device.

    torch's own on the CPU adds up one square after the other: of 31 million it loses a percent.
    """
    if tensors[0].device.type != "cpu":
        return list(torch._foreach_norm(tensors))
    norms = []
    for flat in (tensor.reshape(-1) for tensor in tensors):
        rows = flat[: len(flat) // _ROW * _ROW].view(-1, _ROW)
        rest = flat[rows.numel() :]
        of_rows = torch.cat([torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(rest)[None]])
        norms.append(torch.linalg.vector_norm(of_rows, dtype=torch.float64).to(flat.dtype))
    return norms
