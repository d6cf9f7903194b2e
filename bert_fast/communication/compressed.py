"""Wire formats that send fewer bits and make up for it: int8, FP8 and block Top-K with error feedback.

An all-reduce of encoded numbers is an all-to-all and an all-gather. Of every bucket each rank owns a part: it gets the others'
messages of that part, decodes and adds them up in fp32, encodes the sum and sends it to all. A rank makes up for what its own
messages left out of its gradient, and an owner for what its message left out of the sum (two residuals, as in 1-bit Adam, arXiv
2102.02888, section 4). All ranks decode the same bytes, so that they have the same gradient to the last bit.

What is sent does not grow with the number of ranks: the bytes of a whole message for the all-to-all, and as many for the
all-gather.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.communication import p2p
from bert_fast.communication.buckets import GradientLayout
from bert_fast.communication.residuals import Residuals
from bert_fast.communication.wire_format import WireFormat, Work, start_gather
from bert_fast.compression.quantize import Codec, Fp8, Int8
from bert_fast.compression.topk import TopK

_BLOCK = 512  # numbers that share a scale: 8 bits, and 4 bytes for each block, are 0.252 of fp32
_TOP_K_BLOCK = 4096


class CompressedFormat(WireFormat):
    """Messages of a codec, with a residual of every bucket of this rank's gradient, and one of the parts that it owns."""

    stages = 2

    def __init__(self, codec: Codec, *, residual_dtype: str = "fp32") -> None:
        super().__init__(torch.float32)
        self._codec, self._residual_dtype = codec, residual_dtype

    def begin(self, layout: GradientLayout, parameters: Sequence[torch.Tensor], num_ranks: int) -> None:
        super().begin(layout, parameters, num_ranks)
        assert all((b.end - b.start) % num_ranks == 0 for b in layout.buckets), "the layout must have as many shards"
        rank = dist.get_rank() if dist.is_initialized() else 0
        device = parameters[0].device
        self._own = Residuals(layout, self._residual_dtype, device)
        self._owned = Residuals(layout, self._residual_dtype, device, part=rank, num_parts=num_ranks)

    def encode(self, number: int, values: torch.Tensor) -> torch.Tensor:
        corrected = self._own[number].correct(values)
        rows = corrected.view(self.num_ranks, -1)
        message = self._codec.encode(rows)
        self._own[number].keep(corrected, self._codec.decode(message, rows.shape[1]).reshape(-1))
        return message

    def all_reduce(
        self, number: int, wire: torch.Tensor, values: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Work]:
        length = len(values) // self.num_ranks
        part = torch.empty(length, device=values.device)
        yield from self._exchange(number, wire, part, group, share=0.5)
        corrected = self._owned[number].correct(part)
        message = self._codec.encode(corrected[None])
        self._owned[number].keep(corrected, self._codec.decode(message, length)[0])
        gathered = message.new_empty(self.num_ranks, message.shape[1])
        gathered[dist.get_rank(group)] = message[0]
        self.count(gathered, share=0.5)
        yield start_gather(gathered, 2 * number + 1, group)
        values.copy_(self._codec.decode(gathered, length).reshape(-1))

    def reduce_scatter(
        self, number: int, wire: torch.Tensor, shard: torch.Tensor, group: dist.ProcessGroup | None
    ) -> Iterator[Work]:
        yield from self._exchange(number, wire, shard, group, share=1.0)

    def _exchange(
        self, number: int, wire: torch.Tensor, part: torch.Tensor, group: dist.ProcessGroup | None, share: float
    ) -> Iterator[Work]:
        """Send the others their parts of a message; the sum of what came of this rank's goes into `part`."""
        received = torch.empty_like(wire)
        self.count(wire, share)
        yield _all_to_all(received, wire, 2 * number, group)
        torch.sum(self._codec.decode(received, len(part)), dim=0, out=part)

    def end_step(self, skipped: torch.Tensor | bool) -> None:
        self._own.end_step(skipped)
        self._owned.end_step(skipped)

    def state_dict(self) -> dict[str, Any]:
        return {"own": self._own.state_dict(), "owned": self._owned.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._own.fits(state["own"]) and self._owned.fits(state["owned"]):
            self._own.load_state_dict(state["own"])
            self._owned.load_state_dict(state["owned"])
        else:  # sizes of buckets may change from run to run
            self.take_over([state], state)

    def take_over(self, states: Sequence[dict[str, Any]], common: dict[str, Any]) -> None:
        # What an owner had not sent of a sum is as good as what a rank had not sent of its gradient
        self._own.take_over([part for state in states for part in (state["own"], state["owned"])])
        self._owned.take_over([])


def _all_to_all(received: torch.Tensor, sent: torch.Tensor, tag: int, group: dist.ProcessGroup | None) -> Work:
    """Row i of `sent` goes to rank i. On gloo, tags tell exchanges apart."""
    if dist.get_backend(group) == "gloo":
        return p2p.all_to_all(received, sent, tag, group)
    work: Work = dist.all_to_all_single(received, sent, group=group, async_op=True)
    return work


# ---- entries of config.choices.WIRE_FORMATS ---------------------------------------------------------------------------------


def int8_ef(gradient_dtype: torch.dtype, scale: float, residual_dtype: str = "fp32") -> WireFormat:
    """8 bits, with a scale for each 512 numbers."""
    return CompressedFormat(Int8(_BLOCK), residual_dtype=residual_dtype)


def fp8_ef(gradient_dtype: torch.dtype, scale: float, residual_dtype: str = "fp32") -> WireFormat:
    """FP8 (e4m3), with a scale for each 512 numbers."""
    return CompressedFormat(Fp8(_BLOCK), residual_dtype=residual_dtype)


def topk_ef(
    gradient_dtype: torch.dtype, scale: float, residual_dtype: str = "fp32", density: float = 0.01
) -> WireFormat:
    """The largest entries of each 4,096, as bf16."""
    return CompressedFormat(TopK(density, _TOP_K_BLOCK), residual_dtype=residual_dtype)
