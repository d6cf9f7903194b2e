"""LAMB (You et al., arXiv 1904.00962, algorithm 2) with the semantics of MLPerf's reference.

Bias-corrected moments; weight decay added to the update before the trust ratio |w| / |update|, which is taken tensor by
tensor of the reference: a parameter that declares parts (`bert_fast.parts`) has one ratio per part. Whether a group decays
(`weight_decay`) and whether it is adapted (`layer_adaptation`) are two settings. Clipping is not done here.

`optimizer.trust` has wider ratios than the reference. group: one for all tensors of an encoder layer, of the embeddings or of
the heads; global: one for the whole model. Then the norms are those of one flat vector of all these tensors, biases and
LayerNorm included, and all of it is scaled by the ratio; biases and LayerNorm still do not decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.optim.build import RunOptimizer, decay_groups, layer_of
from bert_fast.parts import parts_of

_ROW = 1024  # elements whose squares are added up at a time


@dataclass
class _Update:
    """What is to be subtracted from the parameters of a group: their updates, to be scaled by trust ratios, times `rate`."""

    parameters: list[torch.Tensor]
    updates: list[torch.Tensor]
    rate: Any  # a number or a 0-dim tensor


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
        trust_group_of: Callable[[str], str] | None = None,
        names: Mapping[torch.Tensor, str] | None = None,
    ) -> None:
        """
        Args:
            layer_adaptation: scale updates by trust ratios; can be set for each parameter group.
            trust_group_of: the name of the group that shares a trust ratio, of a parameter's name; None: each part of a
                tensor has its own.
            names: of the parameters, for `trust_group_of`.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "layer_adaptation": layer_adaptation,
        }
        super().__init__(params, defaults)
        self._trust_group_of, self._names = trust_group_of, dict(names or {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. Where `found_inf` is 1, weights, moments and counts stay as they are."""
        if self._trust_group_of is not None:
            self._step_by_trust_group(self._trust_group_of)
            return
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                update = self._advance(parameters, group)
                if group["layer_adaptation"]:
                    self._adapt_parts(update)
                _apply(update)
            elif self.share_squares and group["layer_adaptation"]:
                self.share_squares([], None)

    def _step_by_trust_group(self, group_of: Callable[[str], str]) -> None:
        """One update with a ratio for each group of tensors, which may lie in several parameter groups."""
        done, adapted = [], []
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                done.append(self._advance(parameters, group))
                if group["layer_adaptation"]:
                    adapted.append(done[-1])
        self._adapt_groups(adapted, group_of)
        for update in done:
            _apply(update)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=self.step_dtype, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _advance(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> _Update:
        """Bring the moments of a group up to date: the updates before any trust ratio, with decay."""
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
        updates = list(torch._foreach_div(torch._foreach_div(first, correction1), denominators))
        if group["weight_decay"] > 0:
            torch._foreach_add_(updates, torch._foreach_mul(parameters, group["weight_decay"]))
        return _Update(parameters, updates, rate)

    def _adapt_parts(self, update: _Update) -> None:
        """Scale the updates by a ratio for each part of a tensor."""
        parts = [each.split(parts_of(p)) for p, each in zip(update.parameters, update.updates, strict=True)]
        flat = [part for of_one in parts for part in of_one]
        norms = self._norms(update.parameters, flat)
        ratios = [_ratio(w, u) for w, u in zip(*norms, strict=True)]
        self._record_ratios(update.parameters, ratios)
        torch._foreach_mul_(flat, ratios)

    def _record_ratios(self, parameters: list[torch.Tensor], ratios: list[torch.Tensor]) -> None:
        """The updates of these parameters' parts, in order, are about to be scaled by these ratios."""

    def _adapt_groups(self, adapted: list[_Update], group_of: Callable[[str], str]) -> None:
        """Scale updates by a ratio for each group of tensors. A collective where tensors are in pieces."""
        parameters = [p for update in adapted for p in update.parameters]
        updates = [u for update in adapted for u in update.updates]
        groups = [group_of(self._names[p]) for p in parameters]
        squares: dict[str, list[torch.Tensor]] = {}
        if parameters:
            norms = torch.stack([torch.stack(norms_of(parameters)), torch.stack(norms_of(updates))])
            for group, pair in zip(groups, norms.square().unbind(1), strict=True):
                squares.setdefault(group, []).append(pair)
        sums = {group: torch.stack(pairs).sum(0) for group, pairs in squares.items()}
        if self.share_sums is not None:
            sums = self.share_sums(group_of, sums, 2)
        ratios = {group: _ratio(*pair.sqrt().unbind()) for group, pair in sums.items()}
        if updates:
            torch._foreach_mul_(updates, [ratios[group].to(updates[0].dtype) for group in groups])

    def _norms(self, parameters: list[torch.Tensor], updates: list[torch.Tensor]) -> Iterable[Iterable[torch.Tensor]]:
        """Norms of weights and of updates, of whole parts. `updates` are those of the parameters' parts, in order."""
        parts = [part for p in parameters for part in p.split(parts_of(p))]
        weights, steps = norms_of(parts), norms_of(updates)
        if self.share_squares is None:
            return weights, steps
        squares = self.share_squares(parameters, torch.stack([torch.stack(weights), torch.stack(steps)]).square())
        return squares.sqrt().unbind()


def _ratio(weight_norm: torch.Tensor, update_norm: torch.Tensor) -> torch.Tensor:
    return torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)


def _apply(update: _Update) -> None:
    torch._foreach_sub_(update.parameters, torch._foreach_mul(update.updates, update.rate))


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> Lamb:
    """LAMB with the groups of MLPerf's reference, or with the wider trust ratios that the config asks for.

    The reference leaves out the same names from weight decay and from layer adaptation, whatever the rate of decay.
    """
    named = list(named_parameters)
    decayed, plain = decay_groups(named, config.weight_decay)
    group_of = {"tensor": None, "group": layer_of, "global": lambda name: "model"}[config.trust]
    groups = [{**decayed, "layer_adaptation": True}, {**plain, "layer_adaptation": group_of is not None}]
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in named}
    betas = (config.beta1, config.beta2)
    return Lamb(groups, config.lr, betas, config.eps, config.weight_decay, trust_group_of=group_of, names=names)


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
