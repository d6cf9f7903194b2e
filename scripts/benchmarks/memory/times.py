"""Steps of one model in one process, by several ways to recompute in turn."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from bert_fast.allocator import keep_freed_memory
from bert_fast.config import Config
from bert_fast.train.batches import batch_of_lengths, to_device
from bert_fast.train.environment import Environment, pick_dtype
from bert_fast.train.setup.build import build_model
from bert_fast.train.setup.recomputation import set_up_recomputation

_CPU = torch.device("cpu")


def step_times(
    configs: dict[str, Config], lengths: list[int], repeats: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Forward and backward of a micro-batch by each config, interleaved: `time_ratio/NAME` over `none`, and seconds.

    The configs differ in `memory` alone, and share the model's weights.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    first = next(iter(configs.values()))
    environment = Environment(0, 0, 1, _CPU, pick_dtype(first.train.precision, _CPU))
    models = {}
    for name, config in configs.items():
        model = models[name] = build_model(config, environment)
        for own, shared in zip(model.parameters(), models[next(iter(models))].parameters(), strict=True):
            own.data = shared.data
        set_up_recomputation(config, environment, model)
    batch = to_device(batch_of_lengths(np.array(lengths), first.model.vocab_size, np.random.default_rng(0)), _CPU, 1)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            with torch.autocast("cpu", environment.dtype, enabled=environment.autocast, cache_enabled=False):
                losses = model(batch)
            losses.total.backward()
            if repeat:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(own / kept for own, kept in zip(times, seconds["none"], strict=True))
        for name, times in seconds.items()
    }
    metrics = {f"time_ratio/{name}": ratio for name, ratio in ratios.items()}
    if ratios.get("layer", 1.0) != 1.0 and "budget" in ratios:
        metrics["budget_overhead_over_layer"] = (ratios["budget"] - 1) / (ratios["layer"] - 1)
    return metrics, seconds
