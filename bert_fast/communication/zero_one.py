"""Wire format `zero_one`: 0/1 Adam's three kinds of steps (arXiv 2202.06009, sections 4 and 6; `bert_fast.optim.zero_one`).

before exact_steps: exact in the steps in which the second moment learns, whose distance doubles after every
    `var_update_scaler` of them; synced in all others
after:              local, but for every k-th step, which is synced. k doubles after every `local_step_scaler` steps, up to
    `local_step_clipper`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from bert_fast.communication.onebit import OneBit
from bert_fast.communication.wire_format import Work


class LocalSteps(Protocol):
    """What an optimizer says of its local steps."""

    summed_rates: float

    def rate(self) -> float: ...

    def local_sum(self, parameter: torch.Tensor) -> torch.Tensor | None: ...

    def sync_weights(self, average: Callable[[torch.Tensor], None]) -> None: ...


class ZeroOne(OneBit):
    """Gradients, momentum as signs, or nothing, as the step has it.

    kind: of the last step that was encoded: exact, synced or local
    """

    kind = "exact"

    def __init__(
        self,
        exact_steps: int,
        residual_dtype: str,
        var_update_scaler: int,
        local_step_scaler: int,
        local_step_clipper: int,
    ) -> None:
        super().__init__(exact_steps, residual_dtype)
        self._local_step_scaler, self._local_step_clipper = local_step_scaler, local_step_clipper
        self._variance_steps = _variance_steps(exact_steps, var_update_scaler)
        self._local: LocalSteps | None = None
        self._parameters: Sequence[torch.Tensor] = ()
        self._nonfinite: torch.Tensor | None = None

    def attach_local(self, local: LocalSteps, parameters: Sequence[torch.Tensor]) -> None:
        """The optimizer, and its parameters by their numbers."""
        self._local, self._parameters = local, parameters

    def kind_of(self, step: int) -> str:
        """What step number `step` is, counted from 0; the same on all ranks."""
        if step < self.num_exact_steps:
            return "exact" if step in self._variance_steps else "synced"
        since = step - self.num_exact_steps
        distance = min(2 ** min(since // self._local_step_scaler, 30), self._local_step_clipper)
        return "synced" if (since + 1) % distance == 0 else "local"

    def encode(self, number: int, values: torch.Tensor) -> torch.Tensor:
        self.kind = self.kind_of(self._steps)
        self.sent_momentum = self.kind == "synced"
        if self.kind == "local":
            values.mul_(self.num_ranks)
            bad = torch.linalg.vector_norm(values)[None] * 0.0
            self._nonfinite = bad if number == 0 or self._nonfinite is None else self._nonfinite + bad
        return self._encode_momentum(number, values) if self.sent_momentum else values

    def _make_momentum(self, number: int, values: torch.Tensor) -> None:
        super()._make_momentum(number, values)
        assert self._local is not None, "attach_local() comes first"
        summed, rate = self._local.summed_rates, self._local.rate()
        if not summed:
            return
        for index, (part, _, second) in zip(
            self._layout.buckets[number].parameters, self._parts(number, values), strict=True
        ):
            local = self._local.local_sum(self._parameters[index])
            assert local is not None, "all parameters have local steps"
            part.mul_(rate).add_(local.view(-1), alpha=1.0 / self.num_ranks).div_(summed + rate).mul_(second > 0)

    def all_reduce(
        self, number: int, wire: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Work]:
        if self.kind != "local":
            yield from super().all_reduce(number, wire, values, group)
        elif number == len(self._layout.buckets) - 1:  # all ranks skip a step together
            assert self._nonfinite is not None
            self.count(self._nonfinite)
            yield dist.all_reduce(self._nonfinite, group=group, async_op=True)
            values[:1] += self._nonfinite

    def sync_weights(self) -> None:
        if self._local is not None:
            self._local.sync_weights(self._average)

    def _average(self, values: torch.Tensor) -> None:
        if dist.is_initialized():
            self.count(values)
            dist.all_reduce(values.div_(self.num_ranks))


def _variance_steps(end: int, scaler: int) -> frozenset[int]:
    """The steps before `end` in which the second moment learns: their distance doubles after every `scaler` of them."""
    steps, step, distance = [], 0, 1
    while step < end:
        steps.append(step)
        if len(steps) % scaler == 0:
            distance *= 2
        step += distance
    return frozenset(steps)


def zero_one(
    gradient_dtype: torch.dtype,
    scale: float,
    residual_dtype: str = "fp32",
    exact_steps: int = 0,
    var_update_scaler: int = 16,
    local_step_scaler: int = 1000,
    local_step_clipper: int = 16,
) -> ZeroOne:
    """The entry of config.choices.WIRE_FORMATS."""
    return ZeroOne(exact_steps, residual_dtype, var_update_scaler, local_step_scaler, local_step_clipper)
