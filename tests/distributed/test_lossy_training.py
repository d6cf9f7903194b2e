"""Training over lossy wire formats: per bucket as whole, resumed bit for bit, skipped steps, other ranks; 1-bit Adam."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rank_pool import RankPool
from support.tiny_training import TinyTraining, make_config

from bert_fast.config import Config
from bert_fast.config.choices import WIRE_FORMATS
from bert_fast.run_folder import checkpoint_name

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
FORMATS = [name for name, choice in WIRE_FORMATS.items() if not choice.is_cast]


def config_of(store: Path, world: int, name: str, **optimizer: Any) -> Config:
    communication: dict[str, Any] = {"reduce_dtype": name, "bucket_mb": 0.005}
    if name == "onebit":
        optimizer = {"name": "onebit_adam", **optimizer}
        communication["exact_steps"] = 2
    return make_config(store, world, communication=communication, optimizer={"name": "adamw", **optimizer})


def steps(rank: int, world: int, config: Config, count: int, poisoned: tuple[int, ...] = ()) -> dict[str, Any]:
    task = TinyTraining(rank, world, config)
    assert len(task.components.engine.layout.buckets) > 1
    finite, weights = [], []
    for number in range(count):
        finite.append(bool(task.step(number, number in poisoned).is_finite))
        weights.append(task.weights())
    return {"weights": np.stack(weights), "finite": finite}


@pytest.mark.parametrize("name", FORMATS)
def test_updates_per_bucket_are_those_at_the_end(pool: Pools, tiny_store: Path, name: str) -> None:
    """With a step that is skipped, which both must see on all ranks."""
    found = [
        pool(2).call(steps, config_of(tiny_store, 2, name, step_per_bucket=per_bucket), 7, (4,))
        for per_bucket in (False, True)
    ]
    for one in (*found[0], *found[1]):
        assert one["finite"] == [True] * 4 + [False] + [True] * 2
        np.testing.assert_array_equal(one["weights"], found[0][0]["weights"])
    assert np.isfinite(found[0][0]["weights"]).all()


def resumed(rank: int, world: int, config: Config, folder: Path, count: int, at: int) -> np.ndarray:
    task = TinyTraining(rank, world, config)
    for number in range(at):
        task.step(number)
    task.save(folder, at)
    task = TinyTraining(rank, world, config)
    task.load(folder / checkpoint_name(at))
    for number in range(at, count):
        task.step(number)
    return task.weights()


@pytest.mark.parametrize("name", FORMATS)
def test_a_resumed_run_is_the_same_bit_for_bit(pool: Pools, tiny_store: Path, tmp_path: Path, name: str) -> None:
    config = config_of(tiny_store, 2, name)
    straight = pool(2).call(steps, config, 7)
    for one, other in zip(straight, pool(2).call(resumed, config, tmp_path, 7, 4), strict=True):
        np.testing.assert_array_equal(one["weights"][-1], other)


def save(rank: int, world: int, config: Config, folder: Path) -> None:
    task = TinyTraining(rank, world, config)
    for number in range(4):
        task.step(number)
    task.save(folder, 4)


def load_and_go_on(rank: int, world: int, config: Config, folder: Path) -> tuple[np.ndarray, bool]:
    task = TinyTraining(rank, world, config)
    task.load(folder / checkpoint_name(4))
    return task.weights(), bool(task.step(4).is_finite)


@pytest.mark.parametrize("name", FORMATS)
def test_other_ranks_go_on_from_a_checkpoint(pool: Pools, tiny_store: Path, tmp_path: Path, name: str) -> None:
    pool(2).call(save, config_of(tiny_store, 2, name), tmp_path)
    found = pool(4).call(load_and_go_on, config_of(tiny_store, 4, name), tmp_path)
    for weights, finite in found:
        assert finite
        np.testing.assert_array_equal(weights, found[0][0])


def test_onebit_adam_is_adamw_until_it_compresses(pool: Pools, tiny_store: Path) -> None:
    adamw = pool(2).call(steps, config_of(tiny_store, 2, "fp32"), 4)[0]["weights"]
    onebit = pool(2).call(steps, config_of(tiny_store, 2, "onebit"), 4)[0]["weights"]
    np.testing.assert_array_equal(onebit[:2], adamw[:2])
    assert not np.array_equal(onebit[2], adamw[2])


def zero_rows(rank: int, world: int, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Position embeddings before and after steps of which no sample is as long as the model could read."""
    task = TinyTraining(rank, world, config)
    positions = task.components.model.embeddings.position.weight
    before = positions.detach().clone()
    for number in range(6):
        task.step(number)
    return before, positions.detach().clone()


def test_what_never_has_a_gradient_does_not_drift(pool: Pools, tiny_store: Path) -> None:
    tree = config_of(tiny_store, 2, "onebit", weight_decay=0.0)
    longer = tree.model.model_copy(update={"max_positions": tree.model.max_positions + 8})
    before, after = pool(2).call(zero_rows, tree.model_copy(update={"model": longer}))[0]
    assert torch.equal(after[-8:], before[-8:])
    assert not torch.equal(after, before)
