"""Recomputation on several ranks: with every engine the same losses and weights, bit for bit, as where everything is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rank_pool import RankPool
from support.tiny_training import TinyTraining, make_config

from bert_fast.config import Config
from bert_fast.memory.estimate import kept_from_step_to_step

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
STEPS = 3
ENGINES: dict[str, dict[str, Any]] = {
    "bucketed": {"communication": {"engine": "bucketed", "bucket_mb": 0.02}},
    "planned buckets": {"communication": {"bucket_mb": "auto"}},
    "by bucket": {"communication": {"bucket_mb": 0.02}, "optimizer": {"step_per_bucket": True}},
    "sharded": {"communication": {"bucket_mb": 0.02, "shard_optimizer": True}},
    "ddp": {"communication": {"engine": "ddp"}},
    "accumulated": {"batch": {"global_batch_size": 16, "micro_batch_size": 4, "gradient_accumulation_steps": 2}},
    "virtual ranks": {"batch": {"global_batch_size": 16, "micro_batch_size": 4, "virtual_ranks": 2}},
}


def weights(rank: int, world: int, config: Config) -> Any:
    task = TinyTraining(rank, world, config)
    sums = [task.step(number).mlm_sum.item() for number in range(STEPS)]
    planned = task.components.recomputation
    return task.weights(), np.array(sums), None if planned is None else planned.num_recomputed


def activations(rank: int, world: int, config: Config) -> Any:
    """Bytes of them by the plan, and if all are kept."""
    planned = TinyTraining(rank, world, config).components.recomputation
    assert planned is not None
    return planned.peak_bytes, planned.kept_bytes


@pytest.mark.parametrize("how", ["layer", "optimal", "budget"])
@pytest.mark.parametrize("engine", list(ENGINES))
def test_nothing_changes_bit_for_bit(pool: Pools, tiny_store: Path, engine: str, how: str) -> None:
    changes = ENGINES[engine]
    plain = make_config(tiny_store, 2, **changes)
    memory: dict[str, Any] = {"recompute": how}
    if how == "budget":
        optimal = make_config(tiny_store, 2, **changes, memory={"recompute": "optimal"})
        least, most = pool(2).call(activations, optimal)[0]
        memory["budget_gib"] = (kept_from_step_to_step(plain).total + least + 0.4 * (most - least)) / 2**30
    again = make_config(tiny_store, 2, **changes, memory=memory)
    for kept, recomputed in zip(pool(2).call(weights, plain), pool(2).call(weights, again), strict=True):
        assert np.array_equal(kept[0], recomputed[0])
        assert np.array_equal(kept[1], recomputed[1])
        assert recomputed[2] > 0
