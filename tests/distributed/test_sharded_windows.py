"""Preconditioners whose ranks each have a part of every gradient in the window (communication.shard_optimizer)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from support.rank_pool import RankPool
from support.tiny_training import TinyTraining, make_config

from bert_fast.config import Config, OptimizerConfig
from bert_fast.config.choices import OPTIMIZERS
from bert_fast.errors import UserError
from bert_fast.optim.build import build_optimizer
from bert_fast.run_folder import checkpoint_name

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "mfac": {"damping": 1e-4, "beta2": 0.999}, "ggt": {"beta2": 0.9}, "mfac_sparse": {"damping": 1e-4, "beta2": 0.999},
    "ggt_sparse": {"beta2": 0.9}, "micro_adam": {},
}  # fmt: skip


def config_of(store: Path, world: int, name: str, sharded: bool, **optimizer: Any) -> Config:
    settings = {"window": 4, "weight_decay": 0.1, **SETTINGS[name], **optimizer, "name": name}
    communication = {"shard_optimizer": sharded, "bucket_mb": 0.005}
    return make_config(store, world, communication=communication, optimizer=settings)


def weights(
    rank: int, world: int, config: Config, folder: Path | None = None, at: int = 0, reload: bool = False
) -> Any:
    """After STEPS steps, with a checkpoint after `at`, from which another training goes on where it is reloaded."""
    task = TinyTraining(rank, world, config)
    for number in range(STEPS):
        if folder is not None and number == at:
            folder.mkdir(exist_ok=True)
            task.save(folder, at)
            if reload:
                task = TinyTraining(rank, world, config)
                task.load(folder / checkpoint_name(at))
        task.step(number)
    return task.weights()


def start(rank: int, world: int, config: Config) -> Any:
    return TinyTraining(rank, world, config).weights()


@pytest.mark.parametrize("precondition", ["layer", "model"])
@pytest.mark.parametrize("name", ["mfac", "ggt"])
def test_shards_make_the_updates_of_the_whole(pool: Pools, tiny_store: Path, name: str, precondition: str) -> None:
    """Of the dense ones: blocks of the sparse ones begin elsewhere."""
    whole, sharded = (
        pool(2).call(weights, config_of(tiny_store, 2, name, sharded, precondition=precondition))[0]
        for sharded in (False, True)
    )
    moved = np.abs(whole - pool(2).call(start, config_of(tiny_store, 2, name, False))[0]).max()
    assert moved > 0.002
    np.testing.assert_allclose(sharded, whole, atol=1e-3 * moved)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_the_same_bit_for_bit(pool: Pools, tiny_store: Path, tmp_path: Path, name: str) -> None:
    config = config_of(tiny_store, 2, name, True)
    straight, resumed = (pool(2).call(weights, config, tmp_path / str(r), 3, r) for r in (False, True))
    for one, other in zip(straight, resumed, strict=True):
        np.testing.assert_array_equal(one, straight[0])
        np.testing.assert_array_equal(one, other)


def refused(rank: int, world: int, config: Config, path: Path) -> str:
    task = TinyTraining(rank, world, config)
    try:
        task.load(path)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("world", "sharded"), [(4, True), (2, False)])
def test_it_is_not_divided_anew(pool: Pools, tiny_store: Path, tmp_path: Path, world: int, sharded: bool) -> None:
    pool(2).call(weights, config_of(tiny_store, 2, "mfac_sparse", True), tmp_path, 3)
    config = config_of(tiny_store, world, "mfac_sparse", sharded)
    for text in pool(world).call(refused, config, tmp_path / checkpoint_name(3)):
        assert "cannot be divided anew" in text
        assert "2 ranks" in text


def test_other_buckets_are_refused(pool: Pools, tiny_store: Path, tmp_path: Path) -> None:
    """They would be other parts of the model, of the same sizes or not."""
    pool(2).call(weights, config_of(tiny_store, 2, "mfac_sparse", True), tmp_path, 3)
    config = config_of(tiny_store, 2, "mfac_sparse", True)
    other = config.model_copy(update={"communication": config.communication.model_copy(update={"bucket_mb": 1.0})})
    for text in pool(2).call(refused, other, tmp_path / checkpoint_name(3)):
        assert "for other parts of the model" in text


def test_a_rank_may_hold_nothing() -> None:
    for name, choice in OPTIMIZERS.items():
        if choice.window is None:
            continue
        optimizer = build_optimizer([], OptimizerConfig(name=name, window=3))
        share = Mock(return_value={})
        optimizer.share_sums = share
        optimizer.step()
        assert [call.args[1:] for call in share.call_args_list] == ([] if name == "micro_adam" else [({}, 3)])


def test_which_are_sharded() -> None:
    """All whose mathematics allows it: sums over parts of rows; not products with whole matrices."""
    windows = {name for name, choice in OPTIMIZERS.items() if choice.window is not None}
    assert {name for name in windows if OPTIMIZERS[name].not_sharded} == {"mfac_lowrank"}
