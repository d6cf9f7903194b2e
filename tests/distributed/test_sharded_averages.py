"""Averages over shards: each rank averages its own, and what is evaluated is the average of the unsharded run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.rank_pool import RankPool
from support.tiny_training import STEPS, TinyTraining, make_config

from bert_fast.config import Config
from bert_fast.run_folder import checkpoint_name

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
KINDS: dict[str, dict[str, Any]] = {
    "exponential": {"averaging": {"method": "exponential", "decay": 0.5}},
    "last": {"averaging": {"method": "last", "keep": 3}},
    "schedule_free": {"optimizer": {"name": "schedule_free"}},
}


@pytest.fixture(params=KINDS)
def changes(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "schedule_free":
        pytest.importorskip("schedulefree")
    return KINDS[request.param] | {"model": {"hidden_dropout": 0.0, "attention_dropout": 0.0}}


def config_of(store: Path, world: int, shard: bool, changes: dict[str, Any]) -> Config:
    return make_config(store, world, communication={"shard_optimizer": shard}, **changes)


def train(rank: int, world: int, config: Config, folder: Path, evaluate: bool) -> dict[str, Any]:
    """Weights and evaluated weights after the last step, of which a checkpoint is written; step 2 is skipped."""
    task = TinyTraining(rank, world, config)
    for number in range(STEPS):
        task.step(number, poisoned=number == 2)
        if evaluate:
            task.evaluated()
    task.save(folder, STEPS)
    rows = (
        sum(tensor.numel() for row in task.components.average.rows() for tensor in row)
        if task.components.average
        else 0
    )
    return {"evaluated": task.evaluated(), "weights": task.weights(), "held": rows}


def go_on(rank: int, world: int, config: Config, folder: Path) -> dict[str, Any]:
    """Evaluated weights right after a checkpoint was taken up, and weights after two more steps."""
    task = TinyTraining(rank, world, config)
    task.load(folder / checkpoint_name(STEPS))
    evaluated = task.evaluated()
    for number in (STEPS, STEPS + 1):
        task.step(number)
    return {"evaluated": evaluated, "weights": task.weights(), "later": task.evaluated()}


def test_a_sharded_average_is_the_whole_one(
    pool: Pools, tiny_store: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """To rounding; an evaluation in between changes no bit of what is trained. Any number of ranks takes it up."""
    whole = pool(2).call(train, config_of(tiny_store, 2, False, changes), tmp_path / "whole", True)
    sharded = pool(2).call(train, config_of(tiny_store, 2, True, changes), tmp_path / "sharded", True)
    quiet = pool(2).call(train, config_of(tiny_store, 2, True, changes), tmp_path / "quiet", False)
    for one, never_evaluated in zip(sharded, quiet, strict=True):
        np.testing.assert_allclose(one["evaluated"], whole[0]["evaluated"], rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(one["evaluated"], sharded[0]["evaluated"])
        np.testing.assert_array_equal(one["weights"], never_evaluated["weights"])
        np.testing.assert_array_equal(one["evaluated"], never_evaluated["evaluated"])
        assert np.abs(one["evaluated"] - one["weights"]).max() > 1e-4
    assert sum(one["held"] for one in sharded) == whole[0]["held"]
    resumed = pool(2).call(go_on, config_of(tiny_store, 2, True, changes), tmp_path / "sharded")
    unsharded = pool(2).call(go_on, config_of(tiny_store, 2, False, changes), tmp_path / "sharded")
    alone = go_on(0, 1, config_of(tiny_store, 1, False, changes), tmp_path / "sharded")
    for one in (*resumed, *unsharded, alone):
        np.testing.assert_array_equal(one["evaluated"], sharded[0]["evaluated"])
    for one in (*resumed, *unsharded):  # one rank has other clip norms
        np.testing.assert_allclose(one["later"], resumed[0]["later"], rtol=1e-4, atol=1e-5)
