"""What travels: gradients in fp32, bf16 or fp16.

A wire format turns a bucket into the tensor that is reduced and back. It may keep state (error feedback); all ranks call
it for the same buckets in the same order.
"""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WireFormat:
    """A cast to `dtype` and back; the same dtype travels in place, without a copy."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.bytes_sent = 0

    def encode(self, bucket: torch.Tensor) -> torch.Tensor:
        """The tensor to reduce for a bucket (the bucket itself where no cast is needed)."""
        wire = bucket if bucket.dtype == self.dtype else bucket.to(self.dtype)
        self.bytes_sent += wire.numel() * wire.element_size()
        return wire

    def decode(self, wire: torch.Tensor, bucket: torch.Tensor) -> None:
        """Put the reduced tensor back into the bucket."""
        if wire is not bucket:
            bucket.copy_(wire)


def wire_format(name: str, gradient_dtype: torch.dtype) -> WireFormat:
    """The format of the config's `reduce_dtype`. `fp32` means the gradients' own dtype (fp64 in tests)."""
    return WireFormat(gradient_dtype if name == "fp32" else DTYPES[name])
