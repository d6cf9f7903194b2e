"""The overlapped reducer: hooks fill buckets during backward, a full bucket's collective starts at once.

Buckets leave in one fixed order on every rank (ready order), whatever order hooks fire in. Only the last micro-batch
of a step communicates; with clipping before the reduction, what is clipped is the rank's gradient summed over its
micro-batches. Averaging divides before the sum, so that fp16 cannot overflow by it. On CUDA clips, casts and collectives
have a stream of their own, so that backward goes on beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.communication.buckets import FlatGradients, Layout, Span
from bert_fast.communication.clip import ClipStatistics, coefficient, group_threshold
from bert_fast.communication.p2p import call_when_done
from bert_fast.communication.wire_format import WireFormat, Work
from bert_fast.trace import Trace, span_or_nothing


@dataclass
class _Exchange:
    """A bucket on its way: the collectives still to come, and the one that runs."""

    number: int
    rest: Iterator[Work]
    work: Work | None
    reduced: Callable[[], None] = lambda: None  # ends the bucket's span in a trace


class BucketReducer:
    """Engine `bucketed`. Use: `zero_grad`, then per micro-batch `with micro_batch(last): backward`, then `finish`."""

    def __init__(
        self, model: nn.Module, layout: Layout, *, clip: str, max_norm: float, wire: WireFormat,
        group: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        self.module = model
        self.layout = layout
        self.trace: Trace | None = None
        self._parameters: Sequence[nn.Parameter] = list(model.parameters())
        self.gradients = FlatGradients(self._parameters, layout)
        self._clip, self._max_norm, self.wire = clip, max_norm, wire
        self._group = group
        self._world = dist.get_world_size(group) if dist.is_initialized() else 1
        self._sends = dist.is_initialized()  # a process group of one rank sends too: that tests the way on one device
        groups = layout.groups if clip == "bucket_before_reduce" else (Span("model", layout.order, 0, layout.size),)
        self._threshold = group_threshold(max_norm, len(groups))
        self._groups_of = [layout.groups_in(bucket) for bucket in layout.buckets]
        self.clip_statistics = ClipStatistics([g.name for g in groups], self.gradients.buffer.device)
        self._full = [len(bucket.parameters) for bucket in layout.buckets]
        self._waiting = list(self._full)
        self._next = 0
        self._in_flight: list[_Exchange] = []
        self._armed = False
        self._scale: torch.Tensor | None = None
        self._watch: torch.Tensor | None = None
        self.small_group: dist.ProcessGroup | None = None  # for what must not queue behind buckets; the default without
        device = self.gradients.buffer.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
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
            self._waiting[:] = self._full
            self._next = 0
            self._in_flight.clear()  # of a step that an exception ended
        try:
            yield
        finally:
            self._armed = False

    def enable_nonfinite_flag(self) -> None:
        """From now on tell, at the end of backward, whether any rank's gradient is not finite. A collective.

        `finish` with `update` needs it: no weight may change in a step that is skipped. The flag travels in a group of its
        own, past the buckets that are still on the wire.
        """
        self._watch = torch.zeros((), device=self.gradients.buffer.device)
        if dist.is_initialized():
            self.small_group = dist.new_group()

    def finish(self, update: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
        """Wait for the collectives, unscale, clip after the reduction if asked. Returns the averaged gradient's norm.

        Args:
            update: called with the number of a bucket as soon as that is reduced, while later ones are on the wire, and with
                a 0-dim tensor that is 1 where a rank's gradient was not finite. Needs `enable_nonfinite_flag`.
        """
        start = time.perf_counter()
        with self._beside(after_backward=True):
            if self._clip == "global_before_reduce":
                self._clip_span(0, Span("model", self.layout.order, 0, self.layout.size))
            while self._next < len(self.layout.buckets):  # parameters without a gradient in this step count as zero
                self._launch()
            flag = self._share_flag() if update else None
            unscale = None if self._scale is None else 1.0 / self._scale  # `update` may change the scale
        updates_s = 0.0
        for exchange in self._in_flight:
            with self._beside():
                while exchange.work is not None:
                    self._advance(exchange)
                if unscale is not None:
                    self.reduced(exchange.number).mul_(unscale)
            exchange.reduced()
            if update and flag is not None:
                self._wait_beside()
                before = time.perf_counter()
                update(exchange.number, flag)
                updates_s += time.perf_counter() - before
        self._in_flight.clear()
        self._wait_beside()
        self.exposed_s = time.perf_counter() - start - updates_s
        norm = self._norm()
        if self._clip == "global_after_reduce":
            value = coefficient(norm, self._max_norm)
            self.clip_statistics.add(0, value)
            with self._traced("clip", "model"):
                self._scale_reduced(value)
        self.clip_statistics.end_step()
        return norm

    def reduced(self, number: int) -> torch.Tensor:
        """Where the averaged gradient of a bucket is after `finish`, flat."""
        return self.gradients.of(self.layout.buckets[number])

    def wait_pending(self) -> None:
        """Wait for what goes on beyond `finish` (nothing, in this engine): afterwards weights may be read."""

    def _norm(self) -> torch.Tensor:
        return torch.linalg.vector_norm(self.gradients.buffer)

    def _scale_reduced(self, value: torch.Tensor) -> None:
        self.gradients.buffer.mul_(value)

    def _share_flag(self) -> torch.Tensor:
        assert self._watch is not None, "enable_nonfinite_flag() first"
        flag = torch.isfinite(self._watch).logical_not().to(torch.float32)
        self._watch.zero_()
        if self._sends:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.small_group)
        return flag

    def _hook(self, bucket: int) -> Callable[[torch.Tensor], None]:
        waiting, overlaps = self._waiting, self._clip != "global_before_reduce"

        def ready(_parameter: torch.Tensor) -> None:  # once a tensor and step: as little as can be
            if self._armed:
                waiting[bucket] -= 1
                if overlaps and not waiting[bucket]:
                    self._leave()

        return ready

    def _leave(self) -> None:
        """Launch what is full and has no bucket before it that is not."""
        with self._beside(after_backward=True):
            while self._next < len(self._waiting) and self._waiting[self._next] == 0:
                self._launch()

    def _launch(self) -> None:
        """Clip the next bucket's groups and start its first collective, then the next of the buckets before it."""
        number = self._next
        bucket = self.layout.buckets[number]
        values = self.gradients.of(bucket)
        mine = _Exchange(number, iter(()), None)
        if self.trace:
            mine.reduced = self.trace.begin("buckets", bucket.name)
        if self._clip == "bucket_before_reduce":
            for group in self._groups_of[number]:
                self._clip_span(group, self.layout.groups[group], 1.0 / self._world)
        elif self._world > 1:
            values.mul_(1.0 / self._world)
        self._next += 1
        if not self._sends:
            self._look(values)
            self._in_flight.append(mine)
            return
        wire = self.wire.encode(number, values)
        self._look(wire)
        mine.rest = self._collectives(number, wire, values)
        self._start(mine)
        if self.wire.stages > 1:
            for exchange in self._in_flight:
                if exchange.work is not None:
                    self._advance(exchange)
        self._in_flight.append(mine)

    def _collectives(self, number: int, wire: torch.Tensor, values: torch.Tensor) -> Iterator[Work]:
        return self.wire.all_reduce(number, wire, values, self._group)

    def _start(self, exchange: _Exchange) -> None:
        """Start the next collective of a bucket, or note that there is none."""
        exchange.work = next(exchange.rest, None)
        if self.trace and exchange.work is not None:
            name = self.layout.buckets[exchange.number].name
            ended = self.trace.begin("collectives", name)
            if self._stream is None:
                call_when_done(exchange.work, ended)
            else:  # the host does not see when a collective ends; the profiler's own tracks do
                ended()

    def _advance(self, exchange: _Exchange) -> None:
        """Wait for a bucket's collective and start its next."""
        assert exchange.work is not None
        with self._traced("wait", self.layout.buckets[exchange.number].name):
            exchange.work.wait()
        self._start(exchange)

    def _look(self, values: torch.Tensor) -> None:
        """Remember whether what leaves is finite: a sum that is not finite stays so."""
        if self._watch is not None:
            wide = torch.promote_types(values.dtype, torch.float32)  # the norm of values that fit may not fit
            self._watch += torch.linalg.vector_norm(values, dtype=wide) * 0.0

    def _clip_span(self, group: int, span: Span, factor: float = 1.0) -> None:
        """Clip, and multiply by `factor` in the same pass."""
        with self._traced("clip", span.name):
            values = self.gradients.of(span)
            value = coefficient(torch.linalg.vector_norm(values), self._threshold, self._scale)
            self.clip_statistics.add(group, value)
            values.mul_(value if factor == 1.0 else value * factor)

    def _traced(self, track: str, name: str) -> AbstractContextManager[None]:
        return span_or_nothing(self.trace, track, name)

    @contextmanager
    def _beside(self, after_backward: bool = False) -> Iterator[None]:
        """Queue what follows on the communication stream (CUDA), behind what backward has queued so far if asked."""
        if self._stream is None:
            yield
            return
        if after_backward:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def _wait_beside(self) -> None:
        """Queue what follows behind the communication stream."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
