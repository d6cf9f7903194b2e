"""The sharded variant: reduce-scatter in backward, all-gather of the weights overlapped with the next forward pass.

Each rank keeps and updates one part (shard) of every bucket, so that optimizer state is divided by the number of ranks
(ZeRO, arXiv 1910.02054) and the second half of an all-reduce is off the critical path (as in DeAR, arXiv 2302.12445).
Weights and gradients lie in two flat buffers of one layout; shards are cut without regard to tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.communication import p2p
from bert_fast.communication.buckets import GradientLayout
from bert_fast.communication.engine import UpdatedSlice
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import WireFormat, Work, start_gather


@dataclass(frozen=True)
class ShardSlice:
    """The part of a tensor that lies in a rank's shard: elements [begin, end) of the flattened parameter."""

    index: int
    bucket: int
    begin: int
    end: int


def shard_slices(layout: GradientLayout, rank: int, world: int) -> list[ShardSlice]:
    """The parts of tensors in a rank's shards, in the order of buckets and of places in them."""
    slices = []
    for number, bucket in enumerate(layout.buckets):
        length = (bucket.end - bucket.start) // world
        first = bucket.start + rank * length
        for index in bucket.parameters:
            begin = max(0, first - layout.offsets[index])
            end = min(layout.numel[index], first + length - layout.offsets[index])
            if begin < end:
                slices.append(ShardSlice(index, number, begin, end))
    return slices


class FlatWeights:
    """One contiguous buffer for all weights; every parameter becomes a view of it."""

    def __init__(self, parameters: list[nn.Parameter], layout: GradientLayout) -> None:
        first = parameters[0]
        self.buffer = torch.zeros(layout.size, dtype=first.dtype, device=first.device)
        for parameter, offset, n in zip(parameters, layout.offsets, layout.numel, strict=True):
            view = self.buffer[offset : offset + n].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view


class ShardedReducer(BucketReducer):
    """As `BucketReducer`, but `finish` leaves each rank its shard of the averaged gradient.

    After the optimizer has updated `updated_slices`, `gather_weights` starts to send them; a module waits for its own weights
    when it is called. The layout must be made for as many `shards` as there are ranks.
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
    ) -> None:
        super().__init__(model, layout, clip=clip, max_norm=max_norm, wire=wire, group=group)
        self._rank = dist.get_rank(group)
        self._weights = FlatWeights(list(self._parameters), layout)
        self._gathering: dict[int, Work] = {}
        self._weight_bytes = 0
        self._updated: list[UpdatedSlice] = []
        for each in shard_slices(layout, self._rank, self._world):
            place = layout.offsets[each.index]
            begin, end = place + each.begin, place + each.end
            parameter = nn.Parameter(self._weights.buffer[begin:end])
            parameter.grad = self.gradients.buffer[begin:end]
            self._updated.append(UpdatedSlice(each.index, each.bucket, each.begin, parameter))
        index_of = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        for module in model.modules():
            own = {layout.bucket_of[index_of[id(p)]] for p in module.parameters(recurse=False)}
            if own:
                module.register_forward_pre_hook(self._before_forward(sorted(own, reverse=True)))
        model.register_state_dict_pre_hook(lambda *_: self.wait_pending())
        model.register_load_state_dict_pre_hook(lambda *_: self.wait_pending())

    def zero_grad(self) -> None:
        super().zero_grad()
        self.weight_wait_s = 0.0

    @property
    def is_sharded(self) -> bool:
        return True

    def updated_slices(self) -> list[UpdatedSlice]:
        return self._updated

    def share_sums(self, sums: torch.Tensor) -> None:
        dist.all_reduce(sums, group=self._flag_group)

    def counters(self) -> dict[str, int]:
        return {**super().counters(), "weight_bytes": self._weight_bytes}

    def reset_counters(self) -> None:
        super().reset_counters()
        self._weight_bytes = 0

    def reduced(self, number: int) -> torch.Tensor:
        return self._shard(self.gradients.buffer, number)

    def gather_weights(self) -> None:
        # In the order in which forward needs them
        self.wait_pending()  # of buckets that no module has asked for
        with self._on_comm_stream(after_backward=True):
            for number in reversed(range(len(self.layout.buckets))):
                bucket = self.layout.buckets[number]
                whole = self._weights.buffer[bucket.start : bucket.end]
                work = start_gather(whole, 2 * number + 1, self._group)
                self._gathering[number] = work
                self._weight_bytes += whole.numel() // self._world * whole.element_size()
                if self._trace and self._stream is None:
                    p2p.call_when_done(work, self._trace.begin("weights", bucket.name))

    def wait_pending(self) -> None:
        for number in list(self._gathering):
            self._wait_for(number)

    def _shard_start(self, number: int) -> int:
        """Where this rank's shard of a bucket begins in the flat buffers."""
        bucket = self.layout.buckets[number]
        return bucket.start + self._rank * ((bucket.end - bucket.start) // self._world)

    def _shard(self, buffer: torch.Tensor, number: int) -> torch.Tensor:
        bucket, start = self.layout.buckets[number], self._shard_start(number)
        return buffer[start : start + (bucket.end - bucket.start) // self._world]

    def _collectives(self, number: int, wire: torch.Tensor, values: torch.Tensor) -> Iterator[Work]:
        return self.wire.reduce_scatter(number, wire, self.reduced(number), self._group)

    def _norm(self) -> torch.Tensor:
        squares = torch.stack([torch.linalg.vector_norm(self.reduced(n)) ** 2 for n in range(len(self.layout.buckets))])
        total = squares.sum()
        dist.all_reduce(total, group=self._group)
        return total.sqrt()

    def _scale_reduced(self, value: torch.Tensor) -> None:
        for number in range(len(self.layout.buckets)):
            self.reduced(number).mul_(value)

    def _before_forward(self, buckets: list[int]) -> Callable[..., None]:
        def wait(*_: object) -> None:
            if self._gathering:
                start = time.perf_counter()
                for number in buckets:
                    self._wait_for(number)
                self.weight_wait_s += time.perf_counter() - start

        return torch.compiler.disable(wait)

    def _wait_for(self, number: int) -> None:
        work = self._gathering.pop(number, None)
        if work is not None:
            with self._traced("wait", f"weights of {self.layout.buckets[number].name}"):
                work.wait()
