"""The cost model of a run: from the config, from FLOPs, or measured on this machine before the clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from bert_fast.balance.cost import CostFit, CostModel, fit_cost, read_cost
from bert_fast.balance.planner import Planner
from bert_fast.config import Config
from bert_fast.config.balance import CostCoefficients
from bert_fast.errors import TrainingError
from bert_fast.model.bert import BertInput
from bert_fast.model.flops import cost_coefficients
from bert_fast.train.batches import batch_of_lengths, to_device
from bert_fast.train.collectives import broadcast_numbers, gather_floats
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment
from bert_fast.train.telemetry.hardware import synchronize

_ROUNDS = 5


def make_cost(config: Config) -> tuple[CostModel, str]:
    """The config's cost model, or FLOPs of its model, and where it is from. Not for `balance.cost=measure`."""
    balance = config.balance
    if isinstance(balance.cost, CostCoefficients):
        return CostModel(balance.cost.linear, balance.cost.quadratic), "config"
    if balance.cost_path is not None:
        return read_cost(balance.cost_path), f"file {balance.cost_path}"
    return CostModel(*cost_coefficients(config.model, config.data.mask_share)), "FLOPs of the model"


def make_planner(
    config: Config,
    lengths: np.ndarray,
    cost: CostModel | None = None,
    longest: int | None = None,
    draw: Callable[[int], np.ndarray] | None = None,
) -> Planner:
    """The planner of a config over a length table; `longest` is the largest length, if known, `draw` as `Planner` has it."""
    return Planner(
        lengths,
        config.balance,
        cost or make_cost(config)[0],
        world_size=config.system.world_size,
        gradient_accumulation_steps=config.batch.gradient_accumulation_steps,
        micro_batch_size=config.batch.micro_batch_size,
        node_size=config.system.node_size,
        virtual_ranks=config.batch.virtual_ranks,
        max_seq_len=config.longest_sample,
        seed=config.train.seed,
        num_steps=config.train.max_steps,
        longest=longest,
        draw=draw,
    )


def probe_lengths(micro_batch_size: int, max_seq_len: int) -> list[np.ndarray]:
    """Batches that tell the terms of the cost apart: from all short to all long, of a full and of half the tokens."""
    full = max(max_seq_len, micro_batch_size * max_seq_len // 2)
    return [
        np.full(tokens // length, length)
        for tokens in (full, full // 2)
        for length in (max(1, max_seq_len // part) for part in (8, 4, 2, 1))
        if length <= tokens
    ]


def time_forward_backward(components: TrainComponents, batch: BertInput, environment: Environment) -> float:
    """Seconds of one forward and backward pass over a micro-batch, without communication."""
    synchronize(environment.device)
    start = time.perf_counter()
    with components.engine.micro_batch(last=False):
        autocast = torch.autocast(
            environment.device.type, environment.dtype, enabled=environment.autocast, cache_enabled=False
        )
        with autocast:
            losses = components.engine.module(batch)
        losses.total.backward()
    synchronize(environment.device)
    return time.perf_counter() - start


def fit_cost_model(
    config: Config,
    environment: Environment,
    components: TrainComponents,
    measure: Callable[[TrainComponents, BertInput, Environment], float] = time_forward_backward,
) -> CostFit:
    """Fit the cost model to forward and backward times of made-up batches, all ranks measuring at once. A collective.

    Weights, optimizer and data stay untouched; the random state does not.

    Args:
        measure: gives the seconds of a pass over a micro-batch.

    Raises:
        TrainingError: the times do not grow with the tokens.
    """
    rng = np.random.default_rng(0)
    probes = probe_lengths(config.batch.micro_batch_size, config.data.max_seq_len)
    batches = [batch_of_lengths(p, config.model.vocab_size, rng, config.data.mask_share) for p in probes]
    inputs = [to_device(batch, environment.device, config.batch.shape_multiple) for batch in batches]
    times = []
    for round_number in range(_ROUNDS + 1):
        for batch in inputs:
            seconds = measure(components, batch, environment)
            if round_number:  # the first prepares kernels for these shapes
                times.append(1e3 * seconds)
    components.engine.zero_grad()
    table = gather_floats(times, environment.device)  # [ranks, rounds * probes]
    sums = np.array([[p.sum(), (p**2).sum()] for p in probes], np.float64)
    try:
        fit = fit_cost(np.column_stack([np.tile(sums, (table.size // len(probes), 1)), table.ravel()]))
    except ValueError as error:
        raise TrainingError(f"balance.cost=measure: {error}; set balance.cost=flops to plan with FLOPs") from None
    mine = [fit.linear, fit.quadratic, fit.fixed, fit.residual, fit.doubt]
    linear, quadratic, fixed, residual, doubt = broadcast_numbers(mine, environment.device)
    return CostFit(linear, quadratic, fixed, residual, doubt, fit.rows)
