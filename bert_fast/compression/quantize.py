"""Numbers in few bits: int8, two kinds of FP8, 4 bits and signs, each with a scale per block.

A codec turns rows of numbers into rows of bytes and back. A row is one message: its bytes hold the scales too, and all rows of
one length take the same number of bytes, so that a row per rank can be exchanged by one all-to-all. Scales come first, then the
codes, then zeros up to a multiple of 4 bytes (so that a row can be read in formats of up to 4 bytes).

Nothing here waits for the device. A block with a number that is not finite decodes to NaN, so that a damaged gradient is seen
on all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from bert_fast.compression.compiled import on

SCALE_BYTES = 4  # scales are fp32: of a narrower format, a block of tiny numbers would become zeros


class Codec(ABC):
    """Rows of fp32 numbers as rows of bytes."""

    @abstractmethod
    def num_bytes(self, length: int) -> int:
        """Bytes of a row of `length` numbers; a multiple of 4."""

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """uint8 [rows, num_bytes(length)] of fp32 `values` [rows, length]."""

    @abstractmethod
    def decode(self, message: torch.Tensor, length: int) -> torch.Tensor:
        """fp32 [rows, length] of what `encode` gave."""


class _BlockCodec(Codec):
    """A format with one scale for each `block` numbers of a row, of which the last block may be shorter."""

    bits = 8

    def __init__(self, block: int) -> None:
        self.block = block

    def num_bytes(self, length: int) -> int:
        blocks = -(-length // self.block)
        return SCALE_BYTES * blocks + _padded(-(-length * self.bits // 8))

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        rows, length = values.shape
        blocks = in_blocks(values, self.block)
        scales, codes = self._on(values.device, self._quantize)(blocks, length)
        codes = codes.view(rows, -1)[:, : -(-length * self.bits // 8)]
        message = values.new_zeros(rows, self.num_bytes(length), dtype=torch.uint8)
        end = scales[0].numel() * SCALE_BYTES
        message[:, :end] = scales.view(rows, -1).view(torch.uint8)
        message[:, end : end + codes.shape[1]] = codes
        return message

    def decode(self, message: torch.Tensor, length: int) -> torch.Tensor:
        rows, num_blocks = len(message), -(-length // self.block)
        end = num_blocks * SCALE_BYTES
        scales = message[:, :end].contiguous().view(torch.float32).view(rows, num_blocks, 1)
        num_codes = num_blocks * self.block * self.bits // 8
        codes = message.new_zeros(rows, num_codes)
        held = -(-length * self.bits // 8)
        codes[:, :held] = message[:, end : end + held]
        return self._on(message.device, self._values)(codes.view(rows, num_blocks, -1), scales).view(rows, -1)[
            :, :length
        ]

    def _on(self, device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
        return on(device, function)

    def _quantize(self, blocks: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales = self._scales(blocks, length)
        return scales, self._codes(blocks, scales)

    @abstractmethod
    def _scales(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        """fp32 [rows, blocks, 1] of [rows, blocks, block], whose numbers beyond `length` are zeros."""

    @abstractmethod
    def _codes(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """uint8 [rows, blocks, block * bits / 8]."""

    @abstractmethod
    def _values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """fp32 [rows, blocks, block]."""


class Int8(_BlockCodec):
    """Whole numbers from -127 to 127 times a block's largest magnitude / 127; rounds to the nearest."""

    def _scales(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        return blocks.abs().amax(dim=-1, keepdim=True) / 127.0

    def _codes(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.round(blocks * _inverse(scales)).to(torch.int8).view(torch.uint8)

    def _values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.int8) * scales


class Fp8(_BlockCodec):
    """OCP's 8-bit floating-point numbers: `e4m3` (3 bits of mantissa, up to 448) or `e5m2` (2 bits, up to 57,344)."""

    def __init__(self, block: int, kind: str = "e4m3") -> None:
        super().__init__(block)
        self.dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
        self._largest = torch.finfo(self.dtype).max

    def _on(self, device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
        # Triton has FP8 from compute capability 8.9 on; torch's own conversions work everywhere
        is_too_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)
        return function if is_too_old else on(device, function)

    def _scales(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        return blocks.abs().amax(dim=-1, keepdim=True) / self._largest

    def _codes(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        scaled = (blocks * _inverse(scales)).clamp_(-self._largest, self._largest)  # a product may round up
        return scaled.to(self.dtype).view(torch.uint8)

    def _values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        if codes.device.type == "cpu":  # where torch converts one number at a time
            return _fp8_as_fp16(codes, self.dtype).to(torch.float32) * (scales * _FP16_FACTORS[self.dtype])
        return codes.view(self.dtype).to(torch.float32) * scales


class Int4(_BlockCodec):
    """Whole numbers from -7 to 7 times a block's largest magnitude / 7, two to a byte; rounds to the nearest."""

    bits = 4

    def __init__(self, block: int) -> None:
        assert block % 2 == 0, "two numbers share a byte"
        super().__init__(block)

    def _scales(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        return blocks.abs().amax(dim=-1, keepdim=True) / 7.0

    def _codes(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        pairs = (torch.round(blocks * _inverse(scales)) + 8.0).to(torch.uint8).unflatten(-1, (-1, 2))
        return pairs[..., 0] | (pairs[..., 1] << 4)

    def _values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        return (pairs.to(torch.float32) - 8.0) * scales


class Sign(_BlockCodec):
    """A bit for each number: its sign, times the root mean square of its block (1-bit Adam, arXiv 2102.02888, section 4).

    Zero counts as positive, so that a block of zeros decodes to zeros and a zero in another block does not.
    """

    bits = 1

    def __init__(self, block: int) -> None:
        assert block % 8 == 0, "eight numbers share a byte"
        super().__init__(block)

    def _scales(self, blocks: torch.Tensor, length: int) -> torch.Tensor:
        held = torch.full(blocks.shape[1:2], float(self.block), device=blocks.device)
        held[-1] = length - (blocks.shape[1] - 1) * self.block  # what pads a block is no part of the mean
        return torch.linalg.vector_norm(blocks, dim=-1, keepdim=True) / held.sqrt()[:, None]

    def _codes(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return pack_bits(blocks >= 0)

    def _values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return (unpack_bits(codes).to(torch.float32) * 2.0 - 1.0) * scales


def pack_bits(flags: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n / 8] of bool [..., n]; the first of eight is the lowest bit."""
    weights = 1 << torch.arange(8, device=flags.device, dtype=torch.uint8)
    return (flags.unflatten(-1, (-1, 8)) * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 8 n], each 0 or 1, of what `pack_bits` gave."""
    shifts = torch.arange(8, device=codes.device, dtype=torch.uint8)
    return ((codes[..., None] >> shifts) & 1).flatten(-2)


# What FP8's bits in fp16's places are multiplied by: two to the difference of the biases of their exponents
_FP16_FACTORS = {torch.float8_e4m3fn: 2.0**8, torch.float8_e5m2: 1.0}


def _fp8_as_fp16(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp16 numbers with the signs, exponents and mantissas of FP8's: the values over `_FP16_FACTORS`, but for NaN."""
    wide = codes.to(torch.int16)
    if dtype == torch.float8_e5m2:
        return (wide << 8).view(torch.float16)
    return ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(torch.float16)


def in_blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """[rows, length] as [rows, blocks, block], with zeros at the end where the last block is not full."""
    rows, length = values.shape
    blocks = -(-length // block)
    if blocks * block != length:
        values = torch.nn.functional.pad(values, (0, blocks * block - length))
    return values.reshape(rows, blocks, block)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 of a block of zeros, or of numbers so small that the inverse does not fit."""
    inverse = 1.0 / scales
    return torch.where(torch.isinf(inverse), 0.0, inverse)


def _padded(count: int) -> int:
    return -(-count // 4) * 4
