#!/usr/bin/env python3
"""Balance in measured time: forward and backward of what each strategy gives the slowest and the mean rank of 1,024.

    python -m scripts.benchmarks.balance.step_times --json results/balance/step.json

A small BERT on one core. Its cost model is fitted first, as `balance.cost: measure` does; every strategy plans with it. Then,
one global batch after another, four batches are timed in turn: that of the slowest rank, that of the mean rank, a copy of the
latter (the noise floor) and that of `balanced`'s mean rank. The results are medians over repeats, then means over global
batches. As the slowest rank by the plan need not be the slowest by the clock, ranks drawn at random are timed, too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import scripts.guard  # noqa: F401

import numpy as np
import torch

from bert_fast.allocator import keep_freed_memory
from bert_fast.balance.cost import CostModel, fit_cost, imbalance
from bert_fast.balance.lengths import wikipedia_like
from bert_fast.balance.planner import Plan, Planner
from bert_fast.command import guarded, whole
from bert_fast.config import BalanceConfig, ModelConfig
from bert_fast.config.choices import STRATEGIES
from bert_fast.data.batch import Batch
from bert_fast.errors import UserError
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.model.flops import cost_coefficients
from bert_fast.report.bench import add_arguments, environment, markdown_table, write_result
from bert_fast.train.batches import batch_of_lengths, lay_out, to_device
from bert_fast.train.environment import pick_dtype
from bert_fast.train.setup.cost_model import probe_lengths

from ..common import pin_to_one_core

CPU = torch.device("cpu")
MAX_LEN = 512


class Bench:
    """The model and its stopwatch."""

    def __init__(self, shape: ModelConfig, dtype: torch.dtype, multiple: int) -> None:
        torch.manual_seed(0)
        self.model, self._dtype, self._multiple = BertForPretraining(shape, "matmul"), dtype, multiple
        self._vocab = shape.vocab_size

    def inputs(self, lengths: np.ndarray) -> BertInput:
        """Random tokens in samples of these lengths, longest first."""
        return self._to_device(self._batch(np.sort(lengths)[::-1]))

    def planned(self, planner: Planner, plan: Plan, rank: int, strategy: str) -> BertInput:
        """The same for what a rank gets, laid out as the strategy has it."""
        (part,) = plan.micro_batches(rank)
        lengths = planner.lengths_of(plan)[part]
        batch = self._batch(lengths if plan.rows is not None else np.sort(lengths)[::-1])
        return self._to_device(lay_out(batch, plan, part, MAX_LEN))

    def _batch(self, lengths: np.ndarray) -> Batch:
        return batch_of_lengths(lengths, self._vocab, np.random.default_rng(len(lengths)))

    def _to_device(self, batch: Batch) -> BertInput:
        return to_device(batch, CPU, self._multiple)

    def seconds(self, batch: BertInput) -> float:
        """One forward and backward."""
        self.model.zero_grad(set_to_none=False)
        start = time.perf_counter()
        with torch.autocast("cpu", self._dtype, enabled=self._dtype != torch.float32):
            losses = self.model(batch)
        losses.total.backward()
        return time.perf_counter() - start

    def interleaved(self, batches: dict[str, BertInput], repeats: int) -> dict[str, float]:
        """Median seconds of each, measured in turn; the first round prepares kernels and does not count."""
        times: dict[str, list[float]] = {name: [] for name in batches}
        for number in range(repeats + 1):
            for name, batch in batches.items():
                seconds = self.seconds(batch)
                if number:
                    times[name].append(seconds)
        return {name: statistics.median(values) for name, values in times.items()}

    def fit(self, micro_batch_size: int, repeats: int) -> Any:
        """The cost model of this machine, as a run's warm-up would fit it."""
        rows = []
        probes = probe_lengths(micro_batch_size, MAX_LEN)
        batches = [self.inputs(probe) for probe in probes]
        for number in range(repeats + 1):
            for probe, batch in zip(probes, batches, strict=True):
                seconds = self.seconds(batch)
                if number:
                    rows.append((probe.sum(), (probe**2).sum(), 1e3 * seconds))
        try:
            return fit_cost(np.array(rows, np.float64))
        except ValueError as error:  # times on a busy machine may fall with the length
            raise UserError(
                f"the cost of a step could not be fitted: {error}; measure again on a quieter machine"
            ) from None


def make_planner(lengths: np.ndarray, strategy: str, cost: CostModel, ranks: int, micro_batch_size: int) -> Planner:
    return Planner(
        lengths,
        BalanceConfig(strategy=strategy),
        cost,
        world_size=ranks,
        gradient_accumulation_steps=1,
        micro_batch_size=micro_batch_size,
        node_size=8,
        max_seq_len=MAX_LEN,
        seed=0,
        longest=MAX_LEN,
    )


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=whole(1, 10**6), default=1024, help="default %(default)s")
    parser.add_argument("--micro-batch-size", type=whole(1, 10**6), default=16, help="default %(default)s")
    parser.add_argument(
        "--global-batches", type=whole(1, 10**6), default=4, help="planned and measured (default %(default)s)"
    )
    parser.add_argument("--repeats", type=whole(1, 10**6), default=7, help="timings of a batch (default %(default)s)")
    parser.add_argument(
        "--random-ranks", type=whole(1, 10**6), default=12, help="ranks drawn and timed (default %(default)s)"
    )
    parser.add_argument("--hidden", type=whole(1, 10**5), default=256, help="width of the model (default %(default)s)")
    parser.add_argument("--layers", type=whole(1, 1000), default=2, help="default %(default)s")
    parser.add_argument(
        "--shape-multiple", type=whole(1, 10**5), default=64, help="as batch.shape_multiple (default %(default)s)"
    )
    add_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.global_batches, args.repeats, args.random_ranks, args.hidden = 1, 3, 4, 128
    keep_freed_memory()
    torch.set_num_threads(1)
    pin_to_one_core()
    machine = environment()
    shape = ModelConfig(
        vocab_size=2048,
        hidden_size=args.hidden,
        num_layers=args.layers,
        num_heads=max(1, args.hidden // 64),
        intermediate_size=4 * args.hidden,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    dtype = pick_dtype("auto", CPU)
    bench = Bench(shape, dtype, args.shape_multiple)
    fit = bench.fit(args.micro_batch_size, args.repeats)
    flops = CostModel(*cost_coefficients(shape))
    print(
        f"cost fitted to this machine: {1e3 * fit.linear:.3f} us per token, {1e6 * fit.quadratic:.2f} ns per squared token, "
        f"linear / quadratic {fit.linear / max(fit.quadratic, 1e-12):,.0f} tokens (FLOPs: "
        f"{flops.linear / flops.quadratic:,.0f}), "
        f"{fit.fixed:.1f} ms fixed, residual {100 * fit.residual:.1f} %"
    )
    lengths = wikipedia_like(4_000_000)
    metrics: dict[str, float] = {
        "fit/linear_us": 1e3 * fit.linear,
        "fit/quadratic_ns": 1e6 * fit.quadratic,
        "fit/fixed_ms": fit.fixed,
        "fit/residual": fit.residual,
    }
    samples: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        samples.setdefault(name, []).append(float(value))

    ideal = make_planner(lengths, "balanced", fit.model, args.ranks, args.micro_batch_size)
    for strategy in STRATEGIES:
        planner = make_planner(lengths, strategy, fit.model, args.ranks, args.micro_batch_size)
        for step in range(args.global_batches):
            plan, even = planner.plan(step), ideal.plan(step)
            mean = int(np.abs(plan.costs - plan.costs.mean()).argmin())
            even_mean = int(np.abs(even.costs - even.costs.mean()).argmin())
            batches = {
                "slowest": bench.planned(planner, plan, int(plan.costs.argmax()), strategy),
                "mean": bench.planned(planner, plan, mean, strategy),
                "mean again": bench.planned(planner, plan, mean, strategy),
                "even": bench.planned(ideal, even, even_mean, "balanced"),
            }
            seconds = bench.interleaved(batches, args.repeats)
            note(f"measured/{strategy}/max_over_mean", seconds["slowest"] / seconds["mean"])
            note(f"measured/{strategy}/max_over_balanced_mean", seconds["slowest"] / seconds["even"])
            note(f"measured/{strategy}/noise", abs(seconds["mean again"] / seconds["mean"] - 1))
            # The fixed time of a pass makes the measured ratio a little smaller than the ratio of the costs of samples.
            predicted = (plan.costs.max() + fit.fixed) / (plan.costs.mean() + fit.fixed)
            note(f"predicted/{strategy}/max_over_mean", predicted)
            in_flops = flops.linear * plan.tokens.sum(axis=1) + flops.quadratic * plan.tokens_squared.sum(axis=1)
            note(f"predicted/{strategy}/flops_max_over_mean", imbalance(in_flops))
        if strategy in ("random", "balanced"):
            plan = planner.plan(0)
            chosen = np.random.default_rng(0).permutation(args.ranks)[: args.random_ranks]
            batches = {str(rank): bench.planned(planner, plan, int(rank), strategy) for rank in chosen}
            times = np.array(list(bench.interleaved(batches, args.repeats).values()))
            note(f"measured/{strategy}/random_ranks_max_over_mean", times.max() / times.mean())
            same = {str(rank): batches[str(chosen[0])] for rank in chosen}
            times = np.array(list(bench.interleaved(same, args.repeats).values()))
            note(f"measured/{strategy}/random_ranks_noise", times.max() / times.mean() - 1)
        print(f"{strategy}: measured {np.mean(samples[f'measured/{strategy}/max_over_mean']):.4f}", flush=True)
    metrics |= {name: statistics.fmean(values) for name, values in samples.items()}
    rows = [
        (
            strategy,
            *(f"{metrics[f'measured/{strategy}/{name}']:.3f}" for name in ("max_over_mean",)),
            f"± {metrics[f'measured/{strategy}/noise']:.3f}",
            f"{metrics[f'predicted/{strategy}/max_over_mean']:.3f}",
            f"{metrics[f'predicted/{strategy}/flops_max_over_mean']:.3f}",
            f"{metrics[f'measured/{strategy}/max_over_balanced_mean']:.3f}",
        )
        for strategy in STRATEGIES
    ]
    headers = (
        "strategy",
        "measured max/mean",
        "noise",
        "predicted (fit)",
        "predicted (FLOPs)",
        "max / balanced's mean",
    )
    print("\n" + markdown_table(headers, rows))
    for strategy in ("random", "balanced"):
        print(
            f"{args.random_ranks} ranks drawn at random under {strategy}: max/mean "
            f"{metrics[f'measured/{strategy}/random_ranks_max_over_mean']:.3f}, the same batch as often: "
            f"{1 + metrics[f'measured/{strategy}/random_ranks_noise']:.3f}"
        )
    if args.json:
        config = {
            **{k: v for k, v in vars(args).items() if k != "json"},
            "model": shape.model_dump(),
            "dtype": str(dtype),
        }
        write_result(args.json, metrics, config, machine, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
