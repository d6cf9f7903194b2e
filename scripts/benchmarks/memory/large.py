"""BERT-large at 56 x 512 tokens without a GPU: activations by way of recomputing, on fake tensors, by torch's MemTracker.

What a GPU runs is stood in for by the plain parts of the model and attention that keeps no probabilities, in bf16, without
dropout on attention's probabilities (which a GPU's kernel does not keep either) and on hidden states (whose mask is a byte on a
GPU, and not here).

A CPU's autocast leaves norms in bf16, and its logits come in smaller chunks: a GPU's stages are larger by a norm's input in
fp32 for each half of a layer (a sixth of all that is kept), and by the chunk. The chain from a GPU's shape is therefore
compared with the same parts under `as_on_cuda`, by that chain's own plans. What remains between them and a GPU: the scratch
memory of its kernels, and its allocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from bert_fast.config import ModelConfig
from bert_fast.memory.chain import measure_chain
from bert_fast.memory.meter import LiveBytes
from bert_fast.memory.modes import half_layer, layer, none, optimal
from bert_fast.memory.remat import Chain, Plan
from bert_fast.memory.segments import SegmentRunner
from bert_fast.memory.stages import Hardware, MicroBatch, encoder_chain
from bert_fast.model import fused, loss
from bert_fast.model.attention import SequenceLayout
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.model.loss import chunk_rows

_CPU = torch.device("cpu")
_MIB = 2**20
_SAMPLES, _LENGTH, _PREDICTIONS = 56, 512, 76
_MODES = {"none": none, "layer": layer, "half_layer": half_layer, "optimal": optimal}


def activation_ratios(quick: bool = False) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`activation_ratio_optimal_over_layer/{large,large48}` and the largest errors of predicted peaks."""
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    errors, gpu_errors = [], []
    for name, layers in (("large", 24), ("large48", 48)):
        found = {}
        for how in ("layer", "optimal") if quick or layers == 48 else _MODES:
            measured, predicted, again = activations(layers, how)
            as_cuda, by_shape = activations_as_on_cuda(layers, how)
            found[how] = measured
            errors.append(abs(predicted / measured - 1))
            gpu_errors.append(abs(by_shape / as_cuda - 1))
            rows.append(
                {
                    "model": name, "recompute": how, "memtracker_mib": measured / _MIB, "predicted_mib": predicted / _MIB,
                    "as_on_cuda_mib": as_cuda / _MIB, "gpu_by_shape_mib": by_shape / _MIB, "extra_forward": again,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
        metrics[f"activation_ratio_optimal_over_layer/{name}"] = found["optimal"] / found["layer"]
    metrics["memtracker_error_max"] = max(errors)
    metrics["gpu_by_shape_error_max"] = max(gpu_errors)
    return metrics, rows


def activations(num_layers: int, how: str) -> tuple[int, int, float]:
    """Bytes at most beside weights and gradients: measured, and predicted by the measured chain; and the share of a forward
    pass that runs twice on a GPU."""
    config = shape_of(num_layers)
    model = _meta_model(config)
    with FakeTensorMode(allow_non_fake_inputs=True), fused.turned_off():
        batch, plan = _planned(model, how)
        measured = _tracked(model, batch)
    by_shape = gpu_chain(config)
    again = sum(by_shape.stages[number].forward_s for number in plan.recomputed) / by_shape.forward_s
    return measured, plan.peak_bytes, again


def activations_as_on_cuda(num_layers: int, how: str) -> tuple[int, int]:
    """The same by the plan of a GPU's chain: measured of parts that compute as on CUDA, and predicted by that chain."""
    config = shape_of(num_layers)
    model = _meta_model(config)
    plan: Plan = _MODES[how](gpu_chain(config), None)
    with FakeTensorMode(allow_non_fake_inputs=True), fused.turned_off(), as_on_cuda():
        _make_fake(model)
        model.run_stages = SegmentRunner(plan.segments)
        return _tracked(model, _batch(config)), plan.peak_bytes


@contextmanager
def as_on_cuda() -> Iterator[None]:
    """Inside, the plain parts keep on a CPU what they keep on CUDA.

    Autocast there computes norms and softmax in fp32, dropout keeps a mask of bytes, and chunks of logits are larger.
    """

    def norm(self: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)

    with (
        patch.object(nn.LayerNorm, "forward", norm),
        patch.object(torch.Tensor, "softmax", lambda x, dim: torch.softmax(x.float(), dim)),
        patch.object(F, "dropout", lambda x, p: torch.native_dropout(x, p, train=True)[0]),
        patch.object(loss, "chunk_rows", lambda vocabulary, _: chunk_rows(vocabulary, "cuda")),
    ):
        yield


def _meta_model(config: ModelConfig) -> BertForPretraining:
    with torch.device("meta"):
        return BertForPretraining(config, "padded")


def _tracked(model: BertForPretraining, batch: BertInput) -> int:
    """Bytes of one step at most, beside weights and gradients, as torch's MemTracker counts them."""
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        _pass(model, batch)
    total: int = tracker.get_tracker_snapshot("peak")[_CPU]["Total"]
    return total - 8 * sum(parameter.numel() for parameter in model.parameters())


def timeline(num_layers: int, how: str) -> list[int]:
    """Bytes that are live after each operation of one step, without weights and their gradients."""
    line: list[int] = []

    class Recorded(LiveBytes):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            line.append(self.live)
            return result

    model = _meta_model(shape_of(num_layers))
    with FakeTensorMode(allow_non_fake_inputs=True), fused.turned_off():
        batch, _ = _planned(model, how)
        own = [tensor.untyped_storage() for p in model.parameters() for tensor in (p, p.grad) if tensor is not None]
        with Recorded(own):
            _pass(model, batch)
    return line


def shape_of(num_layers: int) -> ModelConfig:
    """BERT-large with that many layers, without dropout."""
    return ModelConfig(
        vocab_size=30528, hidden_size=1024, num_layers=num_layers, num_heads=16, intermediate_size=4096,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def _make_fake(model: BertForPretraining) -> None:
    """Of a meta model, with gradients."""
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def _planned(model: BertForPretraining, how: str) -> tuple[BertInput, Plan]:
    """Make a meta model a fake one that runs by a plan; its batch, and the plan."""
    _make_fake(model)
    batch = _batch(model.config)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        chain = measure_chain(
            model.stages(batch), batch.input_ids, lambda hidden: model.losses(hidden, batch).total, timed=False
        )
    plan: Plan = _MODES[how](chain, None)
    model.run_stages = SegmentRunner(plan.segments)
    return batch, plan


def _pass(model: BertForPretraining, batch: BertInput) -> None:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        losses = model(batch)
    losses.total.backward()


def gpu_chain(config: ModelConfig) -> Chain:
    """From the model's shape, on a GPU."""
    sums = MicroBatch(_SAMPLES * _LENGTH, _SAMPLES * _LENGTH**2, _SAMPLES * _PREDICTIONS, _SAMPLES)
    return encoder_chain(config, sums, Hardware(2, on_cpu=False, logits_rows=chunk_rows(config.vocab_size, "cuda")))


def _batch(config: ModelConfig) -> BertInput:
    tokens = _SAMPLES * _LENGTH
    ids = torch.zeros(tokens, dtype=torch.int64)
    masked = torch.zeros(_SAMPLES * _PREDICTIONS, dtype=torch.int64)
    ends = torch.zeros(_SAMPLES + 1, dtype=torch.int64)
    labels = torch.zeros(_SAMPLES, dtype=torch.int64)
    return BertInput(ids, ids, ids, masked, masked, labels, SequenceLayout([_LENGTH] * _SAMPLES, ends))
