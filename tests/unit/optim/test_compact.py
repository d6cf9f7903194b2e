"""Moments in few bits and in the host's memory: torch's AdamW where nothing is lost, and near it where something is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bert_fast.compression import compiled
from bert_fast.config import OptimizerConfig
from bert_fast.memory.estimate import optimizer_bytes
from bert_fast.memory.state import num_parameters
from bert_fast.optim import compact
from bert_fast.optim.adamw import AdamW
from bert_fast.optim.build import build_optimizer
from bert_fast.optim.compact import FORMATS, CompactAdamW
from bert_fast.optim.opaque import load_opaque_state, opaque_state

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6}
LOSSY = ["bf16", "int8", "int4"]


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((50, 33), (7,), (300,), (1,))]


def run(optimizer: torch.optim.Optimizer, own: list[nn.Parameter], steps: int, first: int = 0) -> torch.Tensor:
    """Gradients whose sizes differ by orders of magnitude from element to element."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in own:
            size = torch.linspace(-4, 0, parameter.numel()).exp().view_as(parameter)
            parameter.grad = size * (0.3 + torch.randn(parameter.shape, generator=generator))
        optimizer.step()
    return torch.cat([p.detach().ravel() for p in own])


def groups(own: list[nn.Parameter]) -> list[dict[str, object]]:
    return [{"params": own[:2], "weight_decay": 0.1}, {"params": own[2:], "weight_decay": 0.0}]


@pytest.mark.parametrize("on_host", [False, True])
def test_in_fp32_it_is_torchs(on_host: bool) -> None:
    one, other = parameters(), parameters()
    expected = run(AdamW(groups(one), **SETTINGS, fused=True), one, 20)
    found = run(CompactAdamW(groups(other), **SETTINGS, state_dtype="fp32", on_host=on_host), other, 20)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("state_dtype", "tolerance"), [("bf16", 0.02), ("int8", 0.05), ("int4", 0.25)])
def test_what_a_format_loses(state_dtype: str, tolerance: float) -> None:
    """The way of all weights in 200 steps, as a share of the exact way's length."""
    start = torch.cat([p.detach().ravel() for p in parameters()])
    one, other = parameters(), parameters()
    expected = run(AdamW(groups(one), **SETTINGS, fused=True), one, 200)
    found = run(CompactAdamW(groups(other), **SETTINGS, state_dtype=state_dtype), other, 200)
    error = (found - expected).norm() / (expected - start).norm()
    assert error < tolerance


@pytest.mark.parametrize("state_dtype", LOSSY)
def test_a_moment_that_changes_little_does_not_stand_still(state_dtype: str) -> None:
    """A second moment that falls by 0.1 % a step is a third after 1,100 steps: rounded to the nearest it would not move."""
    form = FORMATS[state_dtype][1]
    values = torch.full((1024,), 0.7)
    values[::128] = 1.0  # the largest of its block
    kept = torch.zeros(form.size(1024), dtype=form.dtype)
    generator = torch.Generator().manual_seed(0)
    form.write(values.clone(), kept, lambda: torch.rand(1024, generator=generator))
    for _ in range(1100):
        form.write(form.read(kept, 1024).clone() * 0.999, kept, lambda: torch.rand(1024, generator=generator))
    mean = form.read(kept, 1024).mean().item()
    assert mean == pytest.approx(0.702 * 0.999**1100, rel=0.25)


@pytest.mark.parametrize("state_dtype", LOSSY)
def test_no_second_moment_becomes_zero(state_dtype: str) -> None:
    form = FORMATS[state_dtype][1]
    values = torch.logspace(-30, 0, 256)
    kept = torch.zeros(form.size(256), dtype=form.dtype)
    form.write(values.clone(), kept, lambda: torch.zeros(256))
    assert (form.read(kept, 256)[values > 1e-28] > 0).all()


@pytest.mark.parametrize("state_dtype", ["fp32", *LOSSY])
def test_zeros_stay_zeros_and_odd_sizes_come_back(state_dtype: str) -> None:
    for form in FORMATS[state_dtype]:
        for numel in (1, 127, 128, 129):
            kept = torch.zeros(form.size(numel), dtype=form.dtype)
            form.write(torch.zeros(numel), kept, lambda numel=numel: torch.rand(numel))  # type: ignore[misc]
            assert torch.equal(form.read(kept, numel), torch.zeros(numel))


@pytest.mark.parametrize("state_dtype", LOSSY)
def test_the_size_of_a_piece_is_not_seen_in_what_is_kept(state_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that a CPU wrote can be read on a GPU, which has larger pieces."""
    first, whole = FORMATS[state_dtype][0], torch.randn(1000, generator=torch.Generator().manual_seed(0))
    kept = [torch.zeros(first.size(1000), dtype=first.dtype) for _ in range(2)]
    first.write(whole.clone(), kept[0], lambda: torch.full((1000,), 0.5))
    for start in range(0, 1000, 256):
        numel = min(256, 1000 - start)
        place = kept[1][first.size(start) :][: first.size(numel)]
        half = torch.full((numel,), 0.5)
        first.write(whole[start : start + numel].clone(), place, half.clone)
    assert torch.equal(*kept)
    one, other = parameters(), parameters()
    expected = run(CompactAdamW(groups(one), **SETTINGS, state_dtype=state_dtype), one, 20)
    monkeypatch.setattr(compact, "_CPU_PIECE", 256)
    found = run(CompactAdamW(groups(other), **SETTINGS, state_dtype=state_dtype), other, 20)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("numel", [1, 4, 1023])
def test_noise_is_uniform_and_less_than_one(numel: int) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([compact._noise(numel, torch.device("cpu"), generator) for _ in range(20_000 // numel)])
    assert drawn.shape[1] == numel
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.std().item() == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_what_cuda_compiles_compiled_for_the_cpu(state_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in FORMATS[state_dtype]:
        for numel in (640, 1000):
            values = torch.rand(numel, generator=torch.Generator().manual_seed(numel))
            kept = [torch.zeros(form.size(numel), dtype=torch.uint8) for _ in range(2)]
            form.write(values.clone(), kept[0], lambda numel=numel: torch.full((numel,), 0.3))  # type: ignore[misc]
            expected = form.read(kept[0], numel)
            with monkeypatch.context() as everywhere:
                everywhere.setattr(compact, "on", lambda _device, function: compiled._compiled(function))
                form.write(values.clone(), kept[1], lambda numel=numel: torch.full((numel,), 0.3))  # type: ignore[misc]
                found = form.read(kept[1], numel)
            # A quotient may be rounded in another way, and then lie on the other side of a whole number
            assert torch.isclose(found, expected, rtol=1e-5).float().mean() > 0.99
            assert (found - expected).abs().max() < 0.3
    torch.compiler.reset()


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("state_dtype", ["fp32", *LOSSY])
def test_resumed_bit_for_bit_and_no_random_number_of_the_run_is_used(state_dtype: str, on_host: bool) -> None:
    one, other = parameters(), parameters()
    random = torch.get_rng_state()
    straight = run(CompactAdamW(groups(one), **SETTINGS, state_dtype=state_dtype, on_host=on_host), one, 6)
    first = CompactAdamW(groups(other), **SETTINGS, state_dtype=state_dtype, on_host=on_host)
    run(first, other, 3)
    second = CompactAdamW(groups(other), **SETTINGS, state_dtype=state_dtype, on_host=on_host)
    load_opaque_state(second, opaque_state(first))
    assert torch.equal(run(second, other, 3, first=3), straight)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("state_dtype", ["fp32", *LOSSY])
def test_the_state_is_as_large_as_estimated(state_dtype: str) -> None:
    from bert_fast.config import ModelConfig
    from bert_fast.model.bert import BertForPretraining

    shape = ModelConfig(vocab_size=500, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128)
    config = OptimizerConfig(name="adamw", state_dtype=state_dtype)  # type: ignore[arg-type]
    model = BertForPretraining(shape)
    optimizer = build_optimizer(model.named_parameters(), config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = (v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim())
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert optimizer_bytes(shape, config) == pytest.approx(held, rel=0.02)
    assert held < {"fp32": 8.1, "bf16": 4.1, "int8": 2.1, "int4": 1.1}[state_dtype] * num_parameters(shape)
