"""What a training step needs of communication, whichever engine does it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from bert_fast.communication.buckets import GradientLayout
from bert_fast.communication.clip import ClipStatistics
from bert_fast.communication.wire_format import WireFormat
from bert_fast.trace import Trace


@dataclass(frozen=True)
class UpdatedSlice:
    """Elements [begin, begin + parameter.numel()) of the model's flattened parameter number `index`.

    `parameter` is what the optimizer of this rank updates: the model's parameter itself, or a view of a part of it whose
    `grad` is the averaged gradient of that part.
    """

    index: int
    bucket: int
    begin: int
    parameter: nn.Parameter


class Engine(ABC):
    """Averages gradients over ranks. Use in every step, on every rank:

    `zero_grad()`, then for each micro-batch `with micro_batch(last): forward and backward through module`, then `finish()`,
    then the optimizer's update of `updated_slices()`, then `gather_weights()`. With `num_virtual_ranks` above 1,
    `end_virtual_rank()` comes after the last micro-batch of each virtual rank but the last.

    module:          what is called for the forward pass
    layout:          where gradients lie, in which clip groups and buckets
    wire:            what a bucket is sent as
    clip_statistics: how often and how strongly each group was clipped
    exposed_s:       seconds for which the host waited in the last `finish`
    weight_wait_s:   seconds for which the last forward pass waited for weights
    num_warmup_steps: steps that the engine needs before a result counts
    num_virtual_ranks: ranks whose micro-batches this rank runs in a step, one rank after the other
    """

    module: nn.Module
    layout: GradientLayout
    wire: WireFormat
    clip_statistics: ClipStatistics
    exposed_s: float = 0.0
    weight_wait_s: float = 0.0
    num_warmup_steps: int = 0
    num_virtual_ranks: int = 1
    _trace: Trace | None = None

    @abstractmethod
    def zero_grad(self) -> None:
        """Clear gradients, at the start of a step."""

    @abstractmethod
    def micro_batch(self, last: bool, scale: torch.Tensor | None = None) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch.

        Args:
            last: whether it is the last of the step: only then gradients are sent.
            scale: the loss scale it runs under, 0-dim.
        """

    def enable_virtual_ranks(self, count: int) -> None:
        """From now on every step runs the micro-batches of `count` ranks, so that gradients are averaged over
        `count` x world size. The wire format must be a cast (`WireFormat.is_cast`).

        Raises:
            NotImplementedError: this engine cannot clip between two virtual ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} does not compute virtual ranks")

    def end_virtual_rank(self) -> None:
        """The micro-batches so far since the last call, or since `zero_grad`, were all of a virtual rank: keep its gradient.

        Raises:
            NotImplementedError: this engine cannot clip between two virtual ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} does not compute virtual ranks")

    @abstractmethod
    def finish(self, update: Callable[[int, torch.Tensor], None] | None = None) -> torch.Tensor:
        """Wait until the averaged gradient is there, unscaled and clipped; returns its norm before a clip, 0-dim.

        Args:
            update: called for every bucket, in order, as soon as it is reduced, with its number and whether any rank's
                gradient is not finite (0-dim fp32: 0 or 1). Needs `enable_nonfinite_flag`.
        """

    def enable_nonfinite_flag(self) -> None:
        """From now on tell `update` whether any rank's gradient is not finite. A collective.

        Raises:
            NotImplementedError: this engine cannot update per bucket.
        """
        raise NotImplementedError(f"{type(self).__name__} does not update per bucket")

    @abstractmethod
    def reduced(self, number: int) -> torch.Tensor:
        """Where this rank finds the averaged gradient of bucket `number` after `finish`, flat."""

    @abstractmethod
    def updated_slices(self) -> list[UpdatedSlice]:
        """What this rank updates, in the order of buckets: every parameter, or its shards of them."""

    @property
    def is_sharded(self) -> bool:
        """Whether each rank updates a part of the weights only."""
        return False

    @property
    def holds_all_weights(self) -> bool:
        """Whether every rank has all weights between steps. Where not, a forward pass is a collective, and `updated_slices` are
        all that a rank has of the model."""
        return True

    def forget_gathered_weights(self) -> None:  # noqa: B027  # most engines gather nothing
        """After weights were written from outside of a step: copies that were gathered before are of no use any more."""

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank writes what it has of a model that is in parts: where nodes hold copies, one of them does."""
        return True

    def whole_weights(self) -> dict[str, torch.Tensor]:
        """All weights by name, on every rank. A collective where they are in parts."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def share_sums(self, sums: torch.Tensor) -> None:  # noqa: B027  # most engines hold whole parameters
        """Add `sums` over the ranks that hold parts of the same parameters, in place. A collective where it is sharded."""

    def gather_weights(self) -> None:  # noqa: B027  # a no-op where all ranks update all
        """After the update: start to send the weights that other ranks need. Nothing to do where all ranks update all."""

    def wait_pending(self) -> None:  # noqa: B027  # a no-op where nothing outlasts a step
        """Wait for what goes on beyond a step: afterwards weights may be read. Nothing goes on by default. A collective."""

    def set_trace(self, trace: Trace | None) -> None:
        """Record spans of what happens from now on, or stop recording."""
        self._trace = trace

    def counters(self) -> dict[str, int]:
        """Bytes that this rank handed to collectives since `reset_counters`: `gradient_bytes` and `weight_bytes`."""
        return {"gradient_bytes": self.wire.bytes_sent, "weight_bytes": 0}

    def count_replay(self, gradient_bytes: int) -> None:
        """A captured step ran again: its device operations did, the host's counts did not."""
        self.wire.bytes_sent += gradient_bytes
        self.clip_statistics.count_replay()

    def reset_counters(self) -> None:
        """Begin to count anew: bytes and clip statistics."""
        self.wire.bytes_sent = 0
        self.clip_statistics.read()
