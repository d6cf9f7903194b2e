"""A model whose passes wait instead of compute, as a host does while a GPU works: what is measured is scheduling."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bert_fast.cluster.backward_trace import model_trace
from bert_fast.model.loss import LossSums

LAYERS_NUMEL, BERT_NUMEL = (
    8_396_800,
    4_200_000,
)  # 33.6 MB of gradients: eight layers of 4.2 MB, 1,024 x 1,025; BERT's groups, half as much
_ROWS = 1024  # of a unit as a matrix
FORWARD_SHARE, UPDATE_SHARE = 0.5, 0.1  # of the time of backward


@dataclass(frozen=True)
class Unit:
    """Parameters that become ready together (a clip group), in the order of the forward pass."""

    name: str
    numel: int
    backward_s: float


def units_of(model: str, backward_s: float) -> list[Unit]:
    """`layers`: eight equal layers. `base`, `large`: BERT's groups, scaled to half that number of bytes, timed by FLOPs.

    The tied word embedding is in `embeddings`, the last to become ready.
    """
    if model == "layers":
        return [Unit(f"layers.{i}", LAYERS_NUMEL // 8, backward_s / 8) for i in range(8)]
    ready, sizes, names = model_trace(model, backward_s, 4, whole_groups=True)
    scale = scale_of(model)
    waits = [b - a for a, b in zip([0.0, *ready[:-1]], ready, strict=True)]
    return [
        Unit(name, int(size / 4 * scale), float(wait))
        for name, size, wait in zip(names[::-1], sizes[::-1], waits[::-1], strict=True)
    ]


def scale_of(model: str) -> float:
    """Bytes of the model's gradients over those of BERT in fp32; bucket sizes in MiB are scaled alike."""
    return 1.0 if model == "layers" else BERT_NUMEL * 4 / model_trace(model, 1.0, 4, whole_groups=True)[1].sum()


def numel_of(model: str) -> int:
    """Elements of the model that waits."""
    return LAYERS_NUMEL if model == "layers" else BERT_NUMEL


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        of_weight: torch.Tensor | None,
        forward_s: float,
        backward_s: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.of_weight, ctx.backward_s = of_weight, backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        time.sleep(ctx.backward_s)
        of_weight = torch.full_like(ctx.saved_tensors[0], 1e-3) if ctx.of_weight is None else ctx.of_weight.clone()
        return gradient, of_weight, None, None, None


class _Layer(nn.Module):
    def __init__(self, unit: Unit, as_matrices: bool) -> None:
        super().__init__()
        shape = (_ROWS, unit.numel // _ROWS) if as_matrices else (unit.numel,)
        self.weight = nn.Parameter(torch.zeros(shape))
        if as_matrices:
            self.register_buffer("gradient", torch.randn(shape) * 1e-3)
        self.unit = unit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Wait.apply(
            x, self.weight, getattr(self, "gradient", None), FORWARD_SHARE * self.unit.backward_s, self.unit.backward_s
        )


class WaitingModel(nn.Module):
    """One parameter a unit; `forward` takes a [1] tensor that requires a gradient."""

    def __init__(self, units: list[Unit], as_matrices: bool = False) -> None:
        """
        Args:
            as_matrices: parameters have two dimensions and random gradients, always the same; else one, and all alike.
        """
        super().__init__()
        for unit in units:
            parent: nn.Module = self
            *path, last = unit.name.split(".")
            for name in path:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            parent.add_module(last, _Layer(unit, as_matrices))
        self._layers = [module for module in self.modules() if isinstance(module, _Layer)]

    def forward(self, x: torch.Tensor) -> LossSums:
        for layer in self._layers:
            x = layer(x)
        nothing = torch.zeros(())
        return LossSums(x.sum(), nothing, nothing, nothing)


def slow_updates(optimizer: torch.optim.Optimizer, total: int, seconds: float) -> None:
    """Let the update of `total` elements take `seconds` longer, that of some of them their share."""
    step: Callable[[], Any] = optimizer.step

    def slow() -> None:
        step()
        numel = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        time.sleep(seconds * numel / total)

    optimizer.step = slow  # type: ignore[assignment]  # nobody calls it with a closure
