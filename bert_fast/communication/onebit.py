"""Wire format `onebit`: Adam's momentum, a bit for each number, after a phase of exact steps (1-bit Adam, arXiv 2102.02888).

    exact:       g is averaged over ranks; Adam
    compressed:  m_r = beta1 m + (1 - beta1) g_r is averaged as signs with error feedback, and is the new m of all ranks;
                 Adam with its second moment frozen

A sign has no zero. A number that never had a gradient, such as a position embedding beyond the longest sample, would drift by
what other numbers of its block have; so what has a second moment of zero when it is frozen stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.communication.buckets import GradientLayout
from bert_fast.communication.compressed import CompressedFormat
from bert_fast.communication.wire_format import WireFormat, Work
from bert_fast.compression.quantize import Sign

_BLOCK = 2048  # numbers that share a scale: with its 4 bytes 1.016 bits each

Moments = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class OneBit(CompressedFormat):
    """Gradients for `exact_steps` steps, then momentum as signs.

    num_exact_steps: steps before the first that sends momentum
    sent_momentum:   whether the last step's reduced gradients are the new momentum
    """

    sent_momentum = False

    def __init__(self, exact_steps: int, residual_dtype: str) -> None:
        super().__init__(Sign(_BLOCK), residual_dtype=residual_dtype)
        self.num_exact_steps, self._steps = exact_steps, 0
        self._moments: Moments | None = None
        self._beta1 = 0.0

    def begin(self, layout: GradientLayout, parameters: Sequence[torch.Tensor], num_ranks: int) -> None:
        super().begin(layout, parameters, num_ranks)
        self._layout = layout

    def attach(self, moments: Moments, beta1: float) -> None:
        """The optimizer's moments of a parameter, by its number: the first and the second, of its shape."""
        self._moments, self._beta1 = moments, beta1

    def encode(self, number: int, values: torch.Tensor) -> torch.Tensor:
        self.sent_momentum = self._steps >= self.num_exact_steps
        return self._encode_momentum(number, values) if self.sent_momentum else values

    def _encode_momentum(self, number: int, values: torch.Tensor) -> torch.Tensor:
        self._make_momentum(number, values)
        return super().encode(number, values)

    def _make_momentum(self, number: int, values: torch.Tensor) -> None:
        """Of a bucket's gradients, the part of the new momentum that is this rank's; in place."""
        for part, first, second in self._parts(number, values):
            part.mul_(1.0 - self._beta1).add_(first, alpha=self._beta1 / self.num_ranks).mul_(second > 0)

    def all_reduce(
        self, number: int, wire: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Work]:
        if not self.sent_momentum:
            yield from WireFormat.all_reduce(self, number, wire, values, group)
            return
        yield from super().all_reduce(number, wire, values, group)
        for part, _, second in self._parts(number, values):
            part.mul_(second > 0)

    def _parts(self, number: int, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of every parameter of a bucket: its part of `values`, and its moments, flat."""
        assert self._moments is not None, "attach() comes first"
        layout = self._layout
        start = layout.buckets[number].start
        for index in layout.buckets[number].parameters:
            begin = layout.offsets[index] - start
            first, second = self._moments(index)
            yield values[begin : begin + layout.numel[index]], first.reshape(-1), second.reshape(-1)

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        super().end_step(skipped)
        if not bool(skipped):  # the host has waited for it: these optimizers do not read it on the device
            self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps = state["steps"]

    def take_over(self, states: Sequence[dict[str, Any]], common: dict[str, Any]) -> None:
        super().take_over(states, common)
        self._steps = common["steps"]


def onebit(gradient_dtype: torch.dtype, scale: float, residual_dtype: str = "fp32", exact_steps: int = 0) -> WireFormat:
    """The entry of config.choices.WIRE_FORMATS."""
    return OneBit(exact_steps, residual_dtype)
