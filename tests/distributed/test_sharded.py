"""communication.shard_optimizer: the weights of the unsharded run to rounding, with a part of its state on each rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rank_pool import RankPool
from support.tiny_training import STEPS, TinyTraining, train
from support.tiny_training import make_config as unsharded_config

from bert_fast.communication.buckets import GradientLayout, plan_layout
from bert_fast.communication.sharded import shard_slices
from bert_fast.config import Config
from bert_fast.run_folder import checkpoint_name
from bert_fast.trace import Trace
from bert_fast.train.checkpoint.snapshot import optimizer_counts, slices_to_write

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
CLIPS = ["none", "global_before_reduce", "bucket_before_reduce", "global_after_reduce"]


def make_config(store: Path, world: int, shard: bool, **changes: dict[str, Any]) -> Config:
    communication = {"shard_optimizer": shard, **changes.pop("communication", {})}
    return unsharded_config(store, world, communication=communication, **changes)


def compare(whole: list[dict[str, Any]], sharded: list[dict[str, Any]], rtol: float = 2e-5) -> None:
    for one in sharded:
        np.testing.assert_array_equal(one["weights"], sharded[0]["weights"])
        np.testing.assert_allclose(one["norms"], whole[0]["norms"], rtol=rtol)
        np.testing.assert_allclose(one["weights"], whole[0]["weights"], rtol=rtol, atol=2e-6)
    assert (np.diff(whole[0]["weights"], axis=0) != 0).any(axis=1).all()


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("clip", CLIPS)
def test_same_weights_under_every_clipping(pool: Pools, tiny_store: Path, clip: str, optimizer: str) -> None:
    threshold = {} if clip == "none" else {"max_norm": 0.3}
    changes = {"optimizer": {"name": optimizer}, "communication": {"clip": clip, **threshold}}
    whole, sharded = (pool(2).call(train, make_config(tiny_store, 2, shard, **changes)) for shard in (False, True))
    compare(whole, sharded)


@pytest.mark.parametrize(
    "optimizer", [{"name": "adam"}, {"name": "nadamw"}, {"name": "lamb", "trust": "group"}, {"name": "lamb", "trust": "global"}]
)  # fmt: skip
def test_same_weights_of_every_other_rule(pool: Pools, tiny_store: Path, optimizer: dict[str, Any]) -> None:
    """Norms over several tensors are those of all ranks, which hold pieces of them."""
    whole, sharded = (
        pool(4).call(train, make_config(tiny_store, 4, shard, optimizer=optimizer)) for shard in (False, True)
    )
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


@pytest.mark.parametrize("next_sentence", [True, False])
def test_same_weights_where_the_last_layer_computes_predicted_tokens(
    pool: Pools, tiny_store: Path, next_sentence: bool
) -> None:
    """Modules that are called with fewer rows wait for their weights too.

    The two add up in another order. With Adam's usual eps a gradient near 1e-6 turns its last digits into 5e-6 of a weight.
    """
    model = {"last_layer": "predicted", "next_sentence": next_sentence, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    adamw = {"name": "adamw", "eps": 1e-4}
    every_row = make_config(tiny_store, 2, False, model={**model, "last_layer": "all"}, optimizer=adamw)
    whole = pool(2).call(train, every_row)
    for shard in (False, True):
        compare(whole, pool(2).call(train, make_config(tiny_store, 2, shard, model=model, optimizer=adamw)))


def optimizer_state(rank: int, world: int, config: Config) -> dict[str, Any]:
    """What this rank would write of the optimizer's state after some steps: slices by tensor, and its counts."""
    task = TinyTraining(rank, world, config)
    for number in range(STEPS):
        task.step(number)
    written: dict[str, list[tuple[int, int, np.ndarray]]] = {}
    for piece in slices_to_write(task.components, task.environment):
        if piece.name.startswith("optimizer."):
            written.setdefault(piece.name, []).append((piece.begin, piece.numel, piece.values.numpy().copy()))
    return {"written": written, "counts": optimizer_counts(task.components)}


def whole_tensors(ranks: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The tensors that all ranks write together; fails where an element is written twice or never."""
    tensors: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, slices in rank["written"].items():
            for begin, numel, values in slices:
                tensors.setdefault(name, np.zeros(numel, np.float32))[begin : begin + len(values)] = values
                counts.setdefault(name, np.zeros(numel, int))[begin : begin + len(values)] += 1
    assert all((count == 1).all() for count in counts.values())
    return tensors


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_what_ranks_write_of_their_shards_is_the_unsharded_state(pool: Pools, tiny_store: Path, optimizer: str) -> None:
    whole, sharded = (
        pool(2).call(optimizer_state, make_config(tiny_store, 2, shard, optimizer={"name": optimizer}))
        for shard in (False, True)
    )
    assert [rank["counts"] for rank in sharded] == [whole[0]["counts"]] * 2
    assert whole[0]["counts"]["scalars"] == {"exp_avg exp_avg_sq": {"step": STEPS}}
    expected, found = whole_tensors(whole), whole_tensors(sharded)
    assert found.keys() == expected.keys()
    assert {name.split(".")[1] for name in found} == {"exp_avg", "exp_avg_sq"}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-7, err_msg=name)


def go_on(rank: int, world: int, first: Config, second: Config, folder: Path) -> dict[str, Any]:
    """Two steps under one config, two under another that takes up its checkpoint."""
    one = TinyTraining(rank, world, first)
    for number in range(2):
        one.step(number)
    one.save(folder, step=2)
    two = TinyTraining(rank, world, second)
    two.load(folder / checkpoint_name(2))
    norms = [two.step(number).grad_norm.item() for number in (2, 3)]
    return {"weights": two.weights(), "norms": norms}


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_checkpoint_is_read_with_and_without_sharding(
    pool: Pools, tiny_store: Path, tmp_path: Path, optimizer: str
) -> None:
    changes: dict[str, Any] = {
        "optimizer": {"name": optimizer}, "model": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    }  # fmt: skip
    whole, sharded = (make_config(tiny_store, 2, shard, **changes) for shard in (False, True))
    never_stopped = pool(2).call(train, whole)[0]
    for number, (first, second) in enumerate(((whole, whole), (whole, sharded), (sharded, whole), (sharded, sharded))):
        for found in pool(2).call(go_on, first, second, tmp_path / str(number)):
            np.testing.assert_allclose(found["norms"], never_stopped["norms"][2:], rtol=1e-4)
            np.testing.assert_allclose(found["weights"], never_stopped["weights"][-1], rtol=1e-4, atol=1e-5)


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
    """In the second step's forward pass: modules that end, and waits for weights."""
    task, trace = TinyTraining(rank, world, config), Trace()
    task.step(0)
    for name, module in task.components.model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda *_, name=name: trace.begin("module", name)())
    return waits_of_forward(task, trace)


def waits_of_forward(task: TinyTraining, trace: Trace) -> list[str]:
    """Run the second step; names on the tracks `module` and `wait` during its forward pass, in order."""
    task.components.step.set_trace(trace)
    task.step(1)
    spans = trace.spans()
    (forward,) = (span for span in spans if span.name == "forward 0")
    return [
        span.name
        for span in spans
        if span.track in ("module", "wait") and forward.start <= span.start and span.end <= forward.end
    ]


def buckets_of(events: list[str]) -> list[int]:
    """Numbers of the buckets whose weights are waited for."""
    return [int(event.removeprefix("weights of bucket ")) for event in events if event.startswith("weights of")]


def test_a_layer_waits_for_its_own_weights_only(pool: Pools, tiny_store: Path) -> None:
    """Weights are needed from the embeddings (the last bucket) to the heads (the first)."""
    config = make_config(tiny_store, 2, True, communication={"bucket_mb": 0.001})
    for events in pool(2).call(order_of_waits, config):
        assert buckets_of(events) == [3, 2, 1, 0], "embeddings, two layers, heads"
        first, second, third, last = (events.index(f"weights of bucket {number}") for number in (3, 2, 1, 0))
        assert first < events.index("embeddings.word") < second
        assert events.index("layers.0.output_norm") < third < events.index("layers.1.qkv")
        assert events.index("layers.1.output_norm") < last < events.index("heads.transform")


def waits_of_compiled(rank: int, world: int, config: Config) -> list[str]:
    """The same with layers that are traced, not generated."""
    real = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **options: real(self, backend="eager", **options)  # type: ignore[assignment,method-assign]
    try:
        task = TinyTraining(rank, world, config)
        task.step(0)
        return waits_of_forward(task, Trace())
    finally:
        torch.nn.Module.compile = real  # type: ignore[method-assign]
        torch.compiler.reset()


@pytest.mark.slow
def test_compiled_layers_wait_for_their_weights(pool: Pools, tiny_store: Path) -> None:
    """The hooks come after the first trace, in which the order of gradients is measured."""
    changes: dict[str, Any] = {"communication": {"bucket_mb": 0.001}, "train": {"compile": True}}
    for events in pool(2).call(waits_of_compiled, make_config(tiny_store, 2, True, **changes)):
        assert buckets_of(events) == [3, 2, 1, 0]


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
            assert layout.bucket_of[piece.index] == piece.bucket
            count[piece.index][piece.begin : piece.end] += 1
    assert all((each == 1).all() for each in count)
    assert all((bucket.end - bucket.start) % world == 0 for bucket in layout.buckets)
