"""What CUDA compiles, compiled for the CPU, against the functions as they are written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bert_fast.compression import compiled, quantize, ring
from bert_fast.compression.native import windows
from bert_fast.compression.quantize import Codec, Fp8, Int4, Int8, Sign
from bert_fast.compression.ring import SparseWindow
from bert_fast.compression.topk import TopK

pytestmark = pytest.mark.slow


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All devices compile, and nothing is left to the loops in C."""
    for module in (quantize, ring):
        monkeypatch.setattr(module, "on", lambda _device, function: compiled._compiled(function))
    monkeypatch.setattr(windows, "library", lambda: None)
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "codec", [Int8(64), Fp8(64), Fp8(64, "e5m2"), Int4(64), Sign(64)], ids=lambda c: type(c).__name__
)
def test_a_codec(codec: Codec, everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for length in (640, 1000):
        values = torch.randn(3, length, generator=torch.Generator().manual_seed(length))
        message = codec.encode(values)
        decoded = codec.decode(message, length)
        with monkeypatch.context() as plain:
            plain.setattr(quantize, "on", compiled.on)
            expected = codec.decode(codec.encode(values), length)
            torch.testing.assert_close(decoded, codec.decode(message, length), rtol=1e-6, atol=0)
        # A product may be rounded in another way, and then lie on the other side of a half
        assert torch.isclose(decoded, expected, rtol=1e-5).float().mean() > 0.99
        assert (decoded - expected).abs().max() < values.abs().max() / 5


def test_a_window(everywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    top_k = TopK(0.05, 100)
    window = SparseWindow(7, 2050, top_k)
    for seed in range(9):
        places, values = top_k.select(torch.randn(1, 2050, generator=torch.Generator().manual_seed(seed)))
        window.push(places[0], values[0])
    values, coefficients = torch.randn(2050), torch.randn(7)
    found = window.products(values), window.combine(coefficients), window.combine_squares(coefficients)
    monkeypatch.setattr(ring, "on", compiled.on)
    expected = window.products(values), window.combine(coefficients), window.combine_squares(coefficients)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
