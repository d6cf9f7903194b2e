"""M-FAC, GGT and MicroAdam against plain fp64 statements; state, groups, decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from bert_fast.compression.ring import DenseWindow, SparseWindow, Window
from bert_fast.compression.topk import TopK
from bert_fast.config import ModelConfig, OptimizerConfig
from bert_fast.model.bert import BertForPretraining
from bert_fast.optim.build import build_optimizer
from bert_fast.optim.opaque import load_opaque_state, opaque_state
from bert_fast.optim.preconditioned import Preconditioned, ggt, mfac, micro_adam

M, N = 16, 4000
NAMES = ["mfac", "mfac_sparse", "mfac_lowrank", "ggt", "ggt_sparse", "micro_adam"]


def gradient(step: int, n: int) -> torch.Tensor:
    return 3e-2 * torch.randn(n, generator=torch.Generator().manual_seed(step))


def filled(kind: str, steps: int, n: int = N) -> tuple[Window, torch.Tensor]:
    """A window after so many gradients, and its rows in fp64, the oldest first."""
    rows = []
    if kind == "dense":
        dense = DenseWindow(M, n)
        for step in range(steps):
            dense.push(gradient(step, n))
            rows.append(gradient(step, n))
        return dense, torch.stack(rows[-M:]).double()
    top_k = TopK(0.01, 1000)
    sparse = SparseWindow(M, n, top_k)
    for step in range(steps):
        places, values = top_k.select(gradient(step, n)[None])
        rows.append(sparse.push(places[0], values[0]))
    return sparse, torch.stack(rows[-M:]).double()


def sherman_morrison(rows: torch.Tensor, damping: float, x: torch.Tensor) -> torch.Tensor:
    """F^-1 x of F = damping I + (1/M) sum g g^T, one row after the other (M-FAC, arXiv 2107.03356, section 3)."""

    def inverse_times(count: int, v: torch.Tensor) -> torch.Tensor:
        result = v / damping
        for row, solved in zip(rows[:count], done[:count], strict=True):
            result = result - solved * (solved @ v) / (M + row @ solved)
        return result

    done: list[torch.Tensor] = []
    for number, row in enumerate(rows):
        done.append(inverse_times(number, row))
    return inverse_times(len(rows), x)


@pytest.mark.parametrize("damping", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("steps", [1, 5, 16, 37])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_mfac_is_the_sherman_morrison_recursion(kind: str, steps: int, damping: float) -> None:
    window, rows = filled(kind, steps)
    found = window.combine(mfac(window, damping)).double()
    expected = sherman_morrison(rows, damping, rows[-1])
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def plain_ggt(rows: torch.Tensor, beta2: float, eps: float) -> torch.Tensor:
    """By the d x d matrix: ((sum of beta2^(2 age) g g^T)^1/2 + eps I)^-1 g, by an eigendecomposition of all of it."""
    decayed = rows * beta2 ** torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64)[:, None]
    squares, vectors = torch.linalg.eigh(decayed.T @ decayed)
    return vectors @ ((vectors.T @ rows[-1]) / (squares.clamp_min(0).sqrt() + eps))


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("beta2", [1.0, 0.9])
@pytest.mark.parametrize("steps", [1, 5, 37])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_ggt_is_the_inverse_root_of_the_whole_matrix(kind: str, steps: int, beta2: float, eps: float) -> None:
    window, rows = filled(kind, steps, 600)
    found = window.combine(ggt(window, beta2, eps)).double()
    expected = plain_ggt(rows, beta2, eps)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("steps", [1, 5, 16, 37])
def test_micro_adam_is_adam_over_the_rows_it_has(steps: int) -> None:
    window, rows = filled("sparse", steps)
    assert isinstance(window, SparseWindow)
    found = micro_adam(window, 0.9, 0.99, 1e-8).double()
    ages = torch.arange(len(rows) - 1, -1, -1, dtype=torch.float64)
    first = (0.9 ** ages[:, None] * rows).sum(dim=0) / (0.9**ages).sum()
    second = (0.99 ** ages[:, None] * rows**2).sum(dim=0) / (0.99**ages).sum()
    torch.testing.assert_close(found, first / (second.sqrt() + 1e-8), rtol=1e-5, atol=1e-6)


def model(seed: int = 0) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(seed)
    shape = ModelConfig(
        vocab_size=60, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=16
    )
    return list(BertForPretraining(shape).named_parameters())


def steps_of(optimizer: torch.optim.Optimizer, named: list[tuple[str, nn.Parameter]], begin: int, end: int) -> None:
    for step in range(begin, end):
        generator = torch.Generator().manual_seed(step)
        for _, parameter in named:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def settings(name: str, **changes: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": name, "lr": 1e-4, "window": 4, "rank": 2, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"momentum": 0.9, "precondition": "model"}, {"error_feedback": False}, {"residual_dtype": "fp32"}]
)
@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_a_checkpoint_bit_for_bit(name: str, changes: dict[str, Any]) -> None:
    straight, first, second = model(), model(), model(1)
    config = settings(name, **changes)
    optimizers = [build_optimizer(named, config) for named in (straight, first, second)]
    steps_of(optimizers[0], straight, 0, 12)
    steps_of(optimizers[1], first, 0, 7)
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(second, first, strict=True):
            mine.copy_(theirs)
    load_opaque_state(optimizers[2], opaque_state(optimizers[1]))
    steps_of(optimizers[2], second, 7, 12)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(straight, second, strict=True))


@pytest.mark.parametrize(("dense", "compressed", "exact"), [
    ("mfac", "mfac_sparse", {"density": 1.0, "block": 64}), ("ggt", "ggt_sparse", {"density": 1.0, "block": 64}),
    ("mfac", "mfac_lowrank", {"rank": 16}),
])  # fmt: skip
def test_nothing_left_out_is_the_dense_one(dense: str, compressed: str, exact: dict[str, Any]) -> None:
    """With all entries, or the full rank, a compressed preconditioner is the dense one, to the rounding of its values."""
    one, other, start = model(), model(), model()
    steps_of(build_optimizer(one, settings(dense, damping=1e-2, eps=1e-2)), one, 0, 6)
    steps_of(build_optimizer(other, settings(compressed, damping=1e-2, eps=1e-2, **exact)), other, 0, 6)
    moved = math.sqrt(sum(float((a - b).detach().norm()) ** 2 for (_, a), (_, b) in zip(one, start, strict=True)))
    apart = math.sqrt(sum(float((a - b).detach().norm()) ** 2 for (_, a), (_, b) in zip(one, other, strict=True)))
    assert apart < 0.01 * moved  # values are bf16


def test_weight_decay_is_decoupled_times_the_rate_and_spares_biases_and_norms() -> None:
    named, before = model(), model()
    optimizer = build_optimizer(named, settings("mfac_sparse", weight_decay=0.1, lr=0.5))
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, after), (_, start) in zip(named, before, strict=True):
        kept = name.endswith("bias") or "norm" in name
        torch.testing.assert_close(after, start if kept else start * 0.95)


def test_groups_are_layers_or_the_model() -> None:
    by_layer, whole = (build_optimizer(model(), settings("mfac_sparse", precondition=p)) for p in ("layer", "model"))
    assert len(by_layer.param_groups) == 4  # embeddings, two layers, heads
    assert len(whole.param_groups) == 1


@pytest.mark.parametrize("changes", [{}, {"window": 1024, "density": 0.001}])
def test_the_whole_state_of_sparse_mfac_takes_what_adamw_takes(changes: dict[str, Any]) -> None:
    n = 1 << 22
    parameter = nn.Parameter(torch.zeros(n))
    config = OptimizerConfig.model_validate({"name": "mfac_sparse", "lr": 1e-4, "precondition": "model", **changes})
    optimizer = build_optimizer([("weight", parameter)], config)
    assert isinstance(optimizer, Preconditioned)
    gram = 8 * (config.window or 128) ** 2  # the same for any model
    assert optimizer.state_bytes() - gram <= 1.1 * 8 * n


@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.15, 0.06, 0.015, 0.01, 0.007, 0.006, 0.001, 2**-15])
def test_one_number_of_a_block_is_kept_where_no_block_is_given(density: float) -> None:
    config = OptimizerConfig(name="mfac_sparse", density=density)
    _, selected = TopK(density, config.numbers_per_block).shape(10**6)
    assert selected == (1 if density <= 0.5 else 2)
    assert selected / config.numbers_per_block <= 1.5 * density
