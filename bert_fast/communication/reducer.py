"""The overlapped reducer: hooks fill buckets during backward, a full bucket's collective starts at once.

Buckets leave in one fixed order on every rank (ready order), whatever order hooks fire in. Only the last micro-batch
of a step communicates; with clipping before the reduction, what is clipped is the rank's gradient summed over its
micro-batches. Averaging divides before the sum, so that fp16 cannot overflow by it. On CUDA clips, casts and collectives
have a stream of their own, so that backward goes on beside them.

With virtual ranks the gradient of each but the last is clipped, divided and cast as that rank would send it, and added to a
kept sum in the wire's dtype, in the order of ranks. The last one's buckets leave in backward with that sum added.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.c10d import timeout_of_default_group
from bert_fast.communication.buckets import BufferRange, FlatGradients, GradientLayout, GrowingGradients
from bert_fast.communication.clip import ClipStatistics, coefficient, group_threshold
from bert_fast.communication.engine import Engine, UpdatedSlice
from bert_fast.communication.p2p import call_when_done
from bert_fast.communication.wire_format import WireFormat, Work
from bert_fast.config.choices import CLIP_MODES
from bert_fast.trace import span_or_nothing


@dataclass
class _BucketInFlight:
    """A bucket on its way: the collectives still to come, and the one that runs."""

    number: int
    rest: Iterator[Work]
    work: Work | None
    end_span: Callable[[], None] = lambda: None  # of the bucket in a trace


class BucketReducer(Engine):
    """Engine `bucketed`: all-reduces every bucket as soon as backward has filled it.

    With `release_gradients` a bucket has memory from its first gradient in a step until it was used: by its update, where
    buckets are updated one by one, and else until the next step. `global_before_reduce`, which reads all gradients as one,
    needs the flat buffer.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: GradientLayout,
        *,
        clip: str,
        max_norm: float,
        wire: WireFormat,
        group: dist.ProcessGroup | None = None,
        release_gradients: bool = False,
    ) -> None:
        self.module = model
        self.layout = layout
        self._parameters: Sequence[nn.Parameter] = list(model.parameters())
        self._releases = release_gradients
        self.gradients = (GrowingGradients if release_gradients else FlatGradients)(self._parameters, layout)
        self._mode, self._max_norm, self.wire = CLIP_MODES[clip], max_norm, wire
        self._group = group
        self._world = dist.get_world_size(group) if dist.is_initialized() else 1
        wire.begin(layout, self._parameters, self._world)
        self._share = 1.0 / self._world  # of a rank in the average, virtual ranks counted
        self._kept: torch.Tensor | None = None  # sum over virtual ranks so far, as it would be on the wire
        self._num_kept = 0
        self._sends = dist.is_initialized()  # a process group of one rank sends too: that tests the way on one device
        groups = layout.groups if self._mode.by_group else (layout.whole(),)
        self._threshold = group_threshold(max_norm, len(groups))
        self._groups_of = [layout.groups_in(bucket) for bucket in layout.buckets]
        self.clip_statistics = ClipStatistics([g.name for g in groups], self.gradients.device)
        self._full = [len(bucket.parameters) for bucket in layout.buckets]
        self._waiting = list(self._full)
        self._next = 0
        self._in_flight: list[_BucketInFlight] = []
        self._sync_enabled = False
        self._scale: torch.Tensor | None = None
        self._nonfinite: torch.Tensor | None = None
        self._flag_group: dist.ProcessGroup | None = None  # for what must not queue behind buckets; else the default
        device = self.gradients.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for index, parameter in enumerate(self._parameters):
            parameter.register_post_accumulate_grad_hook(self._hook(layout.bucket_of[index]))

    def zero_grad(self) -> None:
        self.gradients.zero()
        self._num_kept = 0

    @contextmanager
    def micro_batch(self, last: bool, scale: torch.Tensor | None = None) -> Iterator[None]:
        self._sync_enabled, self._scale = last, scale
        if last:
            self._waiting[:] = self._full
            self._next = 0
            self._in_flight.clear()  # of a step that an exception ended
        try:
            yield
        finally:
            self._sync_enabled = False

    def enable_virtual_ranks(self, count: int) -> None:
        assert self.wire.is_cast, "other formats cannot be added up"
        self.num_virtual_ranks, self._share = count, 1.0 / (self._world * count)
        buffer = self.gradients.buffer
        self._kept = torch.zeros_like(buffer, dtype=self.wire.dtype) if count > 1 else None
        self.clip_statistics.num_per_step = count if self._mode.before_reduce else 1

    def end_virtual_rank(self) -> None:
        assert self._kept is not None, "enable_virtual_ranks() comes first"
        if self._mode.delays_communication:
            self._clip_range(0, self.layout.whole())
        for number, bucket in enumerate(self.layout.buckets):
            values = self._clip_and_divide(number)
            kept = self._kept[bucket.start : bucket.end]
            wire = self.wire.encode(number, values)
            kept.add_(wire) if self._num_kept else kept.copy_(wire)
        self._num_kept += 1
        self.clip_statistics.end_step()
        self.gradients.zero()

    def enable_nonfinite_flag(self) -> None:
        # The flag travels in a group of its own, past the buckets that are still on the wire
        self._nonfinite = torch.zeros((), device=self.gradients.device)
        if dist.is_initialized():
            self._flag_group = dist.new_group(timeout=timeout_of_default_group())

    def finish(self, update: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
        assert self._num_kept == self.num_virtual_ranks - 1, (
            "end_virtual_rank() follows every virtual rank but the last"
        )
        start = time.perf_counter()
        with self._on_comm_stream(after_backward=True):
            if self._mode.delays_communication:
                self._clip_range(0, self.layout.whole())
            while self._next < len(self.layout.buckets):  # parameters without a gradient in this step count as zero
                self._launch()
            flag = self._share_flag() if update else None
            unscale = None if self._scale is None else 1.0 / self._scale  # `update` may change the scale
        updates_s, norms = 0.0, []
        for pending in self._in_flight:
            with self._on_comm_stream():
                while pending.work is not None:
                    self._advance(pending)
                if unscale is not None:
                    self.reduced(pending.number).mul_(unscale)
            pending.end_span()
            if update and flag is not None:
                self._wait_comm_stream()
                before = time.perf_counter()
                if self._releases:  # it is gone when the others' norms are known
                    norms.append(torch.linalg.vector_norm(self.reduced(pending.number)))
                update(pending.number, flag)
                self.gradients.release(pending.number)
                updates_s += time.perf_counter() - before
        self._in_flight.clear()
        self._wait_comm_stream()
        self.exposed_s = time.perf_counter() - start - updates_s
        norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else self._norm()
        if self._mode.after_reduce:
            value = coefficient(norm, self._max_norm)
            self.clip_statistics.add(0, value)
            with self._traced("clip", "model"):
                self._scale_reduced(value)
        self.clip_statistics.end_step()
        return norm

    def reduced(self, number: int) -> torch.Tensor:
        return self.gradients.of(self.layout.buckets[number])

    def wait_pending(self) -> None:
        self.wire.sync_weights()

    def updated_slices(self) -> list[UpdatedSlice]:
        return [
            UpdatedSlice(index, number, 0, self._parameters[index])
            for number, bucket in enumerate(self.layout.buckets)
            for index in bucket.parameters
        ]

    def _norm(self) -> torch.Tensor:
        return self.gradients.norm()

    def _scale_reduced(self, value: torch.Tensor) -> None:
        self.gradients.scale(value)

    def _share_flag(self) -> torch.Tensor:
        assert self._nonfinite is not None, "enable_nonfinite_flag() comes first"
        flag = torch.isfinite(self._nonfinite).logical_not().to(torch.float32)
        self._nonfinite.zero_()
        if self._sends:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._flag_group)
        return flag

    def _hook(self, bucket: int) -> Callable[[torch.Tensor], None]:
        waiting, overlaps = self._waiting, not self._mode.delays_communication

        def ready(_parameter: torch.Tensor) -> None:  # called per tensor and step: keep it short
            if self._sync_enabled:
                waiting[bucket] -= 1
                if overlaps and not waiting[bucket]:
                    self._launch_full_buckets()

        return ready

    def _launch_full_buckets(self) -> None:
        """Launch full buckets in their order, up to the first that is not full."""
        with self._on_comm_stream(after_backward=True):
            while self._next < len(self._waiting) and self._waiting[self._next] == 0:
                self._launch()

    def _launch(self) -> None:
        """Clip the next bucket's groups and start its first collective, then the next of the buckets before it."""
        number = self._next
        mine = _BucketInFlight(number, iter(()), None)
        if self._trace:
            mine.end_span = self._trace.begin("buckets", self.layout.buckets[number].name)
        values = self._clip_and_divide(number)
        self._next += 1
        if not self._sends:
            if self._kept is not None:  # what virtual ranks would have sent is rounded as on the wire
                self.wire.decode(self._with_kept(number, values), values)
            self._accumulate_nonfinite(values)
            self._in_flight.append(mine)
            return
        wire = self._with_kept(number, values)
        self._accumulate_nonfinite(wire if wire.is_floating_point() else values)
        mine.rest = self._collectives(number, wire, values)
        self._start(mine)
        if self.wire.stages > 1:
            for pending in self._in_flight:
                if pending.work is not None:
                    self._advance(pending)
        self._in_flight.append(mine)

    def _clip_and_divide(self, number: int) -> torch.Tensor:
        """A bucket's gradients as a rank's part of the average, clipped where groups are; in place."""
        self.gradients.hold(number)
        values = self.gradients.of(self.layout.buckets[number])
        if self._mode.by_group:
            for group in self._groups_of[number]:
                self._clip_range(group, self.layout.groups[group], self._share)
        elif self._share != 1.0:
            values.mul_(self._share)
        return values

    def _with_kept(self, number: int, values: torch.Tensor) -> torch.Tensor:
        """What leaves of a bucket: its encoded values, and the kept sum of the virtual ranks before."""
        wire = self.wire.encode(number, values)
        if self._kept is None:
            return wire
        bucket = self.layout.buckets[number]
        return wire.add_(self._kept[bucket.start : bucket.end])

    def _collectives(self, number: int, wire: torch.Tensor, values: torch.Tensor) -> Iterator[Work]:
        return self.wire.all_reduce(number, wire, values, self._group)

    def _start(self, pending: _BucketInFlight) -> None:
        """Start the next collective of a bucket, or note that there is none."""
        pending.work = next(pending.rest, None)
        if self._trace and pending.work is not None:
            name = self.layout.buckets[pending.number].name
            ended = self._trace.begin("collectives", name)
            if self._stream is None:
                call_when_done(pending.work, ended)
            else:  # the host does not see when a collective ends; the profiler's own tracks do
                ended()

    def _advance(self, pending: _BucketInFlight) -> None:
        """Wait for a bucket's collective and start its next."""
        assert pending.work is not None
        with self._traced("wait", self.layout.buckets[pending.number].name):
            pending.work.wait()
        self._start(pending)

    def _accumulate_nonfinite(self, values: torch.Tensor) -> None:
        """Remember whether what leaves is finite: a sum that is not finite stays so."""
        if self._nonfinite is not None:
            wide = torch.promote_types(values.dtype, torch.float32)  # the norm of values that fit may not fit
            self._nonfinite += torch.linalg.vector_norm(values, dtype=wide) * 0.0

    def _clip_range(self, group: int, span: BufferRange, factor: float = 1.0) -> None:
        """Clip, and multiply by `factor` in the same pass."""
        with self._traced("clip", span.name):
            values = self.gradients.of(span)
            value = coefficient(torch.linalg.vector_norm(values), self._threshold, self._scale)
            self.clip_statistics.add(group, value)
            values.mul_(value if factor == 1.0 else value * factor)

    def _traced(self, track: str, name: str) -> AbstractContextManager[None]:
        return span_or_nothing(self._trace, track, name)

    @contextmanager
    def _on_comm_stream(self, after_backward: bool = False) -> Iterator[None]:
        """Queue what follows on the communication stream (CUDA), behind what backward has queued so far if asked."""
        if self._stream is None:
            yield
            return
        if after_backward:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def _wait_comm_stream(self) -> None:
        """Queue what follows behind the communication stream."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
