"""Training over lossy wire formats: per bucket as whole, resumed bit for bit, skipped steps, other ranks; 1-bit Adam."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rank_pool import RankPool
from support.steps import weights_of
from support.tiny_training import TinyTraining, make_config

from bert_fast.config import Config
from bert_fast.config.choices import OPTIMIZERS, WIRE_FORMATS
from bert_fast.run_folder import checkpoint_name

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
PAIRED = {name: choice.wire for name, choice in OPTIMIZERS.items() if choice.wire}
FORMATS = [
    *(name for name, choice in WIRE_FORMATS.items() if not choice.is_cast and name not in PAIRED.values()),
    *PAIRED,
]


def config_of(store: Path, world: int, wire: str, **optimizer: Any) -> Config:
    """`wire`: a format, or an optimizer that has one of its own."""
    communication: dict[str, Any] = {"reduce_dtype": PAIRED.get(wire, wire), "bucket_mb": 0.005}
    optimizer = {"name": "adamw", **optimizer}
    if wire in PAIRED:
        optimizer = {**optimizer, "name": wire}
        communication["exact_steps"] = 2
    if wire == "zero_one_adam":
        communication |= {"var_update_scaler": 1, "local_step_scaler": 2}
    return make_config(store, world, communication=communication, optimizer=optimizer)


def steps(rank: int, world: int, config: Config, count: int, poisoned: tuple[int, ...] = ()) -> dict[str, Any]:
    task = TinyTraining(rank, world, config)
    assert len(task.components.engine.layout.buckets) > 1
    finite, weights = [], []
    for number in range(count):
        finite.append(bool(task.step(number, number in poisoned).is_finite))
        weights.append(task.weights())
    return {"weights": np.stack(weights), "finite": finite}


PER_BUCKET = [name for name in FORMATS if name not in OPTIMIZERS or not OPTIMIZERS[name].not_per_bucket]


@pytest.mark.parametrize("name", PER_BUCKET)
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


def with_checkpoint(
    rank: int, world: int, config: Config, folder: Path, count: int, at: int, reload: bool
) -> np.ndarray:
    """Weights after `count` steps with a checkpoint at `at`, from which another training goes on where it is reloaded."""
    task = TinyTraining(rank, world, config)
    for number in range(at):
        task.step(number)
    folder.mkdir(exist_ok=True)
    task.save(folder, at)
    if reload:
        task = TinyTraining(rank, world, config)
        task.load(folder / checkpoint_name(at))
    for number in range(at, count):
        task.step(number)
    return task.weights()


@pytest.mark.parametrize("name", FORMATS)
def test_a_resumed_run_is_the_same_bit_for_bit(pool: Pools, tiny_store: Path, tmp_path: Path, name: str) -> None:
    config = config_of(tiny_store, 2, name)
    straight, resumed = (
        pool(2).call(with_checkpoint, config, tmp_path / str(reload), 9, 6, reload) for reload in (False, True)
    )
    for one, other in zip(straight, resumed, strict=True):
        np.testing.assert_array_equal(one, straight[0])
        np.testing.assert_array_equal(one, other)


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


@pytest.mark.parametrize(("name", "plain"), [("onebit_adam", "adamw"), ("onebit_lamb", "lamb")])
def test_it_is_the_plain_optimizer_until_it_compresses(pool: Pools, tiny_store: Path, name: str, plain: str) -> None:
    exact = pool(2).call(steps, config_of(tiny_store, 2, "fp32", name=plain), 4)[0]["weights"]
    onebit = pool(2).call(steps, config_of(tiny_store, 2, name), 4)[0]["weights"]
    np.testing.assert_array_equal(onebit[:2], exact[:2])
    assert not np.array_equal(onebit[2], exact[2])


@pytest.mark.parametrize("name", PAIRED)
def test_the_first_steps_may_be_skipped(pool: Pools, tiny_store: Path, name: str) -> None:
    """Then the exact steps are later: there is no second moment yet that could be frozen."""
    config = config_of(tiny_store, 2, name)
    for one in pool(2).call(steps, config, 6, (0, 1)):
        assert one["finite"] == [False, False, True, True, True, True]
        assert np.isfinite(one["weights"]).all()
        assert np.array_equal(one["weights"][1], one["weights"][0])
        assert not np.array_equal(one["weights"][2], one["weights"][1])


def zero_rows(rank: int, world: int, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Position embeddings before and after steps of which no sample is as long as the model could read."""
    task = TinyTraining(rank, world, config)
    positions = task.components.model.embeddings.position.weight
    before = positions.detach().clone()
    for number in range(6):
        task.step(number)
    return before, positions.detach().clone()


def test_what_never_has_a_gradient_does_not_drift(pool: Pools, tiny_store: Path) -> None:
    tree = config_of(tiny_store, 2, "onebit_adam", weight_decay=0.0)
    longer = tree.model.model_copy(update={"max_positions": tree.model.max_positions + 8})
    before, after = pool(2).call(zero_rows, tree.model_copy(update={"model": longer}))[0]
    assert torch.equal(after[-8:], before[-8:])
    assert not torch.equal(after, before)


def local_steps(rank: int, world: int, config: Config, count: int, poisoned: int) -> dict[str, Any]:
    task = TinyTraining(rank, world, config)
    wire, kinds, finite, sent = task.components.engine.wire, [], [], []
    own = None
    for number in range(count):
        before = wire.bytes_sent
        finite.append(bool(task.step(number, number == poisoned).is_finite))
        kinds.append(wire.kind)  # type: ignore[attr-defined]
        sent.append(wire.bytes_sent - before)
        if kinds[-1] == "local":
            own = weights_of(task.components).numpy().copy()
    with task.components.evaluated_weights():
        synced = weights_of(task.components).numpy().copy()
    return {"kinds": kinds, "finite": finite, "sent": sent, "own": own, "synced": synced}


def test_ranks_send_nothing_in_local_steps_and_are_the_same_where_weights_are_read(
    pool: Pools, tiny_store: Path
) -> None:
    """A gradient of one rank that is not finite makes all skip the step, in which there is no exchange to see it by."""
    config = config_of(tiny_store, 2, "zero_one_adam")
    one, other = pool(2).call(local_steps, config, 9, 6)
    assert one["kinds"] == ["exact", "synced", "synced", "synced", "local", "synced", "local", "local", "local"]
    assert one["finite"] == other["finite"] == [number != 6 for number in range(9)]
    assert [sent for kind, sent in zip(one["kinds"], one["sent"], strict=True) if kind == "local"] == [4] * 4
    assert not np.array_equal(one["own"], other["own"])
    np.testing.assert_array_equal(one["synced"], other["synced"])
    assert np.isfinite(one["synced"]).all()
