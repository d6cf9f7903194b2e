"""Averages of the weights over steps, which are evaluated and saved in place of the last weights.

An average is over what the optimizer of a rank updates: where it is sharded, each rank averages its own slices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from bert_fast.config import AveragingConfig
from bert_fast.config.choices import AVERAGES, find


class WeightAverage(ABC):
    """An average of parameters that is updated after steps. It never changes them but in `write_evaluated_weights`."""

    evaluates_other_weights = True

    def __init__(self, parameters: Sequence[torch.Tensor], config: AveragingConfig) -> None:
        """
        Args:
            parameters: of one dtype and on one device; what a rank updates, which may be nothing.
        """
        self._parameters = [parameter.detach() for parameter in parameters]
        self._config = config
        device = parameters[0].device if parameters else torch.device("cpu")
        self._count = torch.zeros((), dtype=torch.int64, device=device)  # of updates; skipped steps are none

    @property
    def count(self) -> int:
        """Number of updates so far. Waits for the device."""
        return int(self._count)

    def restore_count(self, count: int) -> None:
        """Begin where `count` updates have been made; `rows` are then the tensors to be filled."""
        self._count.fill_(count)

    @torch.no_grad()
    def after_step(self, number: int, is_finite: torch.Tensor) -> None:
        """Take up the weights after step `number`, counted from 1, if this step is one of those that are averaged.

        A step that was skipped changes nothing. Nothing here waits for the device.

        Args:
            is_finite: whether the step was made, 0-dim bool on the device of the parameters.
        """
        since_start = number - self._config.start_step
        if since_start > 0 and since_start % self._config.every_steps == 0:
            # It is elsewhere only before the first update of a rank without slices
            self._count = self._count.to(is_finite.device)
            if self._parameters:
                self._update(is_finite)
            self._count += is_finite

    @torch.no_grad()
    def write_evaluated_weights(self) -> None:
        """Put the average into the parameters, in place; before its first update they stay. The caller keeps the others."""
        if self._parameters and self.count:
            self._write()

    @abstractmethod
    def rows(self) -> list[list[torch.Tensor]]:
        """What a checkpoint holds: lists of tensors, each with one tensor, of as many elements, for each parameter."""

    @abstractmethod
    def _update(self, is_finite: torch.Tensor) -> None:
        """Take up the parameters, of which there are some, if `is_finite`; `_count` updates were before this one."""

    @abstractmethod
    def _write(self) -> None:
        """Put the average into the parameters."""


class ExponentialAverage(WeightAverage):
    """mean += (1 - d) (weights - mean), where update n, counted from 0, has d = min(decay, (1 + n) / (10 + n)).

    The first update takes the weights as they are. The bound on d is that of TensorFlow's ExponentialMovingAverage
    (`num_updates`).
    """

    def __init__(self, parameters: Sequence[torch.Tensor], config: AveragingConfig) -> None:
        super().__init__(parameters, config)
        self._mean = [torch.zeros_like(parameter) for parameter in self._parameters]

    def rows(self) -> list[list[torch.Tensor]]:
        return [self._mean] if self.count else []

    def _update(self, is_finite: torch.Tensor) -> None:
        n = self._count.double()
        decay = ((1 + n) / (10 + n)).clamp_max(self._config.decay)
        weight = torch.where(n == 0, 1.0, 1.0 - decay) * is_finite
        torch._foreach_lerp_(self._mean, self._parameters, [weight.to(self._mean[0].dtype)] * len(self._mean))

    def _write(self) -> None:
        torch._foreach_copy_(self._parameters, self._mean)


class LastAverage(WeightAverage):
    """The mean of the last `keep` snapshots of the weights; of fewer, until there are as many.

    Latest weight averaging (Kaddour, arXiv 2209.14981).
    """

    def __init__(self, parameters: Sequence[torch.Tensor], config: AveragingConfig) -> None:
        super().__init__(parameters, config)
        self._rings = [parameter.new_zeros(config.keep, parameter.numel()) for parameter in self._parameters]

    def rows(self) -> list[list[torch.Tensor]]:
        return [[ring[row] for ring in self._rings] for row in range(min(self.count, self._config.keep))]

    def _update(self, is_finite: torch.Tensor) -> None:
        row = (self._count % self._config.keep)[None]
        for parameter, ring in zip(self._parameters, self._rings, strict=True):
            snapshot = torch.where(is_finite, parameter.reshape(1, -1), ring.index_select(0, row))
            ring.index_copy_(0, row, snapshot)

    def _write(self) -> None:
        held = min(self.count, self._config.keep)
        for parameter, ring in zip(self._parameters, self._rings, strict=True):
            parameter.copy_(ring[:held].mean(dim=0).view_as(parameter))


def build_average(parameters: Sequence[torch.Tensor], config: AveragingConfig) -> WeightAverage | None:
    """The average that `config.method` names over the parameters; None where nothing is averaged."""
    if config.method == "none":
        return None
    average: WeightAverage = find(AVERAGES, config.method)(parameters, config)
    return average
