"""communication.shard_optimizer: the weights of the unsharded run to rounding, with a part of its state on each rank."""

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
from test_shadow import make_config as unsharded_config

from bert_fast.communication.buckets import GradientLayout, plan_layout
from bert_fast.communication.sharded import ShardedReducer, shard_slices
from bert_fast.config import Config
from bert_fast.data.store import Store
from bert_fast.train.batches import planned_batches, to_device
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment
from bert_fast.train.rank_optimizer import ShardedOptimizer
from bert_fast.train.setup.build import build
from bert_fast.train.setup.cost_model import make_planner
from bert_fast.train.step import StepInput, StepResult

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
STEPS = 4
CPU = torch.device("cpu")
CLIPS = ["none", "global_before_reduce", "bucket_before_reduce", "global_after_reduce"]


def make_config(store: Path, world: int, shard: bool, **changes: dict[str, Any]) -> Config:
    communication = {"shard_optimizer": shard, **changes.pop("communication", {})}
    return unsharded_config(store, world, "end", communication=communication, **changes)


class Task:
    """TrainComponents of a config, and its steps over the tiny store."""

    def __init__(self, rank: int, world: int, config: Config) -> None:
        self.config, self.rank = config, rank
        self.components: TrainComponents = build(config, Environment(rank, rank, world, CPU, torch.float32))
        self.store = Store(config.data.train)
        self.planner = make_planner(config, self.store.lengths)

    def step(self, number: int) -> StepResult:
        plan = self.planner.plan(number)
        batches = planned_batches(self.store, plan, self.rank, "balanced", self.config.data.max_seq_len)
        masked = int(self.store.num_masked[plan.ids].sum(dtype=np.int64))
        inputs = [to_device(batch, CPU, 64) for batch in batches]
        return self.components.step(StepInput(inputs, masked, self.config.batch.global_batch_size), lr=0.01)

    def weights(self) -> np.ndarray:
        state = self.components.model.state_dict()
        return torch.cat([value.ravel() for value in state.values()]).numpy().copy()


def train(rank: int, world: int, config: Config, poison_step: int | None = None) -> dict[str, Any]:
    """Weights and norms of every step, and the whole optimizer's state at the end; rank 1 may have a NaN in one step."""
    task = Task(rank, world, config)
    weights, norms, finite, poison = [], [], [], False
    if rank == 1:
        task.components.model.embeddings.word.weight.register_hook(
            lambda gradient: gradient.index_fill(0, torch.tensor([7]), math.nan) if poison else gradient
        )
    for number in range(STEPS):
        poison = number == poison_step
        result = task.step(number)
        weights.append(task.weights())
        norms.append(result.grad_norm.item())
        finite.append(bool(result.is_finite))
    optimizer = task.components.optimizer
    inner = optimizer.inner if isinstance(optimizer, ShardedOptimizer) else optimizer
    held = sum(entry["exp_avg"].numel() for entry in inner.state.values())
    state = optimizer.state_dict()
    plain = {
        place: {name: value.numpy().copy() for name, value in entry.items()} for place, entry in state["state"].items()
    }
    return {
        "weights": np.stack(weights), "norms": norms, "finite": finite, "held": held, "state": plain,
        "groups": [group["params"] for group in state["param_groups"]],
        "bytes": task.components.engine.wire.bytes_sent,
    }  # fmt: skip


def compare(whole: list[dict[str, Any]], sharded: list[dict[str, Any]], rtol: float = 2e-5) -> None:
    for one in sharded:
        np.testing.assert_array_equal(one["weights"], sharded[0]["weights"])
        np.testing.assert_allclose(one["norms"], whole[0]["norms"], rtol=rtol)
        np.testing.assert_allclose(one["weights"], whole[0]["weights"], rtol=rtol, atol=2e-6)
    assert (np.diff(whole[0]["weights"], axis=0) != 0).any(axis=1).all()


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("clip", CLIPS)
def test_same_weights_under_every_clipping(pool: Pools, tiny_store: Path, clip: str, optimizer: str) -> None:
    changes = {"optimizer": {"name": optimizer}, "communication": {"clip": clip, "max_norm": 0.3}}
    whole, sharded = (pool(2).call(train, make_config(tiny_store, 2, shard, **changes)) for shard in (False, True))
    compare(whole, sharded)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("step_per_bucket", [True, False])
def test_same_weights_on_four_ranks_and_updated_by_bucket(
    pool: Pools, tiny_store: Path, step_per_bucket: bool, optimizer: str
) -> None:
    whole = pool(4).call(train, make_config(tiny_store, 4, False, optimizer={"name": optimizer}))
    sharded = pool(4).call(
        train, make_config(tiny_store, 4, True, optimizer={"name": optimizer, "step_per_bucket": step_per_bucket})
    )
    compare(whole, sharded)
    size = whole[0]["weights"].shape[1]
    assert [one["held"] for one in whole] == [size] * 4
    assert sum(one["held"] for one in sharded) == size
    assert max(one["held"] for one in sharded) < 0.3 * size
    assert whole[0]["bytes"] <= sharded[0]["bytes"] < 1.2 * whole[0]["bytes"], "only padding comes on top"


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_state_is_gathered_into_the_unsharded_form(pool: Pools, tiny_store: Path, optimizer: str) -> None:
    whole, sharded = (
        pool(2).call(train, make_config(tiny_store, 2, shard, optimizer={"name": optimizer})) for shard in (False, True)
    )
    assert sharded[1]["state"] == {}, "only rank 0 writes"
    for one in sharded[:1]:
        assert one["groups"] == whole[0]["groups"]
        assert one["state"].keys() == whole[0]["state"].keys()
        for place, entry in whole[0]["state"].items():
            assert one["state"][place].keys() == entry.keys()
            for name, value in entry.items():
                assert one["state"][place][name].shape == value.shape
                np.testing.assert_allclose(
                    one["state"][place][name], value, rtol=1e-4, atol=1e-7, err_msg=f"{place} {name}"
                )


def go_on(rank: int, world: int, first: Config, second: Config) -> dict[str, Any]:
    """Two steps under one config, two under another that takes up model and optimizer."""
    one = Task(rank, world, first)
    for number in range(2):
        one.step(number)
    model, written = one.components.model.state_dict(), [one.components.optimizer.state_dict()]
    dist.broadcast_object_list(written, src=0)
    two = Task(rank, world, second)
    two.components.model.load_state_dict(model)
    two.components.optimizer.load_state_dict(written[0])
    norms = [two.step(number).grad_norm.item() for number in (2, 3)]
    return {"weights": two.weights()[None], "norms": norms}


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_checkpoint_is_read_with_and_without_sharding(pool: Pools, tiny_store: Path, optimizer: str) -> None:
    changes: dict[str, Any] = {
        "optimizer": {"name": optimizer}, "model": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    }  # fmt: skip
    whole, sharded = (make_config(tiny_store, 2, shard, **changes) for shard in (False, True))
    expected = pool(2).call(go_on, whole, whole)[0]
    for first, second in ((whole, sharded), (sharded, whole), (sharded, sharded)):
        for found in pool(2).call(go_on, first, second):
            np.testing.assert_allclose(found["norms"], expected["norms"], rtol=1e-4)
            np.testing.assert_allclose(found["weights"], expected["weights"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step_per_bucket", [True, False])
def test_a_step_that_is_not_finite_changes_no_weight(pool: Pools, tiny_store: Path, step_per_bucket: bool) -> None:
    for one in pool(2).call(train, make_config(tiny_store, 2, True, optimizer={"step_per_bucket": step_per_bucket}), 2):
        assert one["finite"] == [True, True, False, True]
        np.testing.assert_array_equal(one["weights"][2], one["weights"][1])


@pytest.mark.parametrize("reduce_dtype", ["bf16", "fp16"])
def test_formats_on_the_wire(pool: Pools, tiny_store: Path, reduce_dtype: str) -> None:
    narrow = pool(2).call(train, make_config(tiny_store, 2, True, communication={"reduce_dtype": reduce_dtype}))
    full = pool(2).call(train, make_config(tiny_store, 2, True))
    np.testing.assert_array_equal(narrow[1]["weights"], narrow[0]["weights"])
    np.testing.assert_allclose(narrow[0]["norms"], full[0]["norms"], rtol=0.02)
    assert not np.array_equal(narrow[0]["norms"], full[0]["norms"])
    assert 2 * narrow[0]["bytes"] == full[0]["bytes"]


def order_of_waits(rank: int, world: int, config: Config) -> list[str]:
    """In the second step: modules that begin, and waits for weights."""
    task = Task(rank, world, config)
    engine = task.components.engine
    assert isinstance(engine, ShardedReducer)
    events: list[str] = []
    task.step(0)
    gathering = dict(engine._gathering)

    class Waiting:
        def __init__(self, work: dist.Work, number: int) -> None:
            self._work, self._number = work, number

        def wait(self) -> None:
            self._work.wait()
            events.append(f"wait {self._number}")

    engine._gathering = {number: Waiting(work, number) for number, work in gathering.items()}  # type: ignore[misc]
    for name, module in task.components.model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: events.append(name))
    task.step(1)
    return events


def test_a_layer_waits_for_its_own_weights_only(pool: Pools, tiny_store: Path) -> None:
    """Weights are needed from the embeddings (the last bucket) to the heads (the first)."""
    config = make_config(tiny_store, 2, True, communication={"bucket_mb": 0.001})
    for events in pool(2).call(order_of_waits, config):
        waits = [int(event.split()[1]) for event in events if event.startswith("wait")]
        assert waits == sorted(waits, reverse=True)
        assert len(waits) == waits[0] + 1 == 4, "embeddings, two layers, heads"
        assert events.index("wait 3") < events.index("embeddings.word") < events.index("wait 2")
        assert events.index("layers.0.output_norm") < events.index("wait 1") < events.index("layers.1.qkv")
        assert events.index("layers.1.output_norm") < events.index("wait 0") < events.index("heads.transform")


def waits_of_compiled(rank: int, world: int, config: Config) -> list[int]:
    """Which buckets the second step waits for, in order, before the end of forward; layers are traced, not generated."""
    real = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: real(self, backend="eager", **options)  # type: ignore[assignment,method-assign]
    try:
        task = Task(rank, world, config)
        task.step(0)
        engine = task.components.engine
        assert isinstance(engine, ShardedReducer)
        waited: list[int] = []
        wait_for = engine._wait_for
        engine._wait_for = lambda number: (waited.append(number), wait_for(number))[1]  # type: ignore[method-assign]
        wait_pending = engine.wait_pending
        engine.wait_pending = lambda: (waited.append(-1), wait_pending())[1]  # type: ignore[method-assign]
        task.step(1)
        return list(dict.fromkeys(waited[: waited.index(-1)]))
    finally:
        torch.nn.Module.compile = real  # type: ignore[method-assign]
        torch.compiler.reset()


@pytest.mark.slow
def test_compiled_layers_wait_for_their_weights(pool: Pools, tiny_store: Path) -> None:
    """The hooks come after the first trace, in which the order of gradients is measured."""
    changes: dict[str, Any] = {"communication": {"bucket_mb": 0.001}, "train": {"compile": True}}
    for waited in pool(2).call(waits_of_compiled, make_config(tiny_store, 2, True, **changes)):
        assert waited == [3, 2, 1, 0]


@pytest.mark.parametrize("world", [1, 2, 3, 1024])
def test_pieces_cover_every_weight_once(world: int) -> None:
    numel = [5, 1, 700, 33, 16, 2]
    layout: GradientLayout = plan_layout(
        [f"t{i}" for i in range(6)], numel, [5, 4, 3, 2, 1, 0], clip_groups="tensor", bucket_mb=50 * 4 / 2**20,
        whole_groups=True, shards=world,
    )  # fmt: skip
    count = [np.zeros(n, int) for n in numel]
    for rank in range(world):
        for piece in shard_slices(layout, rank, world):
            assert layout.bucket_of[piece.parameter] == piece.bucket
            count[piece.parameter][piece.begin : piece.end] += 1
    assert all((each == 1).all() for each in count)
    assert all((bucket.end - bucket.start) % world == 0 for bucket in layout.buckets)
