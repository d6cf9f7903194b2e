"""Fused pieces against plain statements in fp64: outputs and every gradient, with the same dropout; and what they keep."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bert_fast.config.load import config_from_tree
from bert_fast.model import fused
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.train.batches import synthetic_batch, to_device

SEED = 7


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "draw_seed", lambda: SEED)


def gradients(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of a weighted sum of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_factor_is_dropouts(dtype: torch.dtype, p: float) -> None:
    factor = fused.dropout_factor(torch.Size((501, 333)), dtype, p, SEED)
    assert factor.dtype == dtype
    values = factor.unique().tolist()
    kept = torch.tensor(1 / (1 - round(p * 2**15) / 2**15), dtype=dtype).item()
    assert values == ([kept] if p == 0 else [0.0, kept])
    share = (factor == 0).double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / factor.numel()) ** 0.5 + 2**-16


def test_the_factor_follows_from_the_seed_and_rows_are_not_alike() -> None:
    size = torch.Size((64, 512))
    a, b, other = (fused.dropout_factor(size, torch.float32, 0.3, seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert (a != other).double().mean() == pytest.approx(2 * 0.3 * 0.7, abs=0.02)
    zeros = (a == 0).double() - 0.3
    correlation = (zeros[:-1] * zeros[1:]).mean() / zeros.var(), (zeros[:, :-1] * zeros[:, 1:]).mean() / zeros.var()
    assert max(abs(c.item()) for c in correlation) < 0.03


@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 3, 5, 5)])
def test_dropout_and_its_gradient(one_seed: None, shape: tuple[int, ...]) -> None:
    x = randn(*shape)
    factor = fused.dropout_factor(x.shape, x.dtype, 0.4, SEED)
    same(gradients(lambda x: fused.dropout(x, 0.4), x), gradients(lambda x: x * factor, x))
    assert fused.dropout(x, 0.0) is x


def test_torchs_state_repeats_the_draw() -> None:
    x = torch.ones(1000)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = fused.dropout(x, 0.5), fused.dropout(x, 0.5)
    torch.set_rng_state(state)
    assert torch.equal(fused.dropout(x, 0.5), first)
    assert not torch.equal(first, second)


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_dropout_add_norm(one_seed: None, p: float) -> None:
    x, residual, weight, bias = randn(9, 12), randn(9, 12), randn(12), randn(12)
    factor = fused.dropout_factor(x.shape, x.dtype, p, SEED)

    def ours(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        norm: Any = SimpleNamespace(weight=weight, bias=bias, eps=1e-12)  # whose gradients can be asked for
        return fused.dropout_add_norm(x, residual, norm, p)

    def plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(residual + x * factor, (12,), weight, bias, 1e-12)

    same(gradients(ours, x, residual, weight, bias), gradients(plain, x, residual, weight, bias))


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_linear(form: str) -> None:
    def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        linear: Any = SimpleNamespace(weight=weight, bias=bias)
        return fused.gelu_linear(x, linear, form)

    def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(x, approximate=form), weight, bias)

    tensors = randn(9, 20), randn(12, 20), randn(12)
    same(gradients(ours, *tensors), gradients(plain, *tensors))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(one_seed: None, p: float, masked: bool) -> None:
    qkv = randn(3, 6, 3, 2, 4)
    mask = None
    if masked:
        mask = (torch.arange(6) < torch.tensor([6, 4, 1])[:, None])[:, None, None, :]
    factor = fused.dropout_factor(torch.Size((3, 2, 6, 6)), torch.float64, p, SEED)

    def plain(qkv: torch.Tensor) -> torch.Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / 2.0
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return ((scores.softmax(-1) * factor) @ value).transpose(1, 2).flatten(2)

    same(gradients(lambda qkv: fused.attention(qkv, mask, p), qkv), gradients(plain, qkv))


# ---- the model ------------------------------------------------------------------------------------------------------


def make_model(dropout: float) -> tuple[BertForPretraining, BertInput]:
    config = config_from_tree({
        "model": {
            "vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64,
            "max_positions": 64, "hidden_dropout": dropout, "attention_dropout": dropout, "initializer_range": 0.1,
        },
        "data": {"max_seq_len": 64}, "batch": {"global_batch_size": 6, "micro_batch_size": 6}, "schedule": {"total_steps": 9},
        "train": {"max_steps": 9}, "evaluation": {"every_samples": 9},
    })  # fmt: skip
    torch.manual_seed(0)
    model = BertForPretraining(config.model, "matmul")
    return model, to_device(synthetic_batch(6, 64, 100, 0), torch.device("cpu"))


def step(model: BertForPretraining, batch: BertInput) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    losses = model(batch)
    (losses.mlm_sum + losses.nsp_sum).backward()
    return [losses.mlm_sum.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_the_model_is_the_same_with_and_without() -> None:
    model, batch = make_model(0.0)
    model.double()
    ours = step(model, batch)
    with fused.turned_off():
        assert not fused.fuses(torch.ones(1))
        plain = step(model, batch)
    assert fused.fuses(torch.ones(1))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_bf16_stays_near_the_plain_twin() -> None:
    model, batch = make_model(0.0)
    exact = step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(model, batch)
        with fused.turned_off():
            plain = step(model, batch)
    for a, b, reference in zip(ours, plain, exact, strict=True):
        error, theirs = ((x.float() - reference).norm().item() for x in (a, b))
        assert error < 1.5 * theirs + 0.02 * reference.norm().item(), "no further from fp32 than torch's own bf16"


def test_dropout_of_the_model_has_the_right_scale() -> None:
    """The mean loss over many draws with little dropout is near the loss without."""
    model, batch = make_model(0.02)
    with torch.no_grad():
        losses = torch.stack([model(batch).mlm_sum for _ in range(60)])
        model.eval()
        exact = model(batch).mlm_sum
    assert abs(losses.mean() - exact) < 4 * losses.std() / 60**0.5 + 0.01 * exact
    assert losses.std() > 0


def kept_bytes(model: BertForPretraining, batch: BertInput) -> int:
    """Bytes that a forward pass keeps for backward, each storage once, parameters left out."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(batch)
        total = sum(storages.values())
        del losses
    return total


def test_less_is_kept_for_backward() -> None:
    model, batch = make_model(0.1)
    ours = kept_bytes(model, batch)
    with fused.turned_off():
        plain = kept_bytes(model, batch)
    assert ours < 0.62 * plain, (ours, plain)


def test_compiled_layers_use_the_plain_twins() -> None:
    assert fused.fuses(torch.ones(1))

    @torch.compile(backend="eager", fullgraph=True)
    def inside(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if fused.fuses(x) else x

    assert inside(torch.zeros(1)).item() == 0
