"""batch.virtual_ranks: a few ranks repeat the steps of many real ones, to the rounding of a sum in another order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rank_pool import RankPool
from support.tiny_training import TinyTraining, make_config

from bert_fast.config import Config
from bert_fast.config.choices import CLIP_MODES

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
GLOBAL_BATCH_SIZE = 16
STEPS = 3


def config_of(store: Path, real: int, virtual: int, clip: str, **changes: dict[str, Any]) -> Config:
    communication = {"clip": clip, **({} if clip == "none" else {"max_norm": 0.3}), **changes.pop("communication", {})}
    batch = {
        "global_batch_size": GLOBAL_BATCH_SIZE, "virtual_ranks": virtual, "gradient_accumulation_steps": 2,
        "micro_batch_size": GLOBAL_BATCH_SIZE // real // virtual // 2,
    }  # fmt: skip
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return make_config(store, real, communication=communication, batch=batch, model=no_dropout, **changes)


def train(rank: int, world: int, config: Config) -> dict[str, Any]:
    """What this rank has after every step: its gradient, weights, loss sums and clip statistics."""
    task = TinyTraining(rank, world, config)
    engine = task.components.engine
    gradients, weights, sums = [], [], []
    for number in range(STEPS):
        result = task.step(number)
        sums.append([result.mlm_sum.item(), result.nsp_sum.item()])
        gradients.append(np.concatenate([engine.reduced(n).numpy().copy() for n in range(len(engine.layout.buckets))]))
        weights.append(task.weights())
    statistics = {name: values["clipped_share"] for name, values in engine.clip_statistics.read().items()}
    return {"gradients": gradients, "weights": weights, "sums": np.array(sums), "clipped": statistics}


def outcome(pool: Pools, config: Config) -> list[dict[str, Any]]:
    world = config.system.world_size
    return [train(0, 1, config)] if world == 1 else pool(world).call(train, config)


def compare(real: list[dict[str, Any]], virtual: list[dict[str, Any]]) -> None:
    for rank in virtual:
        for number in range(STEPS):
            largest = np.abs(real[0]["gradients"][number]).max()
            gradients = rank["gradients"][number], real[0]["gradients"][number]
            np.testing.assert_allclose(*gradients, rtol=0, atol=1e-5 * largest)
            np.testing.assert_allclose(rank["weights"][number], real[0]["weights"][number], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(sum(one["sums"] for one in virtual), sum(one["sums"] for one in real), rtol=1e-5)
    for name in real[0]["clipped"]:
        shares = [np.mean([one["clipped"][name] for one in ranks]) for ranks in (real, virtual)]
        assert shares[0] == pytest.approx(shares[1]), f"{name}: every virtual rank counts"


@pytest.mark.parametrize("clip", CLIP_MODES)
def test_equal_to_as_many_real_ranks(pool: Pools, tiny_store: Path, clip: str) -> None:
    real = outcome(pool, config_of(tiny_store, 4, 1, clip))
    compare(real, outcome(pool, config_of(tiny_store, 1, 4, clip)))
    compare(real, outcome(pool, config_of(tiny_store, 2, 2, clip)))


@pytest.mark.parametrize("clip", ["global_before_reduce", "bucket_before_reduce"])
def test_equal_to_eight_real_ranks(pool: Pools, tiny_store: Path, clip: str) -> None:
    compare(outcome(pool, config_of(tiny_store, 8, 1, clip)), outcome(pool, config_of(tiny_store, 1, 8, clip)))


@pytest.mark.parametrize(
    ("shard", "per_bucket", "wire"), [(True, False, "fp32"), (True, True, "fp32"), (False, True, "bf16")]
)
def test_sharded_and_updated_by_bucket(pool: Pools, tiny_store: Path, shard: bool, per_bucket: bool, wire: str) -> None:
    changes = {"communication": {"reduce_dtype": wire}}
    plain = config_of(tiny_store, 2, 2, "bucket_before_reduce", **changes)
    changes = {
        "communication": {"reduce_dtype": wire, "shard_optimizer": shard},
        "optimizer": {"step_per_bucket": per_bucket},
    }
    other = config_of(tiny_store, 2, 2, "bucket_before_reduce", **changes)
    expected = outcome(pool, plain)[0]["weights"]
    for rank in outcome(pool, other):
        np.testing.assert_allclose(rank["weights"], expected, rtol=2e-5, atol=2e-6)


def test_the_number_of_ranks_changes_the_step(pool: Pools, tiny_store: Path) -> None:
    """Else the tests above could not fail: clipping by rank depends on how many there are."""
    mode = "bucket_before_reduce"
    one, four = (outcome(pool, config_of(tiny_store, 1, virtual, mode))[0]["gradients"][0] for virtual in (1, 4))
    assert np.abs(one - four).max() > 1e-2 * np.abs(one).max()
