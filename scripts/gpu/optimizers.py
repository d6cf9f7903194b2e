"""Stage `optimizer`: updates alone at BERT-large's size, against the time that moving their bytes takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from bert_fast.cluster.backward_trace import SHAPES
from bert_fast.communication.buckets import plan_layout
from bert_fast.config import ModelConfig, OptimizerConfig
from bert_fast.model.bert import BertForPretraining, expected_ready_order
from bert_fast.optim.bucketwise import BucketwiseOptimizer
from bert_fast.optim.build import build_optimizer
from bert_fast.parts import declare_parts, parts_of
from bert_fast.train.cuda_graphs import tensor_rates

from .machine import bandwidth
from .stage import Context, NotAvailable
from .timing import median_seconds

# Bytes that an update in fp32 moves for each parameter at least. AdamW reads weight, gradient and two moments and writes all
# but the gradient. LAMB needs the norm of the update before it can apply it: it reads the weight and the moments once more.
# Muon has one moment of a matrix; its time is in its products.
_BYTES = {"adamw": 28, "adam": 28, "nadamw": 28, "lamb": 40, "muon": 20}
_BUCKET_MIB = 25.0


def run(context: Context) -> None:
    result = context.result
    rate = bandwidth(context.device)
    shape = ModelConfig(vocab_size=512, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    names, tensors, order = _parameters(shape if context.tiny else SHAPES["large"], context.device)
    count = sum(p.numel() for p in tensors)
    result.metrics["optimizer/parameters"] = count
    for name, per_parameter in _BYTES.items():
        result.metrics[f"optimizer_floor_ms/{name}"] = 1e3 * count * per_parameter / rate
    layout = plan_layout(
        names, [p.numel() for p in tensors], order, clip_groups="layer", bucket_mb=_BUCKET_MIB, whole_groups=True
    )
    buckets = [[tensors[i] for i in bucket.parameters] for bucket in layout.buckets]
    variants: dict[str, tuple[str, Callable[[torch.optim.Optimizer], Callable[[], object]]]] = {
        "adamw_fused": ("adamw", lambda optimizer: optimizer.step),
        "adam_fused": ("adam", lambda optimizer: optimizer.step),
        "nadamw_foreach": ("nadamw", lambda optimizer: optimizer.step),
        "lamb_foreach": ("lamb", lambda optimizer: optimizer.step),
        "muon": ("muon", lambda optimizer: optimizer.step),
        "adamw_by_bucket": ("adamw", lambda optimizer: _by_bucket(optimizer, buckets)),
        "lamb_by_bucket": ("lamb", lambda optimizer: _by_bucket(optimizer, buckets)),
        "lamb_compiled": ("lamb", lambda optimizer: _compiled(optimizer, context)),
    }
    for variant, (name, make) in variants.items():
        if context.has_time(15 if variant == "lamb_compiled" else 2, variant):
            context.case(variant, partial(_measure, context, names, tensors, variant, name, make))
    shown = {v: result.metrics.get(f"optimizer_ms/{v}") for v in variants}
    result.summary = ", ".join(f"{v} {ms:.2f} ms" for v, ms in shown.items() if ms is not None)


def _parameters(shape: ModelConfig, device: str) -> tuple[list[str], list[nn.Parameter], list[int]]:
    with torch.device("meta"):
        model = BertForPretraining(shape)
    named = list(model.named_parameters())
    tensors = []
    for _, parameter in named:
        tensor = nn.Parameter(torch.randn(parameter.shape, device=device) * 0.02)
        tensor.grad = torch.randn_like(tensor) * 1e-3
        # Each part is a matrix of Muon's, and has a trust ratio of LAMB's
        declare_parts(tensor, parts_of(parameter))
        tensors.append(tensor)
    return [name for name, _ in named], tensors, expected_ready_order(model)


def _by_bucket(optimizer: torch.optim.Optimizer, buckets: list[list[nn.Parameter]]) -> Callable[[], object]:
    parts = BucketwiseOptimizer(optimizer, buckets)

    def step() -> None:
        for number in range(len(buckets)):
            parts.step(number)

    return step


def _compiled(optimizer: torch.optim.Optimizer, context: Context) -> Callable[[], object]:
    if context.tiny:
        raise NotAvailable("compiling is measured on CUDA")
    tensor_rates(optimizer, torch.device(context.device))  # a rate that is a number would be compiled in
    return torch.compile(optimizer.step)


def _measure(
    context: Context,
    names: list[str],
    tensors: list[nn.Parameter],
    variant: str,
    name: str,
    make: Callable[[torch.optim.Optimizer], Callable[[], object]],
) -> None:
    optimizer = build_optimizer(zip(names, tensors, strict=True), OptimizerConfig(name=name, lr=1e-6))
    seconds = median_seconds(make(optimizer), context.device, repeats=10, warm_up=3)
    metrics = context.result.metrics
    metrics[f"optimizer_ms/{variant}"] = 1e3 * seconds
    metrics[f"optimizer_over_floor/{variant}"] = 1e3 * seconds / metrics[f"optimizer_floor_ms/{name}"]
    del optimizer
    gc.collect()
