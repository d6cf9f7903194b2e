"""The loops in C against the same in torch, over shapes, threads and numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bert_fast.compression import native
from bert_fast.compression.error_feedback import ErrorFeedback
from bert_fast.compression.native import windows
from bert_fast.compression.ring import SparseWindow
from bert_fast.compression.topk import TopK

pytestmark = pytest.mark.skipif(native.library() is None, reason="the loops in C were not built: no compiler")


@pytest.fixture(params=[1, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def filled(numel: int, m: int, density: float, block: int) -> SparseWindow:
    """A window that has gone round more than once."""
    generator = torch.Generator().manual_seed(numel)
    top_k = TopK(density, block)
    window = SparseWindow(m, numel, top_k)
    for _ in range(m + 2):
        places, values = top_k.select(torch.randn(1, numel, generator=generator))
        window.push(places[0], values[0])
    return window


SHAPES = [
    (1, 1, 1.0, 4),
    (1000, 3, 0.01, 100),
    (70_000, 16, 0.01, 100),
    (9_000, 700, 0.05, 64),
    (50_000, 5, 0.02, 32_768),
]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("numel", "m", "density", "block"), SHAPES)
def test_a_window_is_the_same_as_in_torch(
    monkeypatch: pytest.MonkeyPatch, numel: int, m: int, density: float, block: int
) -> None:
    window = filled(numel, m, density, block)
    generator = torch.Generator().manual_seed(1)
    values, coefficients = torch.randn(numel, generator=generator), torch.randn(m, generator=generator)
    ours = [window.products(values), window.combine(coefficients), window.combine_squares(coefficients), window.gram]
    monkeypatch.setattr(windows, "library", lambda: None)
    theirs = [window.products(values), window.combine(coefficients), window.combine_squares(coefficients)]
    theirs.append(filled(numel, m, density, block).gram)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6 * max(1.0, float(other.abs().max())))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1000, 7), (3, 600, 100), (2, 1, 5000)])
def test_the_largest_of_blocks_is_the_same_as_in_torch(shape: tuple[int, int, int]) -> None:
    blocks = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    blocks[0, 0] = 0.0
    blocks[-1, -1, -1] = -math.inf
    expected = blocks.abs().argmax(dim=-1, keepdim=True)
    found = windows.largest_of_blocks(blocks)
    assert found is not None
    assert torch.equal(found, expected)
    blocks[-1, -1, 0] = math.nan
    found = windows.largest_of_blocks(blocks)
    assert found is not None
    assert found[-1, -1, 0] == 0


def test_what_it_cannot_do_is_left_to_torch() -> None:
    assert windows.largest_of_blocks(torch.ones(1, 2, 3, dtype=torch.float64)) is None
    assert windows.largest_of_blocks(torch.ones(1, 3, 2).transpose(1, 2)) is None
    top_k = TopK(0.1, 10, torch.float32)
    window = SparseWindow(2, 20, top_k)
    places, values = top_k.select(torch.arange(20.0)[None])
    window.push(places[0], values[0])
    assert window.gram[0, 0] == 9.0**2 + 19.0**2


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("numel", "block"), [(1, 4), (99, 100), (100, 100), (70_050, 100), (5000, 3000)])
def test_a_pass_of_error_feedback_is_the_same_as_in_torch(
    monkeypatch: pytest.MonkeyPatch, numel: int, block: int
) -> None:
    """To the last bit: the sum, what is taken, what is left; over several steps."""
    top_k = TopK(1 / block, block)
    feedbacks = [ErrorFeedback(numel, storage="bf16", may_skip=False) for _ in range(2)]
    made = [SparseWindow(3, numel, top_k) for _ in range(2)]
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        gradient = torch.randn(numel, generator=generator)
        ours, theirs = gradient.clone(), gradient.clone()
        assert made[0].push_largest(ours, feedbacks[0])
        with monkeypatch.context() as plain:
            plain.setattr(windows, "library", lambda: None)
            assert not made[1].push_largest(theirs, feedbacks[1])
            corrected = feedbacks[1].correct(theirs)
            places, values = top_k.select(corrected[None])
            feedbacks[1].keep(corrected, made[1].push(places[0], values[0]))
        assert torch.equal(ours, corrected)
        assert torch.equal(feedbacks[0].residual(), feedbacks[1].residual())
        for name, tensor in made[0].tensors().items():
            assert torch.equal(tensor, made[1].tensors()[name])


def test_a_number_that_is_not_finite_is_taken() -> None:
    window, feedback = SparseWindow(2, 8, TopK(0.25, 4)), ErrorFeedback(8, storage="bf16", may_skip=False)
    assert window.push_largest(torch.tensor([1.0, 2.0, math.nan, 3.0, 1.0, -math.inf, 2.0, 3.0]), feedback)
    assert window.tensors()["places"][:, 0, 0].tolist() == [2, 1]
    assert not torch.isfinite(window.gram[0, 0])


@pytest.mark.parametrize(
    "settings", [{"storage": "fp32"}, {"storage": "int4"}, {"rounding": "stochastic"}, {"may_skip": True}]
)
def test_another_residual_is_left_to_torch(settings: dict[str, Any]) -> None:
    feedback = ErrorFeedback(8, **{"storage": "bf16", "may_skip": False, **settings})
    values = torch.ones(8)
    assert not SparseWindow(2, 8, TopK(0.25, 4)).push_largest(values, feedback)
    assert torch.equal(values, torch.ones(8))


def test_values_in_fp32_are_left_to_torch() -> None:
    """Which would be rounded to bf16."""
    feedback = ErrorFeedback(8, storage="bf16", may_skip=False)
    assert not SparseWindow(2, 8, TopK(0.25, 4, torch.float32)).push_largest(torch.ones(8), feedback)


def test_what_an_older_file_was_built_to_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setattr(native, "_VERSION", -1)
    assert native.library() is None
    monkeypatch.undo()
    native.library.cache_clear()
    assert native.library() is not None
