"""Steps from fixed buffers: the same weights as steps that are launched, whatever shapes come in which order.

Graphs themselves need CUDA (tests/gpu). Here capturing is recording a function, and a replay calls it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bert_fast.config import Config
from bert_fast.errors import TrainingError, UserError
from bert_fast.model import attention
from bert_fast.model.attention import rectangles
from bert_fast.train.batches import synthetic_batch, to_device
from bert_fast.train.cuda_graphs import CudaGraphStep, check_graphs, static_form, tensor_rates
from bert_fast.train.environment import Environment
from bert_fast.train.health.step_errors import explain_memory
from bert_fast.train.setup.build import build
from bert_fast.train.step import StepInput, StepResult

CPU = torch.device("cpu")


@pytest.fixture
def lengths_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that reads `cu_seqlens` alone, as the kernels for variable lengths do."""
    loop = rectangles.LOOP

    def by_offsets(qkv: torch.Tensor, layout: attention.SequenceLayout, dropout: float) -> torch.Tensor:
        lengths = [length for length in layout.cu_seqlens.diff().tolist() if length]
        return loop(qkv, attention.SequenceLayout(lengths, layout.cu_seqlens), dropout)

    monkeypatch.setattr(rectangles, "LOOP", attention.Backend(by_offsets))


class Recorded:
    """A graph on the CPU: the function, called again, its results written where they were first."""

    def __init__(self, step: Callable[[], StepResult]) -> None:
        self._step, self.result, self.replays = step, step(), 0

    def replay(self) -> None:
        self.replays += 1
        new = self._step()
        for name in ("mlm_sum", "nsp_sum", "grad_norm", "is_finite", "local_is_finite"):
            if getattr(new, name) is not None:
                getattr(self.result, name).copy_(getattr(new, name))


def inputs_of(config: Config, seed: int, samples: int = 8) -> StepInput:
    batch = synthetic_batch(samples, config.data.max_seq_len, config.model.vocab_size, seed)
    return StepInput(
        [to_device(batch, CPU, config.batch.shape_multiple)], len(batch.masked_labels) + seed, samples + seed
    )


def components_of(make_config: Callable[..., Config], name: str, *settings: str) -> Any:
    config = make_config(f"optimizer.name={name}", "batch.shape_multiple=32", "model.attention_backend=loop", *settings)
    torch.manual_seed(0)
    return config, build(config, Environment(0, 0, 1, CPU, torch.float32))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lamb", ()),
        ("adamw", ()),
        ("lamb", ("model.last_layer=predicted",)),
        ("lamb", ("model.last_layer=predicted", "model.next_sentence=false")),
    ],
)
def test_replayed_steps_are_the_launched_ones(
    make_config: Callable[..., Config], lengths_from_the_device: None, name: str, settings: tuple[str, ...]
) -> None:
    config, plain = components_of(make_config, name, *settings)
    _, graphed = components_of(make_config, name, *settings)
    tensor_rates(graphed.optimizer.optimizer, CPU)
    if name == "adamw":
        for group in graphed.optimizer.optimizer.param_groups:
            group["capturable"] = False  # torch allows it on accelerators only
    graphs: list[Recorded] = []

    def capture(step: Callable[[], StepResult]) -> tuple[Recorded, StepResult]:
        graphs.append(Recorded(step))
        return graphs[-1], graphs[-1].result

    step = CudaGraphStep(graphed.step, config.data.max_seq_len, capture, None)
    for number in range(6):
        for samples in (8, 5):
            lr = 0.001 * (number + 1)
            a = plain.step(inputs_of(config, number % 3, samples), lr)
            b = step(inputs_of(config, number % 3, samples), lr)
            torch.testing.assert_close(a.mlm_sum, b.mlm_sum)
            torch.testing.assert_close(a.grad_norm, b.grad_norm)
    for one, other in zip(plain.model.parameters(), graphed.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert len(graphs) < 6, "a graph a shape, not a step"
    assert sum(graph.replays for graph in graphs) == 12


def test_the_static_form_has_one_number_of_sequences_and_the_same_loss(make_config: Callable[..., Config]) -> None:
    config, components = components_of(make_config, "adamw")
    for samples in (8, 5):
        inputs = inputs_of(config, 0, samples)
        static = static_form(inputs, config.data.max_seq_len)
        assert len(static.micro_batches[0].layout.cu_seqlens) == 65
        assert len(static.micro_batches[0].next_sentence_labels) == 64
        assert static.micro_batches[0].layout.max_len == config.data.max_seq_len
        batch, plain = static.micro_batches[0], inputs.micro_batches[0]
        loose = batch._replace(layout=plain.layout, next_sentence_labels=plain.next_sentence_labels)
        for a, b in zip(components.model(loose)[:2], components.model(plain)[:2], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("device", "backend", "overrides", "message"),
    [
        ("cpu", "flash", (), "a CUDA device, this run is on cpu"),
        ("cuda", "grouped", (), "attention_backend=varlen or torch_flash or flash, not grouped"),
        ("cuda", "flash", ("communication.engine=ddp",), "engine=bucketed, not ddp"),
        ("cuda", "flash", ("communication.shard_optimizer=true",), "shard_optimizer=false"),
        ("cuda", "flash", ("optimizer.step_per_bucket=true",), "optimizer.step_per_bucket=false"),
        ("cuda", "flash", ("run.profile=true",), "run.profile=false"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    make_config: Callable[..., Config], device: str, backend: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=f"train.cuda_graphs needs .*{message}"):
        check_graphs(make_config(*overrides), torch.device(device), backend)
    check_graphs(make_config(), torch.device("cuda"), "flash")


def test_running_out_of_memory_says_how_much_was_asked() -> None:
    class Plan:
        step = 7

    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    told = explain_memory(error, Plan(), 3, [100, 4096])  # type: ignore[arg-type]
    assert isinstance(told, TrainingError)
    assert "step 7, rank 3: out of memory with 4,096 tokens in a micro-batch. Lower batch.micro_batch_size" in str(told)
    other = RuntimeError("shapes do not match")
    assert explain_memory(other, Plan(), 3, [1]) is other  # type: ignore[arg-type]
    assert isinstance(explain_memory(torch.OutOfMemoryError("x"), Plan(), 0, [1]), TrainingError)  # type: ignore[arg-type]
