"""Wire formats that only cast: fp32, bf16 and fp16."""

from __future__ import annotations

import torch

from bert_fast.communication.wire_format import WireFormat


def fp32(gradient_dtype: torch.dtype, scale: float) -> WireFormat:
    """The gradients' own dtype, which is fp32 in training and fp64 in tests; nothing is copied."""
    return WireFormat(gradient_dtype)


def bf16(gradient_dtype: torch.dtype, scale: float) -> WireFormat:
    """bf16, which has fp32's range and needs no scale."""
    return WireFormat(torch.bfloat16)


def fp16(gradient_dtype: torch.dtype, scale: float) -> WireFormat:
    """fp16, with values multiplied by `scale` on the wire (`wire_format.fp16_scale`)."""
    return WireFormat(torch.float16, scale)
