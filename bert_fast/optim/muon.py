"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the encoder's matrices, AdamW for all else.

The momentum of a matrix is replaced by a matrix near to the closest one with orthonormal rows or columns: the quintic
Newton-Schulz iteration brings its singular values near one. Coefficients, Nesterov's momentum and the order of operations
are those of torch.optim.Muon; `match_rms_adamw` is the adjusted rate of arXiv 2502.16982, section 2.2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from bert_fast.config import OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.hardware import cpu_has_bf16
from bert_fast.optim.adamw import adam_settings
from bert_fast.optim.build import RunOptimizer, decay_groups
from bert_fast.parts import parts_of

_MATRICES = re.compile(r"layers\.\d+\.(qkv|attention_out|up|down)\.weight")
_A, _B, _C = 3.4445, -4.7750, 2.0315
_SMALLEST_NORM = 1e-7
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Muon(RunOptimizer):
    """Groups with `orthogonalize` have matrices, which Muon updates; AdamW, torch's fused form, updates the others.

    A matrix that declares parts (`bert_fast.parts`) is several, each orthogonalized by itself. Matrices of one shape are
    orthogonalized together, in one batch of products. `lr_scale` of a group multiplies the schedule's rate.
    """

    state_names = ("momentum_buffer", "exp_avg", "exp_avg_sq")  # the first of matrices, the others of the rest
    step_dtype = torch.float32  # of the rest; matrices count no steps
    reads_found_inf = True
    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update. Where `found_inf` is 1, weights, moments and counts stay as they are."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._update_matrices if group["orthogonalize"] else self._update_others)(parameters, group)

    def _update_matrices(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        gradients: list[torch.Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        momentum = group["momentum"]
        weight: Any = 1 - momentum
        rate: Any = group["lr"]
        if self.found_inf is not None:  # leave everything as it is, without asking the host
            keep = 1.0 - self.found_inf.to(parameters[0].dtype)
            gradients = [torch.where(keep > 0, g, 0.0) for g in gradients]
            weight, rate = weight * keep, rate * keep
        torch._foreach_mul_(momenta, 1 - weight)
        torch._foreach_add_(momenta, torch._foreach_mul(gradients, weight))
        updates = torch._foreach_lerp(gradients, momenta, momentum) if group["nesterov"] else momenta
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        self._subtract_orthogonalized(parameters, list(updates), rate, group)

    def _subtract_orthogonalized(
        self, parameters: list[torch.Tensor], updates: list[torch.Tensor], rate: Any, group: dict[str, Any]
    ) -> None:
        """Move each part of the parameters against its orthogonalized update, all parts of one shape together."""
        by_shape: dict[torch.Size, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for parameter, update in zip(parameters, updates, strict=True):
            sizes = parts_of(parameter)
            for part, of_part in zip(parameter.split(sizes), update.split(sizes), strict=True):
                targets, sources = by_shape.setdefault(part.shape, ([], []))
                targets.append(part)
                sources.append(of_part)
        for (rows, columns), (targets, sources) in by_shape.items():
            directions = orthogonalized(sources, group["newton_schulz_steps"], group["newton_schulz_dtype"])
            moves = directions.to(targets[0].dtype).mul_(rate * _adjustment(rows, columns, group["adjust_lr"]))
            torch._foreach_sub_(targets, list(moves.unbind()))

    def _update_others(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                # torch wants the count on the device for its fused form, and on the host for the others
                device = parameter.device if group["fused"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=self.step_dtype, device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrices: list[torch.Tensor], steps: int, dtype: torch.dtype) -> torch.Tensor:
    """Each matrix U S V^T with its singular values S brought near one, by Newton-Schulz iterations in `dtype`.

    With X = M / |M|, each iteration is X <- a X + (b X X^T + c (X X^T)^2) X, over the smaller of both dimensions.

    Args:
        matrices: [rows, columns] each, of one shape and on one device.
        steps: number of iterations.

    Returns:
        [matrices, rows, columns], of `dtype`.
    """
    batch = torch.stack([matrix.to(dtype) for matrix in matrices])
    is_tall = batch.shape[1] > batch.shape[2]
    if is_tall:
        batch = batch.mT.contiguous()
    # Rows first: adding up all squares of a large matrix one after the other would lose digits on a CPU
    of_rows = torch.linalg.vector_norm(batch, dim=2, dtype=torch.promote_types(dtype, torch.float32))
    norms = torch.linalg.vector_norm(of_rows, dim=1).clamp_min(_SMALLEST_NORM)
    batch = batch.div_(norms.to(dtype)[:, None, None])
    for _ in range(steps):
        gram = torch.bmm(batch, batch.mT)
        batch = torch.baddbmm(batch, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), batch, beta=_A)
    return batch.mT if is_tall else batch


def _adjustment(rows: int, columns: int, kind: str) -> float:
    """Factor of the learning rate for a matrix: `optimizer.adjust_lr`."""
    if kind == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def build(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> Muon:
    """Muon over the encoder's matrices, chosen by name, and AdamW over the others in the groups of `decay_groups`.

    Raises:
        UserError: a parameter has the name of a matrix, and another number of dimensions.
    """
    named = list(named_parameters)
    matrices = [(name, p) for name, p in named if _MATRICES.fullmatch(name)]
    for name, parameter in matrices:
        if parameter.dim() != 2:
            raise UserError(
                f"optimizer.name=muon: {name} has {parameter.dim()} dimension(s), of shape {list(parameter.shape)}, and only "
                "matrices can be orthogonalized; set optimizer.name=adamw"
            )
    others = decay_groups([(name, p) for name, p in named if not _MATRICES.fullmatch(name)], config.weight_decay)
    scale = 1.0 if config.muon_lr is None else config.muon_lr / config.lr
    device = named[0][1].device if named else torch.device("cpu")
    orthogonal = {
        "params": [p for _, p in matrices],
        "orthogonalize": True,
        "lr": config.lr * scale,
        "lr_scale": scale,
        "weight_decay": config.weight_decay,
        "momentum": 0.95 if config.momentum is None else config.momentum,
        "nesterov": config.nesterov,
        "newton_schulz_steps": config.newton_schulz_steps,
        "newton_schulz_dtype": _pick_dtype(config.newton_schulz_dtype, device),
        "adjust_lr": config.adjust_lr,
    }
    plain = [{**group, **adam_settings(config), "orthogonalize": False, "fused": True} for group in others]
    return Muon([orthogonal, *plain], {"lr": config.lr})


def _pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The format that the config names; `auto`: bf16 where the device multiplies it in hardware, and else fp32."""
    if name == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        name = "bf16" if has_bf16 else "fp32"
    return _DTYPES[name]
