"""Wire format `powersgd`: gradient matrices as products of two thin ones, with error feedback (PowerSGD, arXiv 1905.13727).

Of every bucket two all-reduces: of P = M Q for each matrix, with the numbers that are no matrix or that factors would not make
fewer, and of Q = M^T P. Both are sums over ranks, so that all ranks come to the same P Q^T, which is near the sum of the ranks'
matrices; each keeps what that misses of its own (algorithm 2). The next step begins with this step's Q.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.communication.buckets import BufferRange, GradientLayout
from bert_fast.communication.residuals import Residuals
from bert_fast.communication.wire_format import WireFormat, Work
from bert_fast.compression.error_feedback import ErrorFeedback
from bert_fast.compression.lowrank import PowerIteration, has_smaller_factors


class _Bucket:
    """The matrices of a bucket, their bases from step to step, and what was not sent."""

    def __init__(
        self,
        span: BufferRange,
        layout: GradientLayout,
        parameters: Sequence[torch.Tensor],
        rank: int,
        feedback: ErrorFeedback,
    ) -> None:
        device, self.feedback = parameters[0].device, feedback
        self._indices: list[int] = []
        self._matrices: list[tuple[int, torch.Size]] = []
        self._rest: list[tuple[int, int]] = []
        for index in span.parameters:
            shape, begin = parameters[index].shape, layout.offsets[index] - span.start
            if len(shape) == 2 and has_smaller_factors(shape[0], shape[1], rank):
                self._indices.append(index)
                self._matrices.append((begin, shape))
            else:
                self._rest.append((begin, shape.numel()))
        shapes = [(shape[0], shape[1]) for _, shape in self._matrices]
        self.iteration = PowerIteration(shapes, rank, device=device, seed=span.start)
        self._new_right: torch.Tensor | None = None  # Q of a step that has not ended

    def keep(self, corrected: torch.Tensor, sent: torch.Tensor, right: torch.Tensor) -> None:
        """`corrected` was to be sent, `sent` is this rank's share of what was, and the next step begins with `right`."""
        self.feedback.keep(corrected, sent)
        self._new_right = right

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        """A step that was skipped leaves residual and bases as they were."""
        self.feedback.end_step(skipped)
        if self._new_right is None:
            return
        if isinstance(skipped, torch.Tensor) and skipped.device.type != "cpu":  # the host need not wait for it
            self.iteration.start_from(torch.where(skipped > 0, self.iteration.basis(), self._new_right))
        elif not bool(skipped):
            self.iteration.start_from(self._new_right)
        self._new_right = None

    def bases(self) -> dict[int, torch.Tensor]:
        """Q [columns, rank] that the next step begins with, by the number of the parameter; copies."""
        self.end_step(False)
        flat = self.iteration.basis()
        factors = self.iteration.factors(torch.zeros(self.iteration.num_left, device=flat.device), flat)
        return {index: right.clone() for index, (_, right) in zip(self._indices, factors, strict=True)}

    def start_from(self, bases: dict[int, torch.Tensor]) -> None:
        """Begin the next step with these. Raises KeyError or ValueError where they are of other matrices."""
        self.iteration.start_from_each([bases[index] for index in self._indices])

    def matrices(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Views of the bucket's `values`."""
        return [values[begin : begin + shape.numel()].view(shape) for begin, shape in self._matrices]

    def rest(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Views of what is no matrix, or too small to gain by factors."""
        return [values[begin : begin + length] for begin, length in self._rest]


class PowerSgd(WireFormat):
    """Matrices of rank `rank`, after `exact_steps` steps in fp32."""

    stages = 2

    def __init__(self, rank: int, exact_steps: int, residual_dtype: str) -> None:
        super().__init__(torch.float32)
        self._rank, self._exact_steps, self._residual_dtype = rank, exact_steps, residual_dtype
        self._steps = 0

    def begin(self, layout: GradientLayout, parameters: Sequence[torch.Tensor], num_ranks: int) -> None:
        super().begin(layout, parameters, num_ranks)
        self._residuals = Residuals(layout, self._residual_dtype, parameters[0].device)
        self._buckets = [
            _Bucket(span, layout, parameters, self._rank, self._residuals[number])
            for number, span in enumerate(layout.buckets)
        ]

    def encode(self, number: int, values: torch.Tensor) -> torch.Tensor:
        if self._steps < self._exact_steps:
            return values
        bucket = self._buckets[number]
        bucket.end_step(False)  # of a caller that skips no steps
        corrected = bucket.feedback.correct(values)
        left = bucket.iteration.left(bucket.matrices(corrected))
        return torch.cat([left, *bucket.rest(corrected)])

    def all_reduce(
        self, number: int, wire: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Work]:
        if self._steps < self._exact_steps:
            yield from super().all_reduce(number, wire, values, group)
            return
        bucket = self._buckets[number]
        self.count(wire)
        yield dist.all_reduce(wire, group=group, async_op=True)
        left, rest = wire[: bucket.iteration.num_left], wire[bucket.iteration.num_left :]
        matrices = bucket.matrices(values)
        left, right = bucket.iteration.right(matrices, left)
        self.count(right)
        yield dist.all_reduce(right, group=group, async_op=True)
        sent = torch.zeros_like(values)  # what is no matrix was sent as it was
        received = bucket.iteration.product(left, right)
        for mine, theirs in zip(bucket.matrices(sent), received, strict=True):
            mine.copy_(theirs).div_(self.num_ranks)
        for mine, part in zip(bucket.rest(sent), bucket.rest(values), strict=True):
            mine.copy_(part)
        bucket.keep(values, sent, right)
        for matrix, theirs in zip(matrices, received, strict=True):
            matrix.copy_(theirs)
        for part, theirs in zip(bucket.rest(values), rest.split([len(p) for p in bucket.rest(values)]), strict=True):
            part.copy_(theirs)

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        self._steps += 1
        for bucket in self._buckets:
            bucket.end_step(skipped)

    def state_dict(self) -> dict[str, Any]:
        bases = {index: basis for bucket in self._buckets for index, basis in bucket.bases().items()}
        return {"steps": self._steps, "residuals": self._residuals.state_dict(), "bases": bases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._residuals.fits(state["residuals"]):
            self._residuals.load_state_dict(state["residuals"])
        else:  # sizes of buckets may change from run to run
            self._residuals.take_over([state["residuals"]])
        self._take_up_common(state)

    def take_over(self, states: Sequence[dict[str, Any]], common: dict[str, Any]) -> None:
        self._residuals.take_over([state["residuals"] for state in states])
        self._take_up_common(common)

    def _take_up_common(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        for bucket in self._buckets:
            bucket.start_from(state["bases"])


def powersgd(
    gradient_dtype: torch.dtype,
    scale: float,
    residual_dtype: str = "fp32",
    powersgd_rank: int = 4,
    exact_steps: int = 0,
) -> WireFormat:
    """The entry of config.choices.WIRE_FORMATS."""
    return PowerSgd(powersgd_rank, exact_steps, residual_dtype)
