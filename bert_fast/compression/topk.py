"""Block Top-K: of every block of numbers those of the largest magnitude, as places of 16 bits and values.

Blocks keep places short and the selection local, so that no sort ever sees a whole tensor (arXiv 2306.06098 selects in blocks
as well). `encode` and `decode` are a `Codec` for the wire; `select` and `scatter` are what optimizers keep windows of.
"""

from __future__ import annotations

import math

import torch

from bert_fast.compression.native import windows
from bert_fast.compression.quantize import Codec, in_blocks

LARGEST_BLOCK = 2**15  # places are int16
_STRETCH = 2**14  # numbers that are looked through at a time


class TopK(Codec):
    """The ceil(`fraction` * block) largest of every block."""

    def __init__(self, fraction: float, block: int = 4096, dtype: torch.dtype = torch.bfloat16) -> None:
        """
        Args:
            dtype: of values: bf16 or fp32.

        Raises:
            ValueError: the block is too large for 16-bit places, or the fraction is none.
        """
        if not 0 < fraction <= 1:
            raise ValueError(f"a fraction of {fraction} of a block cannot be selected; give one above 0 and at most 1")
        if not 1 <= block <= LARGEST_BLOCK:
            raise ValueError(f"a block of {block:,} numbers has no 16-bit places; give at most {LARGEST_BLOCK:,}")
        self.fraction, self.block, self.dtype = fraction, block, dtype

    def shape(self, length: int) -> tuple[int, int]:
        """Blocks of a row of `length` numbers, and how many of each are selected. A short row is one block of its own."""
        block = self._block(length)
        return -(-length // block), math.ceil(self.fraction * block)

    def num_bytes(self, length: int) -> int:
        blocks, selected = self.shape(length)
        return -(-blocks * selected * (2 + self.dtype.itemsize) // 4) * 4

    def select(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in their block, int16, and values, `dtype`, both [rows, blocks, selected], of `values` [rows, length].

        A number that is not finite is among the largest.
        """
        length = values.shape[1]
        _, selected = self.shape(length)
        blocks = in_blocks(values, self._block(length))
        places = windows.largest_of_blocks(blocks) if selected == 1 else None
        if places is None:
            places = _largest(blocks, selected)
        return places.to(torch.int16), blocks.gather(-1, places).to(self.dtype)

    def scatter(self, places: torch.Tensor, values: torch.Tensor, length: int) -> torch.Tensor:
        """fp32 [rows, length] of what `select` gave, with zeros elsewhere."""
        block = self._block(length)
        whole = torch.zeros(*places.shape[:2], block, device=places.device)
        whole.scatter_(-1, places.to(torch.int64), values.to(torch.float32))
        return whole.view(len(places), -1)[:, :length]

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        rows, length = values.shape
        places, selected = self.select(values)
        message = values.new_zeros(rows, self.num_bytes(length), dtype=torch.uint8)
        as_bytes = [part.reshape(rows, -1).contiguous().view(torch.uint8) for part in (selected, places)]
        packed = torch.cat(as_bytes, dim=1)  # values first: they may need 4-byte alignment
        message[:, : packed.shape[1]] = packed
        return message

    def decode(self, message: torch.Tensor, length: int) -> torch.Tensor:
        rows, (blocks, selected) = len(message), self.shape(length)
        end = blocks * selected * self.dtype.itemsize
        values = message[:, :end].contiguous().view(self.dtype)
        places = message[:, end : end + blocks * selected * 2].contiguous().view(torch.int16)
        return self.scatter(places.view(rows, blocks, selected), values.view(rows, blocks, selected), length)

    def _block(self, length: int) -> int:
        return min(self.block, length)


def _largest(blocks: torch.Tensor, selected: int) -> torch.Tensor:
    """int64 [rows, blocks, selected]: the places of the largest magnitudes of [rows, blocks, block]."""
    if selected > 1:
        return torch.topk(blocks.abs(), selected, dim=-1, sorted=False).indices
    # Several times as fast on a CPU, where a stretch of blocks also stays in a core's cache
    together = max(1, _STRETCH // blocks.shape[-1]) if blocks.device.type == "cpu" else max(1, blocks.shape[1])
    return torch.cat([part.abs().argmax(dim=-1, keepdim=True) for part in blocks.split(together, dim=1)], dim=1)
