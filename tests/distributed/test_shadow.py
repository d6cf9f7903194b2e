"""optimizer.step_per_bucket=true: the weights of `end`, bit for bit, updated while later buckets are on the wire; or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankPool
from support.tiny_task import config_over

from bert_fast.config import Config
from bert_fast.config.load import config_from_tree
from bert_fast.data.store import Store
from bert_fast.train.batches import planned_batches, to_device
from bert_fast.train.environment import Environment
from bert_fast.train.setup.build import build
from bert_fast.train.setup.cost_model import make_planner
from bert_fast.train.step import StepInput

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
STEPS = 4


def make_config(store: Path, world: int, step_per_bucket: bool, **changes: dict[str, Any]) -> Config:
    tree = config_over(store)
    tree["system"]["world_size"] = world
    tree["batch"] = {"global_batch_size": 16, "micro_batch_size": 16 // world}
    tree["optimizer"]["step_per_bucket"] = step_per_bucket
    for section, values in changes.items():
        tree[section] |= values
    return config_from_tree(tree)


def train(rank: int, world: int, config: Config, poison_step: int | None = None) -> dict[str, Any]:
    """Weights after every step; rank 1's word embedding (ready last) has a NaN gradient in one of them."""
    components = build(config, Environment(rank, rank, world, torch.device("cpu"), torch.float32))
    store = Store(config.data.train)
    planner = make_planner(config, store.lengths)
    weights, finite, poison = [], [], False

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.index_fill(0, torch.tensor([7]), math.nan) if poison else gradient

    if rank == 1:
        components.model.embeddings.word.weight.register_hook(spoil)
    for step in range(STEPS):
        poison = step == poison_step
        plan = planner.plan(step)
        batches = planned_batches(store, plan, rank, config.balance.strategy, config.data.max_seq_len)
        masked = int(store.num_masked[plan.ids].sum(dtype=np.int64))
        inputs = [to_device(batch, torch.device("cpu"), 64) for batch in batches]
        result = components.step(StepInput(inputs, masked, config.batch.global_batch_size), lr=0.01)
        finite.append(bool(result.is_finite))
        weights.append(torch.cat([p.detach().ravel() for p in components.model.parameters()]).numpy().copy())
    return {"weights": np.stack(weights), "finite": finite, "norm": result.grad_norm.item()}


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("clip", ["none", "bucket_before_reduce"])
@pytest.mark.parametrize("world", [1, 2])
def test_same_weights_as_at_the_end(pool: Pools, tiny_store: Path, world: int, clip: str, optimizer: str) -> None:
    results = []
    for step_per_bucket in (False, True):
        changes = {
            "optimizer": {"name": optimizer, "step_per_bucket": step_per_bucket},
            "communication": {"clip": clip},
        }
        config = make_config(tiny_store, world, step_per_bucket, **changes)
        results += [train(0, 1, config)] if world == 1 else pool(world).call(train, config)
    for result in results[1:]:
        np.testing.assert_array_equal(result["weights"], results[0]["weights"])
        assert result["norm"] == results[0]["norm"]
    assert (np.diff(results[0]["weights"], axis=0) != 0).any(axis=1).all()


@pytest.mark.parametrize("reduce_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", ["none", "bucket_before_reduce"])
def test_a_step_that_is_not_finite_changes_no_weight(
    pool: Pools, tiny_store: Path, clip: str, reduce_dtype: str
) -> None:
    """Though the bucket with the NaN is the last: by then the others would have been updated."""
    results = []
    for step_per_bucket in (False, True):
        config = make_config(tiny_store, 2, step_per_bucket, communication={"clip": clip, "reduce_dtype": reduce_dtype})
        results += pool(2).call(train, config, 2)
    for result in results:
        assert result["finite"] == [True, True, False, True]
        np.testing.assert_array_equal(result["weights"][2], result["weights"][1])
        np.testing.assert_array_equal(result["weights"], results[0]["weights"])


def order_of_events(rank: int, world: int, config: Config) -> list[str]:
    """What happens in the end of a step: waits for buckets and updates."""
    components = build(config, Environment(rank, rank, world, torch.device("cpu"), torch.float32))
    events: list[str] = []

    class Waiting:
        def __init__(self, work: dist.Work, number: int) -> None:
            self._work, self._number = work, number

        def wait(self) -> None:
            self._work.wait()
            events.append(f"wait {self._number}")

    engine, parts = components.engine, components.step._parts
    launch, step = engine._launch, parts.step

    def launched() -> None:
        launch()
        exchange = engine._in_flight[-1]
        exchange.work = Waiting(exchange.work, exchange.number)

    engine._launch = launched
    parts.step = lambda number: (events.append(f"update {number}"), step(number))
    store = Store(config.data.train)
    plan = make_planner(config, store.lengths).plan(0)
    (batch,) = planned_batches(store, plan, rank, "balanced", config.data.max_seq_len)
    components.step(StepInput([to_device(batch, torch.device("cpu"))], 50, 16), lr=0.01)
    return events


def test_a_bucket_is_updated_before_the_next_is_waited_for(pool: Pools, tiny_store: Path) -> None:
    config = make_config(tiny_store, 2, True)
    for events in pool(2).call(order_of_events, config):
        number = len(events) // 2
        assert number >= 3
        assert events == [f"{what} {bucket}" for bucket in range(number) for what in ("wait", "update")]
