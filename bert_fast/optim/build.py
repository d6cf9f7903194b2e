"""The optimizer that a config names, and what a run must know of any optimizer.

A new optimizer is a subclass of `RunOptimizer`, a function that builds it, and an entry in `config.choices.OPTIMIZERS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from bert_fast.config import OptimizerConfig
from bert_fast.config.choices import OPTIMIZERS, find
from bert_fast.errors import UserError


class RunOptimizer(torch.optim.Optimizer):
    """A torch optimizer with what checkpoints, sharding and the finite check must know of it.

    Every tensor must be treated on its own, as `BucketwiseOptimizer` steps over some at a time, unless its entry in
    `OPTIMIZERS` says why it cannot be stepped so. The state of a parameter must be made in its first step: restoring a
    checkpoint clears it and fills it again.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    """Names in a parameter's state of the tensors that have the parameter's shape and format, such as moments. A checkpoint
    holds them, and a sharded run divides them over ranks."""

    step_dtype: ClassVar[torch.dtype | None] = None
    """Dtype of `step`, a 0-dim tensor in a parameter's state that counts its updates; None where its state has none."""

    scalar_names: ClassVar[dict[str, torch.dtype]] = {}
    """Names and dtypes of further 0-dim tensors in a parameter's state. They, and `step`, are equal for all parameters whose
    states have the same `state_names`: a checkpoint holds them once for each such kind of parameter."""

    group_state_names: ClassVar[tuple[str, ...]] = ()
    """Names of numbers in the parameter groups that change from step to step, the same on all ranks."""

    has_opaque_state: ClassVar[bool] = False
    """Whether the state may be of any shape and type. A checkpoint then holds all of it, with the parameter groups, as one
    block of bytes, that rank 0 writes, or each rank its own where the optimizer is sharded: then as many ranks must go on. The
    names above are not used."""

    evaluates_other_weights: ClassVar[bool] = False
    """Whether other weights than the trained ones are evaluated and exported; `write_evaluated_weights` makes them."""

    reads_found_inf: ClassVar[bool] = False
    """Whether `step` looks on the device at `found_inf`, an attribute that is then set before it (0-dim float32), and changes
    nothing where that is 1. Otherwise the host has to wait for the gradient's norm before every `step`."""

    share_squares: Callable[[list[torch.Tensor], torch.Tensor | None], torch.Tensor] | None = None
    """Set where parameters are pieces of tensors; an optimizer that needs norms of whole tensors calls it. It turns squared
    norms [k, n] of the parts (`bert_fast.parts`) that the given parameters hold, in order, into those of the whole parts. It
    is a collective: every rank calls it as often, with `([], None)` where it holds nothing."""

    share_sums: Callable[[Callable[[str], str], dict[str, torch.Tensor], int], dict[str, torch.Tensor]] | None = None
    """Set where parameters are pieces of tensors; an optimizer that needs sums over several tensors calls it. It turns sums
    [width] over this rank's pieces, by group, into those over all ranks, added up in fp64; the function names the group of a
    parameter's name. The result has every group of the model. It is a collective: every rank calls it as often, with `{}`
    where it holds nothing."""

    def state_device(self, parameter: torch.Tensor) -> torch.device:
        """Where the state of a parameter is kept."""
        return parameter.device

    def extra_state(self) -> dict[str, Any]:
        """With `has_opaque_state`: what is kept beside `state`, as plain values and copies of tensors."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what `extra_state` gave. Raises ValueError or KeyError where it is of another optimizer."""

    def clear_extra_state(self) -> None:
        """Be as `extra_state` was before the first step."""

    def write_evaluated_weights(self) -> None:
        """Put the weights that are evaluated into the parameters, in place. The caller puts the trained ones back."""

    def scalars(self) -> dict[str, dict[str, float]]:
        """`step` and the numbers of `scalar_names`, once for each kind of parameter, which `kind_of` names."""
        first_of_kind = {self.kind_of(entry): entry for entry in reversed(self.state.values())}
        names = self._scalar_dtypes()
        found = {
            kind: {name: float(entry[name]) for name in names if name in entry} for kind, entry in first_of_kind.items()
        }
        return {kind: found[kind] for kind in sorted(found) if found[kind]}

    def restore_scalars(self, parameter: torch.Tensor, saved: dict[str, dict[str, float]]) -> None:
        """Give a parameter, whose state tensors are there, what `scalars` said of its kind, before those tensors."""
        entry = self.state[parameter]
        values = saved.get(self.kind_of(entry), {})
        restored = {
            name: torch.tensor(values[name], dtype=dtype, device=parameter.device)
            for name, dtype in self._scalar_dtypes().items()
            if name in values
        }
        self.state[parameter] = {**restored, **entry}

    def kind_of(self, entry: dict[str, Any]) -> str:
        """The names of the state tensors that a parameter has: such as `exp_avg exp_avg_sq`, or `momentum_buffer`."""
        return " ".join(name for name in self.state_names if name in entry)

    def _scalar_dtypes(self) -> dict[str, torch.dtype]:
        step = {} if self.step_dtype is None else {"step": self.step_dtype}
        return {**step, **self.scalar_names}


def has_decay(name: str) -> bool:
    """Whether weight decay applies: not to biases and LayerNorm."""
    return not name.endswith("bias") and "norm" not in name


def layer_of(name: str) -> str:
    """The encoder layer that a parameter is in, or the first part of its name: `embeddings` or `heads`."""
    layer = re.match(r"layers\.\d+", name)
    return layer.group() if layer else name.partition(".")[0]


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups, in this order on every rank: those with `weight_decay`, and biases and LayerNorm without."""
    named = list(named_parameters)
    return [
        {"params": [p for name, p in named if has_decay(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not has_decay(name)], "weight_decay": 0.0},
    ]


def build_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> RunOptimizer:
    """The optimizer `config.name` over the parameters, in the groups of `decay_groups`.

    Raises:
        UserError: it needs a package that is not installed.
    """
    optimizer: RunOptimizer = find(OPTIMIZERS, config.name)(named_parameters, config)
    return optimizer


def missing_package(name: str) -> UserError:
    """The error of an optimizer whose package is not installed, with the command that installs it."""
    package = OPTIMIZERS[name].package
    return UserError(
        f"optimizer.name={name} needs the package {package}, which is not installed; "
        f"python -m pip install -c constraints.txt {package}"
    )
