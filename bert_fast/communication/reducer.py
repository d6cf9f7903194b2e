"""The overlapped reducer: hooks fill buckets during backward, a full bucket's all-reduce starts at once.

Buckets leave in one fixed order on every rank (ready order), whatever order hooks fire in. Only the last micro-batch
of a step communicates; with clipping before the reduction, what is clipped is the rank's gradient summed over its
micro-batches. Averaging divides before the sum, so that fp16 cannot overflow by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.communication.buckets import FlatGradients, Layout, Span
from bert_fast.communication.clip import ClipStatistics, coefficient, group_threshold
from bert_fast.communication.compress import WireFormat


class BucketReducer:
    """Engine `bucketed`. Use: `zero_grad`, then per micro-batch `with micro_batch(last): backward`, then `finish`."""

    def __init__(
        self, model: nn.Module, layout: Layout, *, clip: str, max_norm: float, wire: WireFormat,
        group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        self.module = model
        self.layout = layout
        self._parameters: Sequence[nn.Parameter] = list(model.parameters())
        self.gradients = FlatGradients(self._parameters, layout)
        self._clip, self._max_norm, self.wire = clip, max_norm, wire
        self._group = group
        self._world = dist.get_world_size(group) if dist.is_initialized() else 1
        groups = layout.groups if clip == "bucket_before_reduce" else (Span("model", layout.order, 0, layout.size),)
        self._threshold = group_threshold(max_norm, len(groups))
        self._groups_of = [layout.groups_in(bucket) for bucket in layout.buckets]
        self.clip_statistics = ClipStatistics([g.name for g in groups], self.gradients.buffer.device)
        self._full = [len(bucket.parameters) for bucket in layout.buckets]
        self._waiting = list(self._full)
        self._next = 0
        self._in_flight: list[tuple[dist.Work | None, torch.Tensor, torch.Tensor]] = []
        self._armed = False
        self._scale: torch.Tensor | None = None
        self._watch: torch.Tensor | None = None
        self._flag_group: dist.ProcessGroup | None = None
        self.exposed_s = 0.0
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(layout.bucket_of[index]))

    def zero_grad(self) -> None:
        """Clear gradients. Views stay attached."""
        self.gradients.zero()

    @contextmanager
    def micro_batch(self, last: bool, scale: torch.Tensor | None = None) -> Iterator[None]:
        """Around forward and backward of one micro-batch; `scale` is the loss scale it runs under."""
        self._armed, self._scale = last, scale
        if last:
            self._waiting, self._next = list(self._full), 0
        yield
        self._armed = False

    def watch_finite(self) -> None:
        """From now on tell, at the end of backward, whether any rank's gradient is not finite. A collective.

        `finish` with `update` needs it: no weight may change in a step that is skipped. The flag travels in a group of its
        own, past the buckets that are still on the wire.
        """
        self._watch = torch.zeros((), device=self.gradients.buffer.device)
        if dist.is_initialized():
            self._flag_group = dist.new_group()

    def finish(self, update: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
        """Wait for the collectives, unscale, clip after the reduction if asked. Returns the averaged gradient's norm.

        Args:
            update: called with the number of a bucket as soon as that is reduced, while later ones are on the wire, and with
                a 0-dim tensor that is 1 where a rank's gradient was not finite. Needs `watch_finite`.
        """
        start = time.perf_counter()
        if self._clip == "global_before_reduce":
            self._clip_span(0, Span("model", self.layout.order, 0, self.layout.size))
        while self._next < len(self.layout.buckets):  # parameters without a gradient in this step count as zero
            self._launch()
        flag = self._share_flag() if update else None
        unscale = None if self._scale is None else 1.0 / self._scale  # `update` may change the scale
        updates_s = 0.0
        for number, (work, wire, bucket) in enumerate(self._in_flight):
            if work is not None:
                work.wait()
            self.wire.decode(wire, bucket)
            if unscale is not None:
                bucket.mul_(unscale)
            if update and flag is not None:
                before = time.perf_counter()
                update(number, flag)
                updates_s += time.perf_counter() - before
        self._in_flight.clear()
        self.exposed_s = time.perf_counter() - start - updates_s
        buffer = self.gradients.buffer
        norm = torch.linalg.vector_norm(buffer)
        if self._clip == "global_after_reduce":
            value = coefficient(norm, self._max_norm)
            self.clip_statistics.add(0, value)
            buffer.mul_(value)
        return norm

    def _share_flag(self) -> torch.Tensor:
        assert self._watch is not None, "watch_finite() first"
        flag = torch.isfinite(self._watch).logical_not().to(torch.float32)
        self._watch.zero_()
        if self._world > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._flag_group)
        return flag

    def _hook(self, bucket: int) -> Callable[[torch.Tensor], None]:
        def ready(_parameter: torch.Tensor) -> None:
            if not self._armed:
                return
            self._waiting[bucket] -= 1
            if self._clip != "global_before_reduce":
                while self._next < len(self._waiting) and self._waiting[self._next] == 0:
                    self._launch()

        return ready

    def _launch(self) -> None:
        """Clip the next bucket's groups and start its all-reduce."""
        bucket = self.layout.buckets[self._next]
        if self._clip == "bucket_before_reduce":
            for group in self._groups_of[self._next]:
                self._clip_span(group, self.layout.groups[group])
        self._next += 1
        values = self.gradients.of(bucket)
        if self._world == 1:
            self._look(values)
            self._in_flight.append((None, values, values))
            return
        values.mul_(1.0 / self._world)
        wire = self.wire.encode(values)
        self._look(wire)
        work = dist.all_reduce(wire, op=dist.ReduceOp.SUM, group=self._group, async_op=True)
        self._in_flight.append((work, wire, values))

    def _look(self, values: torch.Tensor) -> None:
        """Remember whether what leaves is finite: a sum that is not finite stays so."""
        if self._watch is not None:
            self._watch += torch.linalg.vector_norm(values) * 0.0

    def _clip_span(self, group: int, span: Span) -> None:
        values = self.gradients.of(span)
        value = coefficient(torch.linalg.vector_norm(values), self._threshold, self._scale)
        self.clip_statistics.add(group, value)
        values.mul_(value)
