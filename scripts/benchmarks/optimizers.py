#!/usr/bin/env python3
"""What a step of every optimizer takes on the CPU, beside torch's fused AdamW, and what state it keeps.

    python -m scripts.benchmarks.optimizers --json results/optimizers/steps.json
    python -m scripts.benchmarks.optimizers --layers 2                     # a short model, to see it work
    python -m scripts.benchmarks.optimizers --optimizers soap muon         # these alone: SOAP's decompositions take minutes

Weights in the shapes of BERT (our layout, with query, key and value in one tensor), random gradients, no model. Each optimizer
steps in turn with AdamW, in rounds that begin with the one and the other by turns, so that both see the same machine; medians
over the rounds, and the median of the paired ratios. Means too, of a multiple of ten rounds by default: SOAP renews its bases
in every tenth step, which no median shows. Memory: weights, gradients, and the states of two optimizers at a time.

Metrics: step_ms/OPTIMIZER, mean_step_ms/OPTIMIZER, ratio_to_adamw/OPTIMIZER, state_bytes_per_parameter/OPTIMIZER.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import scripts.guard  # noqa: F401

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bert_fast.cluster.backward_trace import SHAPES
from bert_fast.command import guarded, whole
from bert_fast.config import ModelConfig, OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.model.bert import BertForPretraining
from bert_fast.optim.build import RunOptimizer, build_optimizer
from bert_fast.parts import declare_parts, parts_of
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result

BASELINE = "adamw"
# What is measured: settings of `optimizer`
CONTESTANTS: dict[str, dict[str, Any]] = {
    "adam": {"name": "adam"},
    "nadamw": {"name": "nadamw"},
    "lamb_tensor": {"name": "lamb"},
    "lamb_group": {"name": "lamb", "trust": "group"},
    "lamb_global": {"name": "lamb", "trust": "global"},
    "muon": {"name": "muon"},
    "schedule_free": {"name": "schedule_free"},
    "soap": {"name": "pytorch_optimizer", "class_name": "SOAP"},
    "lion": {"name": "pytorch_optimizer", "class_name": "Lion"},
}
_LEARNING_RATE = 1e-6
_WARM_UP = 2  # steps of each before the first that counts: they make the state


def random_parameters(shape: ModelConfig) -> dict[str, nn.Parameter]:
    """Weights and gradients of a model in fp32, by name; parts (`bert_fast.parts`) as the model declares them."""
    with torch.device("meta"):
        model = BertForPretraining(shape)
    parameters = {}
    for name, of_model in model.named_parameters():
        parameter = nn.Parameter(torch.randn(of_model.shape) * 0.02)
        parameter.grad = torch.randn_like(parameter) * 1e-3
        declare_parts(parameter, parts_of(of_model))
        parameters[name] = parameter
    return parameters


def make_optimizer(settings: dict[str, Any], parameters: dict[str, nn.Parameter]) -> RunOptimizer:
    """Raises UserError where its package is not installed."""
    return build_optimizer(parameters.items(), OptimizerConfig(lr=_LEARNING_RATE, **settings))


def step_seconds(optimizer: RunOptimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def state_bytes(value: Any) -> int:
    """Bytes of all tensors in an optimizer's state, however deep they lie; of one that is made of others (torchao's), those."""
    if is_traceable_wrapper_subclass(value):
        return sum(state_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(state_bytes(each) for each in values)


def compare(settings: dict[str, Any], parameters: dict[str, nn.Parameter], repeats: int) -> dict[str, Any]:
    """Seconds of steps of an optimizer and of AdamW, in turn, and bytes of the states of both."""
    pair = {BASELINE: make_optimizer({"name": BASELINE}, parameters), "other": make_optimizer(settings, parameters)}
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    for number in range(_WARM_UP + repeats):
        for name in list(pair) if number % 2 == 0 else reversed(list(pair)):
            taken = step_seconds(pair[name])
            if number >= _WARM_UP:
                seconds[name].append(taken)
    found = {"seconds": seconds, "bytes": {name: state_bytes(dict(each.state)) for name, each in pair.items()}}
    pair.clear()
    gc.collect()
    return found


def measure(
    names: list[str], parameters: dict[str, nn.Parameter], repeats: int
) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
    """Name, measurement and reason of every one of these contestants; None where it cannot be built here, with the reason."""
    for name in names:
        try:
            yield name, compare(CONTESTANTS[name], parameters, repeats), ""
        except (UserError, ModuleNotFoundError) as error:
            yield name, None, str(error)


def metrics_of(found: dict[str, dict[str, Any]], count: int) -> dict[str, float]:
    """Of all measurements, by name; AdamW's from all of its repeats."""
    of_baseline = [second for each in found.values() for second in each["seconds"][BASELINE]]
    metrics: dict[str, float] = {"parameters": count, **_milliseconds(BASELINE, of_baseline)}
    for name, each in found.items():
        other, baseline = each["seconds"]["other"], each["seconds"][BASELINE]
        metrics |= _milliseconds(name, other)
        metrics[f"ratio_to_{BASELINE}/{name}"] = statistics.median(a / b for a, b in zip(other, baseline, strict=True))
        metrics[f"state_bytes_per_parameter/{name}"] = each["bytes"]["other"] / count
        metrics[f"state_bytes_per_parameter/{BASELINE}"] = each["bytes"][BASELINE] / count
    return metrics


def _milliseconds(name: str, seconds: list[float]) -> dict[str, float]:
    return {
        f"step_ms/{name}": 1e3 * statistics.median(seconds),
        f"mean_step_ms/{name}": 1e3 * statistics.fmean(seconds),
    }


def table(metrics: dict[str, float], names: list[str]) -> str:
    rows = [
        (
            name,
            f"{metrics[f'step_ms/{name}']:,.1f}",
            f"{metrics[f'mean_step_ms/{name}']:,.1f}",
            f"{metrics.get(f'ratio_to_{BASELINE}/{name}', 1.0):.2f}",
            f"{metrics[f'state_bytes_per_parameter/{name}']:.2f}",
        )
        for name in [BASELINE, *names]
    ]
    return markdown_table(("optimizer", "ms per step", "mean", "over AdamW", "bytes of state per parameter"), rows)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [f"bert-{name}" for name in SHAPES]
    parser.add_argument("--config", choices=shapes, default="bert-large", help="shape (default %(default)s)")
    parser.add_argument("--layers", type=whole(1, 1024), help="number of encoder layers (default: the shape's)")
    parser.add_argument("--repeats", type=whole(1, 10**6), default=10, help="steps of each (default %(default)s)")
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME",
        help=f"those to measure beside AdamW, of {', '.join(CONTESTANTS)} (default: all)",
    )  # fmt: skip
    add_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.repeats = args.layers or 1, min(args.repeats, 3)
    machine = environment()
    torch.manual_seed(0)
    shape = SHAPES[args.config.removeprefix("bert-")]
    if args.layers:
        shape = shape.model_copy(update={"num_layers": args.layers})
    parameters = random_parameters(shape)
    count = sum(parameter.numel() for parameter in parameters.values())
    print(f"{args.config} with {shape.num_layers} layers: {len(parameters)} tensors, {count:,} parameters", flush=True)
    print(f"{machine['cpu']}, {torch.get_num_threads()} threads", flush=True)
    found = {}
    for name, measured, reason in measure(args.optimizers, parameters, args.repeats):
        if measured is None:
            print(f"{name} is left out: {reason}", flush=True)
            continue
        found[name] = measured
        print(f"{name}: {1e3 * statistics.median(measured['seconds']['other']):,.1f} ms", flush=True)
    if not found:
        raise UserError("no optimizer but AdamW can be built here, so that there is nothing to compare")
    metrics = metrics_of(found, count)
    print("\n" + table(metrics, list(found)))
    if args.json:
        config = {"shape": args.config, "layers": shape.num_layers, "repeats": args.repeats,
                  "threads": torch.get_num_threads(), "settings": {name: CONTESTANTS[name] for name in found}}  # fmt: skip
        samples = {name: each["seconds"] for name, each in found.items()}
        write_result(args.json, metrics, config, machine, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
