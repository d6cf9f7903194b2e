"""Codecs against a number at a time: bytes, rounding, blocks that are not full, numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from bert_fast.compression.quantize import (
    _FP16_FACTORS,
    Codec,
    Fp8,
    Int4,
    Int8,
    Sign,
    _fp8_as_fp16,
    pack_bits,
    unpack_bits,
)
from bert_fast.compression.topk import TopK

BLOCK = 16
CODECS: dict[str, Codec] = {
    "int8": Int8(BLOCK), "e4m3": Fp8(BLOCK), "e5m2": Fp8(BLOCK, "e5m2"), "int4": Int4(BLOCK), "sign": Sign(BLOCK),
    "topk": TopK(0.2, BLOCK, torch.float32), "topk_bf16": TopK(0.2, BLOCK),
}  # fmt: skip


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values * torch.logspace(-3, 3, shape[-1])


@pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 160, 163])
@pytest.mark.parametrize("name", CODECS)
def test_rows_take_the_bytes_they_say_and_do_not_depend_on_each_other(name: str, length: int) -> None:
    codec, values = CODECS[name], numbers(3, length)
    message = codec.encode(values)
    assert message.shape == (3, codec.num_bytes(length))
    assert message.dtype == torch.uint8
    assert codec.num_bytes(length) % 4 == 0
    whole = codec.decode(message, length)
    assert whole.shape == (3, length)
    assert whole.dtype == torch.float32
    for row in range(3):
        alone = codec.decode(codec.encode(values[row : row + 1]), length)
        assert torch.equal(alone[0], whole[row])


def plain_decoded(name: str, row: list[float]) -> list[float]:
    """What one block comes back as, a number at a time in fp64."""
    largest = max(abs(v) for v in row)
    if largest == 0:
        return [0.0] * len(row)
    if name in ("int8", "int4"):
        levels = 127 if name == "int8" else 7
        scale = largest / levels
        return [round(v / scale) * scale for v in row]
    if name == "sign":
        scale = math.sqrt(sum(v * v for v in row) / len(row))
        return [math.copysign(scale, v) for v in row]
    mantissa, top = (3, 448.0) if name == "e4m3" else (2, 57344.0)
    smallest = -6 if name == "e4m3" else -14
    scale = largest / top
    found = []
    for v in row:
        x = v / scale
        exponent = max(math.floor(math.log2(abs(x))), smallest) if x else smallest
        step = 2.0 ** (exponent - mantissa)
        found.append(round(x / step) * step * scale)
    return found


@pytest.mark.parametrize("name", ["int8", "e4m3", "e5m2", "int4", "sign"])
def test_a_block_comes_back_as_its_definition_says(name: str) -> None:
    values = numbers(1, 5 * BLOCK + 5, seed=3)
    values[0, BLOCK : 2 * BLOCK] = 0
    found = CODECS[name].decode(CODECS[name].encode(values), values.shape[1])[0]
    expected = [v for low in range(0, 85, BLOCK) for v in plain_decoded(name, values[0, low : low + BLOCK].tolist())]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-6, atol=0)


def test_top_k_keeps_the_largest_of_each_block_and_drops_the_rest() -> None:
    values = numbers(2, 3 * BLOCK + 3, seed=4)
    found = TopK(0.2, BLOCK, torch.float32).decode(TopK(0.2, BLOCK, torch.float32).encode(values), values.shape[1])
    for row in range(2):
        for low in range(0, values.shape[1], BLOCK):
            block, kept = values[row, low : low + BLOCK].tolist(), found[row, low : low + BLOCK].tolist()
            largest = sorted(range(len(block)), key=lambda i: -abs(block[i]))[: math.ceil(0.2 * BLOCK)]
            assert kept == [v if i in largest else 0.0 for i, v in enumerate(block)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", CODECS)
def test_a_number_that_is_not_finite_stays_visible_and_in_its_block(name: str, bad: float) -> None:
    values = numbers(1, 4 * BLOCK)
    values[0, BLOCK + 3] = bad
    found = CODECS[name].decode(CODECS[name].encode(values), 4 * BLOCK)[0].view(4, BLOCK)
    assert not torch.isfinite(found[1]).all()
    assert torch.isfinite(found[[0, 2, 3]]).all()


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e37])
@pytest.mark.parametrize("name", ["int8", "e4m3", "e5m2", "int4"])
def test_the_ends_of_fp32_are_no_reason_for_a_number_that_is_not_finite(name: str, size: float) -> None:
    values = numbers(1, BLOCK).sign() * size
    found = CODECS[name].decode(CODECS[name].encode(values), BLOCK)
    assert torch.isfinite(found).all()
    assert (found.abs() <= values.abs() * 1.0001).all()
    if size >= 1e-30:
        torch.testing.assert_close(found, values, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("codec", "share"),
    [(Int8(512), 0.27), (Fp8(512), 0.27), (TopK(0.01), 0.03), (Sign(2048), 0.035), (Int4(512), 0.14)],
)
def test_bytes_as_a_share_of_fp32(codec: Codec, share: float) -> None:
    assert codec.num_bytes(2_000_001) <= share * 4 * 2_000_001


def test_bits_are_packed_from_the_lowest() -> None:
    flags = torch.tensor([[True, False, True, False, False, False, False, True], [True] * 8])
    assert pack_bits(flags).tolist() == [[0b10000101], [255]]
    assert torch.equal(unpack_bits(pack_bits(flags)), flags.to(torch.uint8))


@pytest.mark.parametrize(
    ("fraction", "block", "what"),
    [(0.0, 16, "fraction of 0"), (1.5, 16, "fraction of 1.5"), (0.1, 2**15 + 1, "32,769 numbers has no 16-bit places")],
)
def test_top_k_refuses(fraction: float, block: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        TopK(fraction, block)


def test_the_largest_block_has_places() -> None:
    values = torch.zeros(1, 2**15)
    values[0, -1] = 3.0
    top = TopK(1 / 2**15, 2**15)
    assert torch.equal(top.decode(top.encode(values), 2**15), values)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_by_way_of_fp16_is_torchs_conversion(dtype: torch.dtype) -> None:
    """Of every code, subnormal numbers as well, but for e4m3's NaN, which no number is encoded as."""
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(dtype).to(torch.float32)
    found = _fp8_as_fp16(codes, dtype).to(torch.float32) * _FP16_FACTORS[dtype]
    checked = ~torch.isnan(expected)
    assert checked.sum() >= 250
    assert torch.equal(found[checked], expected[checked])
