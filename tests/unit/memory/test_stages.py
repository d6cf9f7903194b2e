"""The chain from a shape against the chain that is measured of the model, stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bert_fast.config import ModelConfig
from bert_fast.config.choices import ATTENTION_BACKENDS
from bert_fast.memory.chain import measure_chain
from bert_fast.memory.meter import LiveBytes, storages_before
from bert_fast.memory.modes import half_layer, layer, none, optimal
from bert_fast.memory.remat import Chain, Plan
from bert_fast.memory.segments import SegmentRunner
from bert_fast.memory.stages import Hardware, MicroBatch, encoder_chain, grown_by_layer
from bert_fast.model import fused
from bert_fast.model.attention import SequenceLayout
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.model.loss import chunk_rows
from scripts.benchmarks.memory.large import as_on_cuda

PLAIN: dict[str, Any] = {}
SHAPES = {
    "plain": PLAIN,
    "large vocabulary": {"vocab_size": 9000},
    "wide": {"hidden_size": 96, "intermediate_size": 500, "num_heads": 4},
    "predicted": {"last_layer": "predicted"},
    "masked alone": {"last_layer": "predicted", "next_sentence": False},
    "without dropout": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
}


def batch_of(vocab_size: int, count: int, length: int) -> BertInput:
    tokens = count * length
    ids = torch.randint(0, vocab_size, (tokens,))
    masked = torch.randperm(tokens)[: tokens * 15 // 100].sort().values
    ends = torch.arange(0, tokens + 1, length)
    positions, labels = torch.arange(length).repeat(count), torch.zeros(count, dtype=torch.long)
    return BertInput(
        ids, torch.zeros_like(ids), positions, masked, ids[masked], labels, SequenceLayout([length] * count, ends)
    )


def both(config: ModelConfig, bf16: bool, count: int, length: int) -> tuple[Chain, Chain]:
    """The chain that is measured, and that of the shape."""
    model, batch = BertForPretraining(config, "matmul"), batch_of(config.vocab_size, count, length)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        stages = model.stages(batch, model.read_rows(batch))
        measured = measure_chain(stages, batch.input_ids, lambda hidden: model.losses(hidden, batch).total, timed=False)
    sums = MicroBatch(count * length, count * length**2, len(batch.masked_positions), count)
    rows = chunk_rows(config.vocab_size, "cpu")
    return measured, encoder_chain(config, sums, Hardware(2 if bf16 else 4, on_cpu=True, logits_rows=rows))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_stage_is_what_is_measured(shape: str, bf16: bool) -> None:
    config = ModelConfig(**{"vocab_size": 1000, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 256}
                         | SHAPES[shape])  # fmt: skip
    for count, length in ((4, 128), (16, 32)):
        measured, expected = both(config, bf16, count, length)
        for found, wanted in zip(measured.stages, expected.stages, strict=True):
            assert wanted.name == found.name
            if found.name != "heads":
                assert wanted.output_bytes == found.output_bytes, found.name
            assert wanted.saved_bytes == pytest.approx(found.saved_bytes, rel=0.02), found.name
            peaks = [stage.saved_bytes + stage.output_bytes + stage.temporary_bytes for stage in (wanted, found)]
            assert peaks[0] == pytest.approx(peaks[1], rel=0.04), found.name


def test_gradients_that_grow_are_those_of_all_weights() -> None:
    for shape in SHAPES.values():
        config = ModelConfig(**{"vocab_size": 300, "hidden_size": 64, "num_layers": 3, "num_heads": 2} | shape)
        model, batch = BertForPretraining(config, "matmul"), batch_of(300, 2, 16)
        measured = measure_chain(
            model.stages(batch, model.read_rows(batch)), batch.input_ids,
            lambda hidden, model=model, batch=batch: model.losses(hidden, batch).total,  # type: ignore[misc]
            timed=False, grads_resident=False,
        )  # fmt: skip
        chain = encoder_chain(config, MicroBatch(32, 512, 4, 2), Hardware(4, on_cpu=True), gradients_grow=True)
        for found, wanted in zip(grown_by_layer(measured).stages[1:-1], chain.stages[1:-1], strict=True):
            assert found.gradient_bytes == wanted.gradient_bytes
        assert sum(each.gradient_bytes for each in chain.stages) == 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["padded", "matmul"])
def test_what_a_gpu_keeps_is_what_the_plain_parts_keep(backend: str, dropout: float, bf16: bool) -> None:
    """On a CPU, computed as CUDA computes: by a kernel that keeps no probabilities, and by products that keep them."""
    sizes = {"vocab_size": 1000, "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 256}
    of_attention = dropout if backend == "matmul" else 0.0  # with it a CPU has no such kernel
    config = ModelConfig(**sizes, hidden_dropout=dropout, attention_dropout=of_attention, attention_backend=backend)
    model, batch = BertForPretraining(config, backend), batch_of(1000, 4, 128)
    with fused.turned_off(), as_on_cuda(), torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        measured = measure_chain(
            model.stages(batch), batch.input_ids, lambda hidden: model.losses(hidden, batch).total, timed=False
        )
    sums = MicroBatch(512, 4 * 128**2, len(batch.masked_positions), 4)
    expected = encoder_chain(config, sums, Hardware(2 if bf16 else 4, on_cpu=False))
    for found, wanted in zip(measured.stages, expected.stages, strict=True):
        assert wanted.name == found.name
        assert wanted.saved_bytes == pytest.approx(found.saved_bytes, rel=0.003), found.name
        peaks = [stage.saved_bytes + stage.output_bytes + stage.temporary_bytes for stage in (wanted, found)]
        # In fp32 a GPU's kernel is said to have gradients in fp32 beside its own, and a norm a copy
        assert peaks[0] == pytest.approx(peaks[1], rel=0.02 if bf16 else 0.13), found.name


@pytest.mark.parametrize("again", [False, True])
def test_on_a_gpu_plain_products_alone_keep_probabilities(again: bool) -> None:
    """The longer the samples the more of them; not where attention is computed again."""
    kept = {}
    for backend in ["auto", *ATTENTION_BACKENDS]:
        config = ModelConfig(
            vocab_size=1000, hidden_size=64, num_layers=1, num_heads=2, attention_dropout=0.0, attention_backend=backend
        )
        saved = []
        for length in (64, 128):
            sums = MicroBatch(512, 512 * length, 64, 512 // length)
            chain = encoder_chain(config, sums, Hardware(2, on_cpu=False), attention_again=again)
            saved.append(next(each for each in chain.stages if each.name == "layers.0.attention").saved_bytes)
        kept[backend] = saved[1] - saved[0]
    of_products = (
        0 if again else (4 + 2) * 2 * 512 * (128 - 64)
    )  # of softmax and of the product, per head and pair of tokens
    assert kept == {**dict.fromkeys(kept, 0), "matmul": of_products}


@pytest.mark.parametrize("bf16", [False, True])
def test_plans_have_the_peaks_that_are_measured(bf16: bool) -> None:
    """Of eight layers, in chunks of the logits and whole: within 2 %."""
    for vocabulary, (count, length) in itertools.product((1000, 50_000), ((4, 128), (32, 64))):
        config = ModelConfig(vocab_size=vocabulary, hidden_size=64, num_layers=8, num_heads=2, intermediate_size=256)
        measured, expected = both(config, bf16, count, length)
        for mode in (none, layer, half_layer, optimal):
            found, wanted = mode(measured, None).peak_bytes, mode(expected, None).peak_bytes
            assert wanted == pytest.approx(found, rel=0.02), (mode.__name__, vocabulary, count)


def test_measuring_takes_no_more_than_the_least_peak() -> None:
    """Else a plan that fits could not be made where it is needed. Two layers, of which attention is most."""
    config = ModelConfig(vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=256)
    model, batch = BertForPretraining(config, "matmul"), batch_of(100, 2, 256)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes(x.untyped_storage() for p in model.parameters() for x in (p, p.grad) if x is not None) as count:
        chain = measure_chain(model.stages(batch), batch.input_ids, lambda hidden: model.losses(hidden, batch).total)
    assert count.peak < 1.02 * optimal(chain, None).peak_bytes


@pytest.mark.parametrize("mode", [none, layer, half_layer, optimal])
def test_a_whole_pass_as_on_a_gpu_takes_what_its_plan_says(mode: Callable[..., Plan]) -> None:
    """A norm's gradient is in fp32 already when what is before it is computed again."""
    config = ModelConfig(
        vocab_size=100, hidden_size=64, num_layers=8, num_heads=2, intermediate_size=256, hidden_dropout=0.0,
        attention_dropout=0.0,
    )  # fmt: skip
    model, batch = BertForPretraining(config, "padded"), batch_of(100, 4, 128)
    sums = MicroBatch(512, 4 * 128**2, len(batch.masked_positions), 4)
    plan = mode(encoder_chain(config, sums, Hardware(2, on_cpu=False)), None)
    model.run_stages = SegmentRunner(plan.segments)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            total = model(batch).total
        total.backward()

    with fused.turned_off(), as_on_cuda():
        before = storages_before(step)
        with LiveBytes(before) as live:
            step()
    assert plan.peak_bytes == pytest.approx(live.peak, rel=0.02)
