#!/usr/bin/env python3
"""AdamW's moments in few bits, ours (`optimizer.state_dtype`) beside torchao's: what is held, what a step takes, what is lost.

    python -m pip install -c constraints.txt torchao      # without it ours are measured alone
    python -m scripts.benchmarks.compact_states --json results/memory/compact_states.json

Memory and time, for two sets of random weights and gradients: `small` is a BERT of 4 layers of width 512, whose decoder bias of
30,522 numbers is a multiple of no block; `odd` has a width of 300, so that most of its matrices are none either. Each optimizer
steps in turn with torch's fused AdamW, in rounds that begin with the one and the other by turns; medians over the rounds, and
the median of the paired ratios. The first step of each is timed apart: torchao compiles in it, here with a cache of compiled
code that begins empty.

Accuracy, on a small masked-token problem: neighbours predict a token through an embedding, two matrices and a LayerNorm.
Trained: the loss on held-out tokens after all steps, over that of fused AdamW with the same batches. Fed: weights that get the
very gradients and rates of the fused AdamW run; the distance of the ways of all weights, and of the last update, as shares of
its own.

torchao's CPUOffloadOptimizer is not here: it refuses to work without CUDA.

Metrics: step_ms/SET/THREADS/OPTIMIZER, ratio_to_adamw/..., first_step_s/..., state_bytes_per_parameter/SET/OPTIMIZER,
loss_over_adamw/OPTIMIZER with its least and most of all seeds, way_error/OPTIMIZER, last_update_error/OPTIMIZER.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import scripts.guard  # noqa: F401

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu

from bert_fast.cluster.backward_trace import SHAPES
from bert_fast.command import guarded, whole
from bert_fast.config import OptimizerConfig
from bert_fast.errors import UserError
from bert_fast.optim.build import build_optimizer, decay_groups
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result
from scripts.benchmarks.optimizers import random_parameters, state_bytes, step_seconds

BASELINE = "adamw"
# What is measured: settings of `optimizer`; None: torch's AdamW by its foreach functions, which no setting chooses
CONTESTANTS: dict[str, dict[str, Any] | None] = {
    "adamw_foreach": None,
    "ours_bf16": {"state_dtype": "bf16"},
    "ours_int8": {"state_dtype": "int8"},
    "ours_int4": {"state_dtype": "int4"},
    "torchao_8bit": {"name": "torchao", "class_name": "AdamW8bit"},
    "torchao_4bit": {"name": "torchao", "class_name": "AdamW4bit"},
    "torchao_fp8": {"name": "torchao", "class_name": "AdamWFp8"},
}
SETS = {
    "small": {"hidden_size": 512, "num_layers": 4, "num_heads": 8, "intermediate_size": 2048},
    "odd": {"hidden_size": 300, "num_layers": 3, "num_heads": 4, "intermediate_size": 1100, "vocab_size": 5003},
}
_BETA2, _EPS = 0.999, 1e-6
_WARM_UP = 2  # steps of each before the first that counts: they make the state


def make_optimizer(name: str, parameters: dict[str, nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Raises UserError where its package is not installed."""
    settings: dict[str, Any] | None = {} if name == BASELINE else CONTESTANTS[name]
    if settings is None:
        groups = decay_groups(parameters.items(), 0.01)
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, _BETA2), eps=_EPS, foreach=True)
    return build_optimizer(parameters.items(), OptimizerConfig(lr=lr, beta2=_BETA2, eps=_EPS, **settings))


# ---- memory and time ------------------------------------------------------------------------------------------------


def compare(name: str, parameters: dict[str, nn.Parameter], repeats: int) -> dict[str, Any]:
    """Seconds of steps of an optimizer and of fused AdamW, in turn, of the first step, and bytes of both states."""
    pair = {BASELINE: make_optimizer(BASELINE, parameters, 1e-6), "other": make_optimizer(name, parameters, 1e-6)}
    seconds: dict[str, list[float]] = {each: [] for each in pair}
    first: dict[str, float] = {}
    for number in range(_WARM_UP + repeats):
        for each in list(pair) if number % 2 == 0 else reversed(list(pair)):
            taken = step_seconds(pair[each])  # type: ignore[arg-type]
            first.setdefault(each, taken)
            if number >= _WARM_UP:
                seconds[each].append(taken)
    held = {each: state_bytes(dict(optimizer.state)) for each, optimizer in pair.items()}
    pair.clear()
    gc.collect()
    return {"seconds": seconds, "first": first, "bytes": held}


def metrics_of_times(found: dict[str, dict[str, Any]], prefix: str, count: int) -> dict[str, float]:
    """Of one set with one number of threads: `prefix` is SET/THREADS."""
    of_set = prefix.partition("/")[0]
    metrics: dict[str, float] = {}
    baseline = [second for each in found.values() for second in each["seconds"][BASELINE]]
    metrics[f"step_ms/{prefix}/{BASELINE}"] = 1e3 * statistics.median(baseline)
    for name, each in found.items():
        pairs = zip(each["seconds"]["other"], each["seconds"][BASELINE], strict=True)
        metrics[f"step_ms/{prefix}/{name}"] = 1e3 * statistics.median(each["seconds"]["other"])
        metrics[f"ratio_to_{BASELINE}/{prefix}/{name}"] = statistics.median(a / b for a, b in pairs)
        metrics[f"first_step_s/{prefix}/{name}"] = each["first"]["other"]
        metrics[f"state_bytes_per_parameter/{of_set}/{name}"] = each["bytes"]["other"] / count
        metrics[f"state_bytes_per_parameter/{of_set}/{BASELINE}"] = each["bytes"][BASELINE] / count
    return metrics


# ---- accuracy -------------------------------------------------------------------------------------------------------

_VOCABULARY, _WIDTH, _BATCH, _LR = 1024, 64, 128, 3e-3


class MaskedTokens(nn.Module):
    """A token from its two neighbours. Its matrices are multiples of torchao's blocks, so that none stays in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.up = nn.Linear(2 * _WIDTH, 256)
        self.down = nn.Linear(256, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)
        self.decoder_bias = nn.Parameter(torch.zeros(_VOCABULARY))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Mean loss of the middle of triples [batch, 3]."""
        around = self.embedding(text[:, [0, 2]]).flatten(1)
        hidden = self.norm(self.down(gelu(self.up(around))))
        return cross_entropy(hidden @ self.embedding.weight.T + self.decoder_bias, text[:, 1])


def triples(count: int, seed: int) -> torch.Tensor:
    """Text [count, 3] of which three in four tokens follow from the one before, and the others are rare or frequent words."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randperm(_VOCABULARY, generator=torch.Generator().manual_seed(12345))
    frequency = 1.0 / torch.arange(1.0, _VOCABULARY + 1)

    def words() -> torch.Tensor:
        return torch.multinomial(frequency, count, replacement=True, generator=generator)

    text = [words()]
    for _ in range(2):
        is_next = torch.rand(count, generator=generator) < 0.75
        text.append(torch.where(is_next, follows[text[-1]], words()))
    return torch.stack(text, dim=1)


def rate(step: int, steps: int) -> float:
    """Up over a tenth of the steps, and down to a tenth of the rate."""
    return _LR * min((step + 1) / (0.1 * steps), 1.0 - 0.9 * step / steps)


def step_at(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def trained_loss(name: str, steps: int, seed: int) -> float:
    torch.manual_seed(seed)
    model = MaskedTokens()
    optimizer = make_optimizer(name, dict(model.named_parameters()), _LR)
    for step in range(steps):
        model.zero_grad()
        model(triples(_BATCH, 1_000_000 * (seed + 1) + step)).backward()
        step_at(optimizer, rate(step, steps))
    with torch.no_grad():
        return model(triples(8192, 7)).item()


def fed_errors(names: list[str], steps: int, seed: int) -> dict[str, dict[str, float]]:
    """Way and last update of weights that get the gradients of fused AdamW's run, against its own."""
    torch.manual_seed(seed)
    model = MaskedTokens()
    models = {BASELINE: model, **{name: copy.deepcopy(model) for name in names}}
    optimizers = {name: make_optimizer(name, dict(each.named_parameters()), _LR) for name, each in models.items()}
    start = weights_of(model)
    before: dict[str, torch.Tensor] = {}
    for step in range(steps):
        model.zero_grad()
        model(triples(_BATCH, 1_000_000 * (seed + 1) + step)).backward()
        before = {name: weights_of(each) for name, each in models.items()}
        for name, each in models.items():
            for parameter, source in zip(each.parameters(), model.parameters(), strict=True):
                assert source.grad is not None
                parameter.grad = source.grad.clone()
            step_at(optimizers[name], rate(step, steps))
    after = {name: weights_of(each) for name, each in models.items()}
    last = {name: after[name] - before[name] for name in models}
    return {
        name: {
            "way_error": ((after[name] - after[BASELINE]).norm() / (after[BASELINE] - start).norm()).item(),
            "last_update_error": ((last[name] - last[BASELINE]).norm() / last[BASELINE].norm()).item(),
        }
        for name in names
    }


def weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().ravel() for parameter in model.parameters()])


def metrics_of_accuracy(losses: dict[str, list[float]], errors: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    metrics = {f"loss/{name}": statistics.median(each) for name, each in losses.items()}
    for name in losses:
        if name != BASELINE:
            over = [one / other for one, other in zip(losses[name], losses[BASELINE], strict=True)]
            for suffix, of in (("", statistics.median), ("_least", min), ("_most", max)):
                metrics[f"loss_over_{BASELINE}{suffix}/{name}"] = of(over)
            for kind in ("way_error", "last_update_error"):
                metrics[f"{kind}/{name}"] = statistics.median(each[name][kind] for each in errors)
    return metrics


# ---- report ---------------------------------------------------------------------------------------------------------


def able(names: list[str]) -> Iterator[tuple[str, str]]:
    """Those of `names` that can be built here, and with an empty name the reasons of the others, each once."""
    reasons = set()
    for name in names:
        try:
            make_optimizer(name, {"weight": nn.Parameter(torch.zeros(2, 2))}, 1e-3)
            yield name, ""
        except UserError as error:
            if str(error) not in reasons:
                reasons.add(str(error))
                yield "", str(error)


def table(metrics: dict[str, float], names: list[str], sets: list[str], threads: list[int]) -> str:
    """A row for each optimizer; sets and numbers of threads beside each other."""
    timed = [f"{of_set}/{number}" for of_set in sets for number in threads]
    headers = [
        "optimizer", *(f"bytes, {each}" for each in sets), *(f"ms, {each}" for each in timed),
        *(f"over fused, {each}" for each in timed), "first step s", "loss", "way error", "last update error",
    ]  # fmt: skip

    def cell(key: str, form: str, otherwise: str = "") -> str:
        return format(metrics[key], form) if key in metrics else otherwise

    rows = [
        [
            name,
            *(cell(f"state_bytes_per_parameter/{each}/{name}", ".2f") for each in sets),
            *(cell(f"step_ms/{each}/{name}", ",.0f") for each in timed),
            *(cell(f"ratio_to_{BASELINE}/{each}/{name}", ".1f", "1") for each in timed),
            cell(f"first_step_s/{timed[0]}/{name}", ".1f"),
            cell(f"loss_over_{BASELINE}/{name}", ".4f", "1"),
            cell(f"way_error/{name}", ".3f", "0"),
            cell(f"last_update_error/{name}", ".3f", "0"),
        ]
        for name in [BASELINE, *names]
    ]
    return markdown_table(headers, rows)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=whole(1, 10**6), default=7, help="steps of each (default %(default)s)")
    parser.add_argument("--threads", type=whole(1, 1024), nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="of weights (default: all)")
    parser.add_argument("--steps", type=whole(1, 10**6), default=300, help="of the accuracy (default %(default)s)")
    parser.add_argument("--seeds", type=whole(1, 1000), default=5, help="of the accuracy (default %(default)s)")
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME",
        help=f"those to measure beside fused AdamW, of {', '.join(CONTESTANTS)} (default: all)",
    )  # fmt: skip
    add_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.sets, args.threads, args.repeats = ["odd"], args.threads[:1], min(args.repeats, 3)
        args.steps, args.seeds = min(args.steps, 30), 1
    machine = environment()
    names: list[str] = []
    for name, reason in able(args.optimizers):
        if reason:
            print(f"left out: {reason}", flush=True)
        else:
            names.append(name)
    if not names:
        raise UserError("none of these optimizers can be built here, so that there is nothing to compare")
    metrics: dict[str, float] = {}
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        for of_set in args.sets:
            for number in args.threads:
                torch.set_num_threads(number)
                torch.compiler.reset()  # what was compiled for another number of threads is not run
                torch.manual_seed(0)
                parameters = random_parameters(SHAPES["base"].model_copy(update=SETS[of_set]))
                count = sum(parameter.numel() for parameter in parameters.values())
                metrics[f"parameters/{of_set}"] = count
                print(f"{of_set}: {count:,} parameters, {number} thread(s)", flush=True)
                found = {}
                for name in names:
                    found[name] = compare(name, parameters, args.repeats)
                    middle = statistics.median(found[name]["seconds"]["other"])
                    print(f"  {name}: {1e3 * middle:,.1f} ms", flush=True)
                metrics |= metrics_of_times(found, f"{of_set}/{number}", count)
                samples[f"{of_set}/{number}"] = {name: each["seconds"] for name, each in found.items()}
        torch.set_num_threads(1)
        torch.compiler.reset()
        losses = {n: [trained_loss(n, args.steps, seed) for seed in range(args.seeds)] for n in [BASELINE, *names]}
        errors = [fed_errors(names, args.steps, seed) for seed in range(args.seeds)]
    metrics |= metrics_of_accuracy(losses, errors)
    samples |= {"losses": losses, "errors": errors}
    print("\n" + table(metrics, names, args.sets, args.threads))
    if args.json:
        config = {"sets": {each: SETS[each] for each in args.sets}, "repeats": args.repeats, "threads": args.threads,
                  "steps": args.steps, "seeds": args.seeds,
                  "settings": {name: CONTESTANTS[name] for name in names}}  # fmt: skip
        write_result(args.json, metrics, config, machine, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
