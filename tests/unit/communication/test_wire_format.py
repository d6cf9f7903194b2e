"""What travels: formats of the wire, there and back."""

from __future__ import annotations

import pytest
import torch

from bert_fast.communication.wire_format import wire_format


def test_wire_format_of_the_gradients_own_dtype_copies_nothing() -> None:
    bucket = torch.randn(8, dtype=torch.float64)
    wire = wire_format("fp32", torch.float64)
    assert wire.encode(0, bucket) is bucket
    wire.decode(bucket, bucket)
    wire.count(bucket)
    assert wire.bytes_sent == 64


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_wire_format_casts_there_and_back(name: str, dtype: torch.dtype) -> None:
    bucket = torch.randn(8)
    original = bucket.clone()
    wire = wire_format(name, torch.float32)
    sent = wire.encode(0, bucket)
    assert sent.dtype == dtype
    wire.count(sent)
    assert wire.bytes_sent == 16
    wire.decode(2 * sent, bucket)
    assert torch.equal(bucket, 2 * original.to(dtype).float())
