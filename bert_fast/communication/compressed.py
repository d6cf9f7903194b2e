"""Wire formats that send fewer bits and make up for it: int8, FP8 and block Top-K with error feedback.

An all-reduce of encoded numbers is an all-to-all and an all-gather. Of every bucket each rank owns a part: it gets the others'
messages of that part, decodes and adds them up in fp32, encodes the sum and sends it to all. A rank makes up for what its own
messages left out of its gradient, and an owner for what its message left out of the sum (two residuals, as in 1-bit Adam, arXiv
2102.02888, section 4). All ranks decode the same bytes, so that they have the same gradient to the last bit.

On several nodes with several ranks it has two levels: the ranks of a node exchange their messages and add them up, and encode
the sum anew, with a residual of its own, for the exchange with the ranks of the same local rank in the other nodes. So a node
sends and receives one message of a bucket, and not one for each of its ranks.

What a rank sends does not grow with the number of ranks: the bytes of a whole message for the all-to-all, and as many for the
all-gather; on two levels with r ranks on a node, 1 / r of both more.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.c10d import timeout_of_default_group
from bert_fast.communication import p2p
from bert_fast.communication.buckets import GradientLayout
from bert_fast.communication.residuals import Residuals
from bert_fast.communication.wire_format import WireFormat, Work, start_gather
from bert_fast.compression.quantize import Codec, Fp8, Int8
from bert_fast.compression.topk import TopK

# Numbers that share a scale of 4 bytes, which makes 0.258 and 0.252 of fp32's bytes. int8 has one distance between numbers in
# all of a block: with 512 of them, a tenth of the mini benchmark's gradient was rounded to zero, and what error feedback then
# sent at once made Adam's second moment 13 % larger; with 128 it was 0.3 %. FP8 is as exact for small numbers as for large.
_INT8_BLOCK, _FP8_BLOCK = 128, 512
_TOP_K_BLOCK = 4096


class CompressedFormat(WireFormat):
    """Messages of a codec. A message has a row for each rank's part of the bucket, in the order of ranks.

    Residuals: of this rank's gradient; on two levels, of its node's sum of the parts that ranks of its local rank own; and of
    the part that it owns.
    """

    def __init__(self, codec: Codec, *, residual_dtype: str = "fp32", ranks_per_node: int | None = None) -> None:
        """
        Args:
            ranks_per_node: consecutive ranks that are on one node; None: all.
        """
        super().__init__(torch.float32)
        self._codec, self._residual_dtype, self._ranks_per_node = codec, residual_dtype, ranks_per_node

    def begin(self, layout: GradientLayout, parameters: Sequence[torch.Tensor], num_ranks: int) -> None:
        super().begin(layout, parameters, num_ranks)
        assert all((b.end - b.start) % num_ranks == 0 for b in layout.buckets), "the layout must have as many shards"
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._node = _Node(rank, num_ranks, self._ranks_per_node or num_ranks)
        self.stages = 4 if self._node.has_two_levels else 2
        held: dict[str, Sequence[int]] = {"own": range(num_ranks), "owned": [rank]}
        if self._node.has_two_levels:
            held["node"] = self._node.same_local
        device = parameters[0].device
        if not dist.is_initialized():  # nothing will be sent
            held = {}
        self._residuals = {
            name: Residuals(layout, self._residual_dtype, device, shards=shards, num_shards=num_ranks)
            for name, shards in held.items()
        }

        if device.type == "cuda":  # compiled now, and not in the first step that compresses
            rows = torch.zeros(num_ranks, 4096, device=device)
            self._codec.decode(self._codec.encode(rows), rows.shape[1])

    def encode(self, number: int, values: torch.Tensor) -> torch.Tensor:
        return self._encode("own", number, values.view(self.num_ranks, -1))

    def all_reduce(
        self, number: int, wire: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Work]:
        length, node = len(values) // self.num_ranks, self._node
        part = torch.empty(length, device=values.device)
        yield from self._exchange(number, wire, part, group, share=0.5)
        message = self._encode("owned", number, part[None])
        if node.has_two_levels:
            across = yield from self._gather(number, message, node.across)
            within = yield from self._gather(number, across.view(1, -1), node.within)
            message = within.view(node.size, node.count, -1).transpose(0, 1).reshape(self.num_ranks, -1)
        else:
            message = yield from self._gather(number, message, group)
        values.copy_(self._codec.decode(message, length).reshape(-1))

    def reduce_scatter(
        self, number: int, wire: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Work]:
        yield from self._exchange(number, wire, shard, group, share=1.0)

    def _encode(self, residual: str, number: int, rows: torch.Tensor) -> torch.Tensor:
        """The message of rows [rows, length] with what this residual has of them, which keeps what the message leaves out."""
        feedback = self._residuals[residual][number]
        corrected = feedback.correct(rows.reshape(-1))
        message = self._codec.encode(corrected.view(rows.shape))
        feedback.keep(corrected, self._codec.decode(message, rows.shape[1]).reshape(-1))
        return message

    def _exchange(
        self, number: int, wire: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup | None, share: float
    ) -> Iterator[Work]:
        """Send the others their parts of a message; the sum of what came of this rank's goes into `part`."""
        node = self._node
        if node.has_two_levels:
            by_number = wire.view(node.count, node.size, -1).transpose(0, 1).contiguous()
            received = torch.empty_like(by_number)
            self.count(by_number, share)
            yield _all_to_all(received, by_number, 2 * number, node.within)
            rows = self._codec.decode(received.view(self.num_ranks, -1), len(part))
            of_node = rows.view(node.size, node.count, -1).sum(dim=0)
            wire, group = self._encode("node", number, of_node), node.across
        received = torch.empty_like(wire)
        self.count(wire, share)
        yield _all_to_all(received, wire, 2 * number, group)
        torch.sum(self._codec.decode(received, len(part)), dim=0, out=part)

    def _gather(
        self, number: int, message: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Generator[Work, None, torch.Tensor]:
        """Start to gather the messages [1, bytes] of a group; returns them [ranks, bytes]."""
        gathered = message.new_empty(dist.get_world_size(group), message.shape[1])
        gathered[dist.get_rank(group)] = message[0]
        self.count(gathered, share=0.5)
        yield start_gather(gathered, 2 * number + 1, group)
        return gathered

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        for each in self._residuals.values():
            each.end_step(skipped)

    def state_dict(self) -> dict[str, Any]:
        return {"residuals": {name: each.state_dict() for name, each in self._residuals.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved = state["residuals"]
        if saved.keys() == self._residuals.keys() and all(self._residuals[name].fits(saved[name]) for name in saved):
            for name, each in self._residuals.items():
                each.load_state_dict(saved[name])
        else:  # sizes of buckets, and nodes, may change from run to run
            self.take_over([state], state)

    def take_over(self, states: Sequence[dict[str, Any]], common: dict[str, Any]) -> None:
        # What a node or an owner had not sent of a sum is as good as what a rank had not sent of its gradient
        left_over = [each for state in states for each in state["residuals"].values()]
        for name, each in self._residuals.items():
            each.take_over(left_over if name == "own" else [])


class _Node:
    """Ranks by nodes of `size` consecutive ones. Making one is a collective where it has two levels.

    within:     the group of this rank's node
    across:     the group of the ranks that have this one's local rank in their nodes
    same_local: the global ranks of that group
    """

    within: dist.ProcessGroup | None = None
    across: dist.ProcessGroup | None = None

    def __init__(self, rank: int, num_ranks: int, size: int) -> None:
        self.size, self.count = size, num_ranks // size
        self.has_two_levels = 1 < size < num_ranks
        first = rank // size * size
        self.same_local = range(rank - first, num_ranks, size)
        if self.has_two_levels:
            timeout = timeout_of_default_group()
            for name, members in (("within", range(first, first + size)), ("across", self.same_local)):
                setattr(self, name, dist.new_group(members, timeout, use_local_synchronization=True))


def _all_to_all(received: torch.Tensor, sent: torch.Tensor, tag: int, group: dist.ProcessGroup | None) -> Work:
    """Row i of `sent` goes to rank i. On gloo, tags tell exchanges apart."""
    if dist.get_backend(group) == "gloo":
        return p2p.all_to_all(received, sent, tag, group)
    work: Work = dist.all_to_all_single(received, sent, group=group, async_op=True)
    return work


# ---- entries of config.choices.WIRE_FORMATS ---------------------------------------------------------------------------------


def int8_ef(
    gradient_dtype: torch.dtype, scale: float, residual_dtype: str = "fp32", ranks_per_node: int | None = None
) -> WireFormat:
    """8 bits, with a scale for each 128 numbers."""
    return CompressedFormat(Int8(_INT8_BLOCK), residual_dtype=residual_dtype, ranks_per_node=ranks_per_node)


def fp8_ef(
    gradient_dtype: torch.dtype, scale: float, residual_dtype: str = "fp32", ranks_per_node: int | None = None
) -> WireFormat:
    """FP8 (e4m3), with a scale for each 512 numbers."""
    return CompressedFormat(Fp8(_FP8_BLOCK), residual_dtype=residual_dtype, ranks_per_node=ranks_per_node)


def topk_ef(
    gradient_dtype: torch.dtype,
    scale: float,
    residual_dtype: str = "fp32",
    density: float = 0.01,
    ranks_per_node: int | None = None,
) -> WireFormat:
    """The largest entries of each 4,096, as bf16."""
    return CompressedFormat(TopK(density, _TOP_K_BLOCK), residual_dtype=residual_dtype, ranks_per_node=ranks_per_node)
