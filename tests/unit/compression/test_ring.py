"""Windows of compressed gradients against a plain matrix in fp64."""

from __future__ import annotations

import pytest
import torch

from bert_fast.compression.lowrank import PowerIteration, orthogonalize
from bert_fast.compression.ring import DenseWindow, LowRankWindow, SparseWindow, Window
from bert_fast.compression.topk import TopK

M, N = 6, 5003
SHAPES, WHOLE = [(50, 40), (30, 100)], 3
TOP_K = TopK(0.02, 256)


def gradient(step: int) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(step))


def push(window: Window, step: int) -> torch.Tensor:
    """Push a row made of the step's gradient, and return it whole."""
    values = gradient(step)
    if isinstance(window, DenseWindow):
        window.push(values)
        return values
    if isinstance(window, SparseWindow):
        places, selected = TOP_K.select(values[None])
        return window.push(places[0], selected[0])
    assert isinstance(window, LowRankWindow)
    factors = [
        (
            torch.randn(n, 2, generator=torch.Generator().manual_seed(step + n)),
            torch.randn(k, 2, generator=torch.Generator().manual_seed(step + k)),
        )
        for n, k in SHAPES
    ]
    window.push(factors, values[:WHOLE])
    return torch.cat([*((p @ q.T).view(-1) for p, q in factors), values[:WHOLE]])


def make(kind: str) -> Window:
    if kind == "dense":
        return DenseWindow(M, N)
    if kind == "sparse":
        return SparseWindow(M, N, TOP_K)
    return LowRankWindow(M, SHAPES, 2, WHOLE)


@pytest.mark.parametrize("steps", [0, 1, 5, 6, 7, 20])
@pytest.mark.parametrize("kind", ["dense", "sparse", "low_rank"])
def test_products_and_combinations_are_those_of_the_rows(kind: str, steps: int) -> None:
    window = make(kind)
    plain = torch.zeros(M, N, dtype=torch.float64)
    for step in range(steps):
        plain[step % M] = push(window, step)
    if steps:
        assert window.newest == (steps - 1) % M
    torch.testing.assert_close(window.gram, plain @ plain.T, rtol=1e-5, atol=1e-3)
    assert torch.equal(window.gram, window.gram.T)
    other = gradient(1000)
    torch.testing.assert_close(window.products(other), plain @ other.double(), rtol=1e-5, atol=1e-3)
    coefficients = torch.randn(M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = window.combine(coefficients)
    assert found.shape == (N,)
    torch.testing.assert_close(found.double(), coefficients @ plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", "sparse", "low_rank"])
def test_goes_on_from_its_state_bit_for_bit(kind: str) -> None:
    straight, first, second = make(kind), make(kind), make(kind)
    for step in range(12):
        push(straight, step)
    for step in range(8):
        push(first, step)
    second.load_state_dict(first.state_dict())
    for step in range(8, 12):
        push(second, step)
    assert (second.head, second.count) == (straight.head, straight.count)
    assert torch.equal(second.gram, straight.gram)
    assert all(torch.equal(a, b) for a, b in zip(second.tensors().values(), straight.tensors().values(), strict=True))
    with pytest.raises(ValueError, match="another size or format"):
        DenseWindow(M + 1, N).load_state_dict(first.state_dict())


def test_the_sparse_window_takes_four_bytes_for_each_number_selected() -> None:
    n = 1 << 20
    window = SparseWindow(16, n, TopK(0.01))
    assert window.num_bytes == pytest.approx(16 * 0.01 * 4 * n, rel=0.01)


def test_orthogonal_columns_span_what_there_was() -> None:
    matrices = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(0))
    matrices[1, :, 2] = matrices[1, :, 0] + 1e-5 * matrices[1, :, 2]  # nearly parallel
    matrices[2, :, 3] = 2 * matrices[2, :, 1]  # parallel
    matrices[2, :, 0] = 0
    found = orthogonalize(matrices)
    gram = found.mT @ found
    expected = torch.eye(4).repeat(3, 1, 1)
    expected[2, 3, 3] = expected[2, 0, 0] = 0
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found @ (found.mT @ matrices), matrices, rtol=0, atol=1e-4)


def test_power_iteration_finds_a_matrix_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 20), (40, 10), (30, 20), (5, 3)]
    matrices = [torch.randn(n, 3, generator=generator) @ torch.randn(3, k, generator=generator) for n, k in shapes]
    iteration = PowerIteration(shapes, 4)
    assert iteration.ranks == [4, 4, 4, 3]
    left, right = iteration.right(matrices, iteration.left(matrices))
    assert (len(left), len(right)) == (iteration.num_left, iteration.num_right)
    for found, matrix in zip(iteration.product(left, right), matrices, strict=True):
        torch.testing.assert_close(found, matrix, rtol=0, atol=2e-4)


def test_power_iteration_goes_on_from_the_last_step() -> None:
    """Warm start: the error of a fixed matrix falls to that of its singular vectors."""
    matrix = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    best = torch.linalg.svdvals(matrix)[2:].norm()
    iteration, errors = PowerIteration([(60, 50)], 2), []
    for _ in range(40):
        left, right = iteration.right([matrix], iteration.left([matrix]))
        iteration.start_from(right)
        errors.append(float((iteration.product(left, right)[0] - matrix).norm()))
    assert errors[-1] < errors[0]
    assert errors[-1] < best * 1.01
    again = PowerIteration([(60, 50)], 2, seed=9)
    again.load_state_dict(iteration.state_dict())
    assert torch.equal(again.left([matrix]), iteration.left([matrix]))
    with pytest.raises(ValueError, match="another rank"):
        PowerIteration([(60, 50)], 3).load_state_dict(iteration.state_dict())
