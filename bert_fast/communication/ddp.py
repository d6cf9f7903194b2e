"""Engine `ddp`: torch's DistributedDataParallel with the same clipping as a communication hook and the same buckets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bert_fast.c10d import GradBucket
from bert_fast.communication.buckets import GradientLayout
from bert_fast.communication.clip import ClipStatistics, coefficient, group_threshold
from bert_fast.communication.engine import Engine, UpdatedSlice
from bert_fast.communication.wire_format import WireFormat
from bert_fast.config.choices import CLIP_MODES
from bert_fast.errors import UserError


class DdpEngine(Engine):
    """Engine `ddp`. Needs an initialised process group, the default one."""

    num_warmup_steps = 2  # DDP learns its bucket plan in the first backward

    def __init__(
        self,
        model: nn.Module,
        layout: GradientLayout,
        *,
        clip: str,
        max_norm: float,
        wire: WireFormat,
    ) -> None:
        mode = CLIP_MODES[clip]
        if mode.by_group and not layout.ordering.in_ready_order:
            raise UserError(
                "communication.engine=ddp fills its buckets in ready order, and these communication.clip_groups are not "
                "runs of it; use engine=bucketed, or clip_groups=layer, tensor or model"
            )
        if type(wire).all_reduce is not WireFormat.all_reduce:
            raise UserError(
                "communication.engine=ddp only casts; a format with collectives of its own needs engine=bucketed"
            )
        width = next(model.parameters()).element_size()
        caps = [sum(layout.numel[i] for i in b.parameters) * width / 2**20 for b in layout.buckets]
        self.layout, self.wire, self._mode, self._max_norm = layout, wire, mode, max_norm
        self._parameters = list(model.parameters())
        self._index = {id(p): i for i, p in enumerate(self._parameters)}
        names = [g.name for g in layout.groups] if mode.by_group else ["model"]
        self._threshold = group_threshold(max_norm, len(names))
        self._group_of = {i: number for number, g in enumerate(layout.groups) for i in g.parameters}
        self.clip_statistics = ClipStatistics(names, self._parameters[0].device)
        self._world = dist.get_world_size()
        wire.begin(layout, self._parameters, self._world)
        self._scale: torch.Tensor | None = None
        self._held: list[tuple[int, torch.Tensor, torch.futures.Future[torch.Tensor]]] = []
        self._steps = 0
        self._ddp = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            bucket_cap_mb_list=caps,  # type: ignore[arg-type]  # says int, but takes fractions of a MiB
        )
        self.module = self._ddp
        self._ddp.register_comm_hook(self, _hook)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def micro_batch(self, last: bool, scale: torch.Tensor | None = None) -> Iterator[None]:
        self._scale = scale
        if last:
            yield
            self._steps += 1
        else:
            with self._ddp.no_sync():
                yield

    def finish(self, update: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
        assert update is None, "enable_nonfinite_flag() has refused this"
        start = time.perf_counter()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if self._scale is not None:
            torch._foreach_mul_(gradients, 1.0 / self._scale)
        norm = _norm(gradients)
        if self._mode.after_reduce:
            value = coefficient(norm, self._max_norm)
            self.clip_statistics.add(0, value)
            torch._foreach_mul_(gradients, value)
        self.clip_statistics.end_step()
        self.exposed_s = time.perf_counter() - start  # DDP waits inside backward; its wait cannot be told apart
        return norm

    def reduced(self, number: int) -> torch.Tensor:
        gradients = [self._parameters[index].grad for index in self.layout.buckets[number].parameters]
        return torch.cat([gradient.view(-1) for gradient in gradients if gradient is not None])

    def updated_slices(self) -> list[UpdatedSlice]:
        return [
            UpdatedSlice(index, number, 0, self._parameters[index])
            for number, bucket in enumerate(self.layout.buckets)
            for index in bucket.parameters
        ]

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The hook: clip what the mode says, then average the bucket."""
        if self._mode.by_group:
            self._clip_groups(bucket)
        if not self._mode.delays_communication:
            return self._average(bucket.index(), bucket.buffer())
        promise: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._held.append((bucket.index(), bucket.buffer(), promise))
        if bucket.is_last():  # only now is the whole gradient known: nothing could leave earlier
            held, self._held = self._held, []
            value = coefficient(_norm([buffer for _, buffer, _ in held]), self._threshold, self._scale)
            self.clip_statistics.add(0, value)
            for number, buffer, waiting in held:
                buffer.mul_(value)
                self._average(number, buffer).add_done_callback(_passes_result_to(waiting))
        return promise

    def _clip_groups(self, bucket: GradBucket) -> None:
        members: dict[int, list[torch.Tensor]] = {}
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            members.setdefault(self._group_of[self._index[id(parameter)]], []).append(gradient)
        for group, gradients in members.items():
            if len(gradients) != len(self.layout.groups[group].parameters):
                if self._steps < self.num_warmup_steps:
                    return  # before DDP has rebuilt its buckets; the result of these steps is thrown away
                raise RuntimeError(f"DDP split clip group {self.layout.groups[group].name} over buckets")
            value = coefficient(_norm(gradients), self._threshold, self._scale)
            self.clip_statistics.add(group, value)
            torch._foreach_mul_(gradients, value)

    def _average(self, number: int, buffer: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        buffer.mul_(1.0 / self._world)
        wire = self.wire.encode(number, buffer)
        self.wire.count(wire)
        work = dist.all_reduce(wire, op=dist.ReduceOp.SUM, async_op=True)
        if self._trace and not buffer.is_cuda:
            ended = self._trace.begin("collectives", f"bucket {number}")
            work.get_future().add_done_callback(lambda _done: ended())

        def back(_done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
            self.wire.decode(wire, buffer)
            return buffer

        return work.get_future().then(back)


def _passes_result_to(
    promise: torch.futures.Future[torch.Tensor],
) -> Callable[[torch.futures.Future[torch.Tensor]], None]:
    return lambda done: promise.set_result(done.value())


def _hook(engine, bucket):  # type: ignore[no-untyped-def]  # DDP checks annotations and cannot read postponed ones
    return engine.reduce(bucket)


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
