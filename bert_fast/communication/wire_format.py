"""What travels for a bucket of gradients, and by which collectives, whole or scattered.

The formats of a config are in `config.choices.WIRE_FORMATS`. A `WireFormat` is also the place for a lossy scheme with state
of its own (error feedback, warm-up, several collectives per bucket). The reducer calls `encode` once per bucket, in one fixed
order on all ranks, and then draws the bucket's collectives from `all_reduce` or `reduce_scatter` one by one: the first at once,
the next of bucket k when bucket k + 1 has started its first (or at the end of backward). So all ranks start all collectives in
the same order, whatever a scheme does. On gloo the hook waits there for the collective before; on NCCL only the stream does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.communication import p2p
from bert_fast.communication.buckets import GradientLayout
from bert_fast.config.choices import CLIP_MODES, WIRE_FORMATS, find

# torch 2.13 renamed them; images with older versions have only the old names
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Work = dist.Work | p2p.P2PWork


class WireFormat:
    """A cast to `dtype` and back; the same dtype travels in place, without a copy.

    stages:    the most collectives a bucket takes
    num_ranks: ranks that reduce with each other
    """

    stages = 1
    num_ranks = 1

    def __init__(self, dtype: torch.dtype, scale: float = 1.0) -> None:
        """
        Args:
            scale: what values are multiplied by on the wire (a power of two), see `fp16_scale`.
        """
        self.dtype, self.scale = dtype, scale
        self.bytes_sent = 0  # payload handed to collectives by this rank

    def begin(self, layout: GradientLayout, parameters: Sequence[torch.Tensor], num_ranks: int) -> None:
        """An engine is about to send the buckets of `layout`, made of these parameters' gradients, with so many ranks."""
        self.num_ranks = num_ranks

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        """The step counts, or was skipped (0-dim, above 0) as some rank's gradient was not finite."""

    def sync_weights(self) -> None:
        """Make the weights of all ranks the same, where a scheme lets them differ between exchanges. A collective."""

    def encode(self, number: int, values: torch.Tensor) -> torch.Tensor:
        """What the first collective of bucket `number` reads; not finite where `values` are not, or do not fit.

        Args:
            values: the bucket's gradients divided by the number of ranks, flat. May be changed.
        """
        if values.dtype == self.dtype:
            return values
        return torch.mul(values, self.scale, out=torch.empty_like(values, dtype=self.dtype))

    def all_reduce(
        self, number: int, wire: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Work]:
        """The collectives after which `values` hold the sum over ranks. Resumed after each when that has ended."""
        self.count(wire)
        yield dist.all_reduce(wire, group=group, async_op=True)
        self.decode(wire, values)

    @property
    def is_cast(self) -> bool:
        """Whether what travels of a bucket is its values in another dtype, so that several ranks' can be added up.

        A scheme with an encoding or a state of its own is none: it may keep what it has not sent of one rank's gradient.
        """
        own = type(self)
        return own.encode is WireFormat.encode and own.state_dict is WireFormat.state_dict

    def decode(self, wire: torch.Tensor, values: torch.Tensor) -> None:
        """Put what arrived into the bucket."""
        if wire is not values:
            values.copy_(wire)
            if self.scale != 1.0:  # not in the wire's format, in which small values would be lost after all
                values.mul_(1.0 / self.scale)

    def reduce_scatter(
        self, number: int, wire: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Work]:
        """As `all_reduce`, but only this rank's part of the sum, into `shard` [len(wire) / ranks]."""
        self.count(wire)
        if dist.get_backend(group) == "gloo":
            received = torch.empty_like(wire)
            yield p2p.all_to_all(received, wire, 2 * number, group)
            torch.sum(received.view(-1, len(shard)), dim=0, dtype=shard.dtype, out=shard)
            if self.scale != 1.0:
                shard.mul_(1.0 / self.scale)
            return
        part = shard if wire.dtype == shard.dtype else torch.empty_like(shard, dtype=wire.dtype)
        yield _reduce_scatter(part, wire, group=group, async_op=True)
        self.decode(part, shard)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, for its part of a checkpoint, as copies. A cast has none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of this rank in a checkpoint written by as many ranks.

        Raises:
            ValueError, KeyError: it is of another format or model.
        """

    def take_over(self, states: Sequence[dict[str, Any]], common: dict[str, Any]) -> None:
        """Take up what these ranks of a checkpoint, which was written by another number of ranks, had not sent yet.

        Every old rank is taken over by one new rank, so that the sum over ranks is the same as before. `common` is the state of
        the old rank 0, for what all ranks have alike. Raises as `load_state_dict`.
        """

    def count(self, wire: torch.Tensor, share: float = 1.0) -> None:
        """Account for a collective's payload. An all-to-all and an all-gather send half of what an all-reduce of as many
        bytes sends, and count half where they take its place (`share`)."""
        self.bytes_sent += round(share * wire.numel() * wire.element_size())


def start_gather(whole: torch.Tensor, tag: int, group: dist.ProcessGroup | None) -> Work:
    """Start to fill `whole`, of which this rank has its part. On gloo, tags tell exchanges apart."""
    if dist.get_backend(group) == "gloo":
        return p2p.all_gather(whole, tag, group)
    mine = whole.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    return _all_gather(whole, mine, group=group, async_op=True)


def fp16_scale(clip: str, max_norm: float, has_loss_scale: bool) -> float:
    """What keeps averaged gradients off fp16's ends: below 6e-8 an entry is lost, above 65,504 the step is.

    A rank sends its gradient divided by the number of ranks. With a loss scale that is large already. Clipped before the
    reduction, no sum exceeds `max_norm`, and is brought to 2^14 at the most; else sums up to 511 are let through.

    Args:
        clip: the mode, a name of `CLIP_MODES`.
    """
    if has_loss_scale:
        return 1.0
    usual = 2.0**7
    if CLIP_MODES[clip].bounds_sums:  # a threshold that never clips says nothing of sums
        return max(usual, 2.0 ** math.floor(math.log2(2**14 / max_norm)))
    return usual


def wire_format(name: str, gradient_dtype: torch.dtype, scale: float = 1.0, **settings: Any) -> WireFormat:
    """The format of the config's `reduce_dtype`, a name of `WIRE_FORMATS`.

    Args:
        scale: of `fp16_scale`, for a format of so narrow a range that it needs one.
        settings: what the format reads of `communication`; its own defaults where nothing is given.
    """
    wire: WireFormat = find(WIRE_FORMATS, name)(gradient_dtype, scale, **settings)
    return wire
