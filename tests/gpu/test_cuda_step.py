"""On a CUDA device: the bf16 step against the CPU's fp32 step, no waiting for the device in a step, attention backends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bert_fast.communication.buckets import measure_ready_order, plan_layout
from bert_fast.communication.reducer import BucketReducer
from bert_fast.communication.wire_format import wire_format
from bert_fast.config import ModelConfig, OptimizerConfig
from bert_fast.config.choices import ATTENTION_BACKENDS
from bert_fast.errors import UserError
from bert_fast.model.attention import SequenceLayout, choose_backend, find_backend
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.model.objective import MlmNsp
from bert_fast.optim.build import build_optimizer
from bert_fast.train.batches import synthetic_batch, to_device
from bert_fast.train.clock import DeviceTimer
from bert_fast.train.cuda_graphs import CudaGraphStep, capture_on_cuda, tensor_rates
from bert_fast.train.loss_scale import LossScale
from bert_fast.train.step import StepInput, StepResult, TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    vocab_size=512, hidden_size=128, num_layers=3, num_heads=2, intermediate_size=512, max_positions=128,
    hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
BATCHES = [synthetic_batch(8, 128, 512, seed) for seed in range(4)]


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def available(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Backends that this device and format have."""
    names = []
    for name in ATTENTION_BACKENDS:
        try:
            names.append(choose_backend(name, device, dtype, 0.0))
        except UserError:
            continue
    return names


class Machine:
    """Model, engine, optimizer and step on one device, as `train.build` puts them together, on fixed weights."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, backend: str, clip: str = "bucket_before_reduce",
        optimizer: str = "adamw", loss_scale: bool = False, in_graph: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model = BertForPretraining(SHAPE, backend).to(device)
        self.device, self.dtype = device, dtype
        named = list(self.model.named_parameters())
        order = measure_ready_order(
            [p for _, p in named], lambda: self._loss(self.inputs(0).micro_batches[0]).backward()
        )
        self.model.zero_grad(set_to_none=True)
        layout = plan_layout(
            [name for name, _ in named], [p.numel() for _, p in named], order, clip_groups="layer", bucket_mb=0.5,
            whole_groups=True,
        )  # fmt: skip
        engine = BucketReducer(self.model, layout, clip=clip, max_norm=1.0, wire=wire_format("fp32", torch.float32))
        adaptive = build_optimizer(named, OptimizerConfig(name=optimizer))
        scale = LossScale(65536.0, device) if loss_scale else None
        self.loss_scale = scale
        self.train_step = TrainStep(
            engine,
            adaptive,
            MlmNsp(),
            device=device,
            dtype=dtype,
            world_size=1,
            loss_scale=scale,
            use_device_timers=not in_graph,
        )

    def _loss(self, batch: BertInput) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            losses = self.model(batch)
        return losses.mlm_sum + losses.nsp_sum

    def inputs(self, first: int) -> StepInput:
        """Two micro-batches."""
        pair = BATCHES[first : first + 2]
        masked = sum(len(batch.masked_labels) for batch in pair)
        return StepInput([to_device(batch, self.device, 64) for batch in pair], masked, 16)

    def step(self, inputs: StepInput, lr: float = 0.0) -> StepResult:
        return self.train_step(inputs, lr)

    def gradient(self) -> torch.Tensor:
        return torch.cat([p.grad.flatten().double().cpu() for p in self.model.parameters()])


def test_bf16_step_on_cuda_agrees_with_fp32_on_cpu() -> None:
    """bf16 keeps 8 bits: sums over thousands of tokens agree to a few parts in a thousand, gradients to a few percent."""
    exact = Machine(CPU, torch.float32, "loop", clip="none")
    expected = exact.step(exact.inputs(0))
    backends = available(cuda(), torch.bfloat16)
    assert {"loop", "grouped", "matmul", "padded"} <= set(backends)
    for backend in backends:
        machine = Machine(cuda(), torch.bfloat16, backend, clip="none")
        result = machine.step(machine.inputs(0))
        assert result.mlm_sum.item() == pytest.approx(expected.mlm_sum.item(), rel=5e-3), backend
        assert result.nsp_sum.item() == pytest.approx(expected.nsp_sum.item(), rel=5e-3), backend
        assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=2e-2), backend
        gap = (machine.gradient() - exact.gradient()).norm() / exact.gradient().norm()
        assert 0 < gap < 5e-2, backend


def test_fp32_step_on_cuda_is_the_cpu_step() -> None:
    exact = Machine(CPU, torch.float32, "loop")
    expected = exact.step(exact.inputs(0), lr=1e-3)
    machine = Machine(cuda(), torch.float32, "grouped")
    result = machine.step(machine.inputs(0), lr=1e-3)
    assert result.mlm_sum.item() == pytest.approx(expected.mlm_sum.item(), rel=1e-4)
    gap = (machine.gradient() - exact.gradient()).norm() / exact.gradient().norm()
    assert gap < 1e-3  # TF32 is off by default


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Let torch raise where the host would wait for the device."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("clip", ["none", "global_before_reduce", "bucket_before_reduce", "global_after_reduce"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "lamb", "muon"])
@pytest.mark.parametrize("backend", ["loop", "varlen", "grouped", "matmul", "padded"])
def test_no_host_synchronisation_in_a_step(no_synchronisation: None, backend: str, optimizer: str, clip: str) -> None:
    if backend not in available(cuda(), torch.bfloat16):
        pytest.skip(f"no {backend} here")
    machine = Machine(cuda(), torch.bfloat16, backend, clip, optimizer)
    for index in range(2):  # kernels and optimizer state
        machine.step(machine.inputs(index), lr=1e-4)
    inputs = machine.inputs(2)
    torch.cuda.set_sync_debug_mode("error")
    result = machine.step(inputs, lr=1e-4)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(result.grad_norm)
    torch.cuda.synchronize()
    times = machine.train_step.read_device_times()
    assert times is not None
    assert len(times.compute_s) == 3
    assert min(times.compute_s) > 0
    again = machine.train_step.read_device_times()
    assert again is not None
    assert again.compute_s == []


def test_loss_scale_does_not_synchronise_and_an_overflow_changes_no_weight(no_synchronisation: None) -> None:
    machine = Machine(cuda(), torch.float16, "loop", loss_scale=True)
    machine.step(machine.inputs(0), lr=1e-4)
    before = [p.detach().clone() for p in machine.model.parameters()]
    assert machine.loss_scale is not None
    machine.loss_scale.value.fill_(2.0**60)
    inputs = machine.inputs(1)
    torch.cuda.set_sync_debug_mode("error")
    result = machine.step(inputs, lr=1e-4)
    torch.cuda.set_sync_debug_mode("default")
    assert not bool(result.is_finite)
    assert machine.loss_scale.value.item() == 2.0**59
    for parameter, value in zip(machine.model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[128] * 4, [128, 96, 96, 33, 17, 5], [7], [64, 1, 63, 2]])
def test_attention_backends_agree_with_the_loop(lengths: list[int], dtype: torch.dtype) -> None:
    """Output and gradient, against the loop in fp32 on the same numbers."""
    generator = torch.Generator(cuda()).manual_seed(1)
    qkv_T3HK = torch.randn(sum(lengths), 3, 2, 64, device=cuda(), generator=generator).to(dtype)
    grad_TD = torch.randn(sum(lengths), 128, device=cuda(), generator=generator).to(dtype)
    ends = torch.tensor([0, *lengths], device=cuda()).cumsum(0).int()

    def run(backend: str, like: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        qkv = qkv_T3HK.to(like).requires_grad_()
        out_TD = find_backend(backend)(qkv, SequenceLayout(lengths, ends), 0.0)
        (gradient,) = torch.autograd.grad(out_TD, qkv, grad_TD.to(like))
        return out_TD.float(), gradient.float()

    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    expected = run("loop", torch.float32)
    names = available(cuda(), dtype)
    assert {"loop", "grouped", "matmul", "padded"} <= set(names)
    for name in names:
        for found, wanted in zip(run(name, dtype), expected, strict=True):
            torch.testing.assert_close(
                found, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item(), msg=name
            )


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "lamb", "muon"])
def test_captured_steps_are_the_launched_ones(optimizer: str) -> None:
    """Two shapes in turn, weights and losses over six steps; the second replay of a shape waits for nothing on the host."""
    backends = [name for name in ("flash", "varlen") if name in available(cuda(), torch.bfloat16)]
    if not backends:
        pytest.skip("no attention that reads lengths from the device")
    plain, graphed = (
        Machine(cuda(), torch.bfloat16, backends[0], optimizer=optimizer, in_graph=in_graph)
        for in_graph in (False, True)
    )
    tensor_rates(graphed.train_step.optimizer, cuda())
    step = CudaGraphStep(graphed.train_step, SHAPE.max_positions, capture_on_cuda, DeviceTimer())
    for number in range(6):
        a = plain.step(plain.inputs(number % 2), lr=1e-3)
        b = step(graphed.inputs(number % 2), 1e-3)
        assert b.mlm_sum.item() == pytest.approx(a.mlm_sum.item(), rel=1e-3)
    for one, other in zip(plain.model.parameters(), graphed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
