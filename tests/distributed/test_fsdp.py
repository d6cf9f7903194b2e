"""Engine `fsdp`: the weights of the bucketed engine, in parts, with checkpoints that any engine takes up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rank_pool import RankPool
from support.tiny_training import TinyTraining, make_config
from torch.distributed.tensor import DTensor

from bert_fast.balance.cost import CostModel
from bert_fast.config import Config
from bert_fast.data.store import Store
from bert_fast.errors import UserError
from bert_fast.run_folder import checkpoint_name
from bert_fast.train.evaluate import Evaluator
from bert_fast.train.setup.recomputation import longest_batch

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
STEPS = 4


def config_of(store: Path, world: int, engine: str, clip: str = "global_after_reduce", **changes: Any) -> Config:
    communication = {"engine": engine, "clip": clip, **changes.pop("communication", {})}
    if engine == "fsdp":
        communication.setdefault("bucket_mb", 25.0)  # it has none
    return make_config(store, world, communication=communication, **changes)


def trained(
    rank: int, world: int, config: Config, save: Path | None = None, load: Path | None = None, steps: int = STEPS
) -> Any:
    """All weights, and what each step says, from the first step or from a checkpoint after the second."""
    task, first = TinyTraining(rank, world, config), 0
    if load is not None:
        task.load(load)
        first = 2
    results = [task.step(number) for number in range(first, steps)]
    if save is not None:
        save.mkdir(exist_ok=True)
        task.save(save, steps)
    parameters = list(task.components.model.parameters())
    in_parts = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    whole = task.components.whole_model()
    weights = torch.cat([p.detach().ravel() for p in whole.parameters()]).numpy()
    norms = np.array([[r.mlm_sum.item(), r.grad_norm.item()] for r in results[-2:]])
    return weights, norms, in_parts


def compare(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    for (weights, norms, _), (others, other_norms, _) in zip(one, other, strict=True):
        assert np.abs(weights - others).max() <= tolerance * np.abs(weights).max()
        assert np.allclose(norms, other_norms, rtol=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "ZeRO-3": {},
    "ZeRO-2": {"communication": {"reshard_after_forward": False}},
    "not clipped": {"clip": "none"},
    "accumulated": {"batch": {"global_batch_size": 16, "micro_batch_size": 4, "gradient_accumulation_steps": 2}},
    "layers again": {"memory": {"recompute": "layer"}},
    "halves again": {"memory": {"recompute": "half_layer"}},
    "attention again": {"memory": {"recompute": "attention"}},
    "least peak": {"memory": {"recompute": "optimal"}},
    "predicted": {"model": {"last_layer": "predicted"}},
    "LAMB": {"optimizer": {"name": "lamb", "lr": 0.01}},
    "averaged": {"averaging": {"method": "exponential"}},
}


@pytest.mark.parametrize("case", list(CASES))
def test_same_weights_as_the_bucketed_engine(pool: Pools, tiny_store: Path, case: str) -> None:
    changes = CASES[case]
    plain = {name: value for name, value in changes.items() if name not in ("communication", "memory")}
    whole = pool(2).call(trained, config_of(tiny_store, 2, "bucketed", **plain))
    parts = pool(2).call(trained, config_of(tiny_store, 2, "fsdp", **changes))
    compare(whole, parts)
    assert all(0.4 * whole[0][2] < part[2] < 0.6 * whole[0][2] for part in parts)


@pytest.mark.parametrize("within_node", [False, True])
def test_four_ranks_on_two_nodes(pool: Pools, tiny_store: Path, within_node: bool) -> None:
    """Some tensors have fewer rows than ranks: those ranks have no part of them."""
    nodes = {"system": {"ranks_per_node": 2}}
    whole = pool(4).call(trained, config_of(tiny_store, 4, "bucketed", **nodes))
    communication = {"shard_within_node": within_node}
    parts = pool(4).call(trained, config_of(tiny_store, 4, "fsdp", communication=communication, **nodes))
    compare(whole, parts)
    share = 0.5 if within_node else 0.25
    assert all((share - 0.05) * whole[0][2] < part[2] < (share + 0.05) * whole[0][2] for part in parts)


@pytest.mark.parametrize("within_node", [False, True])
def test_a_checkpoint_goes_from_engine_to_engine(
    pool: Pools, tiny_store: Path, tmp_path: Path, within_node: bool
) -> None:
    """With an average of the weights."""
    others = {"system": {"ranks_per_node": 2}, "averaging": {"method": "exponential"}}
    in_parts = config_of(tiny_store, 4, "fsdp", communication={"shard_within_node": within_node}, **others)
    whole = config_of(tiny_store, 4, "bucketed", **others)
    straight = pool(4).call(trained, in_parts)
    pool(4).call(trained, in_parts, tmp_path / "parts", None, 2)
    pool(4).call(trained, whole, tmp_path / "whole", None, 2)
    for config, folder in ((in_parts, "parts"), (whole, "parts"), (in_parts, "whole")):
        compare(straight, pool(4).call(trained, config, None, tmp_path / folder / checkpoint_name(2)))


def refused(rank: int, world: int, config: Config, path: Path) -> str:
    task = TinyTraining(rank, world, config)
    try:
        task.load(path)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("engine", "sharded", "world", "said"),
    [
        ("fsdp", False, 4, "over 4 rank(s) with communication.engine=fsdp; resume it as it was run"),
        ("bucketed", False, 2, "over 2 rank(s) with communication.shard_optimizer=false; resume it as it was run"),
        ("bucketed", True, 4, "over 4 rank(s) with communication.shard_optimizer=true; resume it as it was run"),
        ("bucketed", True, 2, "for other parts of the model, which are of other buckets or another engine"),
    ],
)
def test_a_state_of_blocks_stays_with_its_parts(
    pool: Pools, tiny_store: Path, tmp_path: Path, engine: str, sharded: bool, world: int, said: str
) -> None:
    """Moments in 8 bits have scales for blocks of a part; what is refused names the setting that the run really has."""
    blocks = {"state_dtype": "int8"}
    pool(2).call(trained, config_of(tiny_store, 2, "fsdp", optimizer=blocks), tmp_path, None, 2)
    other = config_of(tiny_store, world, engine, optimizer=blocks, communication={"shard_optimizer": sharded})
    for text in pool(world).call(refused, other, tmp_path / checkpoint_name(2)):
        assert said in text


def evaluated(rank: int, world: int, config: Config) -> Any:
    """The average of the weights, which is evaluated; and the trained ones, before and after."""
    task = TinyTraining(rank, world, config)
    for number in range(STEPS):
        task.step(number)

    def weights() -> np.ndarray:
        model = task.components.whole_model()
        return torch.cat([p.detach().ravel() for p in model.parameters()]).numpy().copy()

    before = weights()
    model, batch = task.components.model.eval(), longest_batch(config)
    with task.components.evaluated_weights(), torch.no_grad():
        inside = weights()
        model(batch)  # which gathers the evaluated weights
    model.train()
    after = weights()
    return before, inside, after, task.step(STEPS).mlm_sum.item()


@pytest.mark.parametrize("within_node", [False, True])
def test_the_evaluated_weights_are_the_average(pool: Pools, tiny_store: Path, within_node: bool) -> None:
    others = {"system": {"ranks_per_node": 2}, "averaging": {"method": "exponential"}}
    whole = pool(4).call(evaluated, config_of(tiny_store, 4, "bucketed", **others))
    communication = {"shard_within_node": within_node}
    parts = pool(4).call(evaluated, config_of(tiny_store, 4, "fsdp", communication=communication, **others))
    for (_, expected, _, loss), (before, inside, after, same) in zip(whole, parts, strict=True):
        assert same == pytest.approx(loss, rel=1e-6)
        assert np.abs(inside - expected).max() <= 1e-5 * np.abs(expected).max()
        assert np.array_equal(before, after)
        assert np.abs(inside - before).max() > 1e-4


def evaluation(rank: int, world: int, config: Config) -> Any:
    """What an evaluation finds, and how many batches and forward passes of this rank it took."""
    task, passes = TinyTraining(rank, world, config), 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    evaluator = Evaluator(
        Store(config.evaluation.data), config.evaluation, 1, CostModel(1.0, 0.0), task.environment
    )  # fmt: skip
    if not task.components.engine.holds_all_weights:
        evaluator.meet_in_every_batch()
    task.components.model.embeddings.register_forward_hook(count)
    found = evaluator(task.components.model)
    return astuple(found)[:4], len(evaluator.batches), passes


@pytest.mark.parametrize(("samples", "batches"), [(3, [1, 1, 1, 0]), (9, [3, 2, 2, 2]), (13, [4, 3, 3, 3])])
def test_ranks_with_other_numbers_of_batches_evaluate_together(
    pool: Pools, tiny_store: Path, samples: int, batches: list[int]
) -> None:
    """One has none. They find what one rank finds, and each whose weights are whole runs its own batches alone."""
    part = {"evaluation": {"num_samples": samples, "batch_size": 1}}
    expected, _, _ = evaluation(0, 1, config_of(tiny_store, 1, "bucketed", **part))
    for engine in ("bucketed", "fsdp"):
        by_rank = pool(4).call(evaluation, config_of(tiny_store, 4, engine, **part))
        assert [each[1] for each in by_rank] == batches
        assert [each[2] for each in by_rank] == (batches if engine == "bucketed" else [max(batches)] * 4)
        for found, _, _ in by_rank:
            assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip": "bucket_before_reduce"}, "communication.clip=bucket_before_reduce with communication.engine=fsdp"),
        ({"communication": {"reduce_dtype": "fp16"}}, "communication.reduce_dtype=fp16"),
        ({"communication": {"reduce_dtype": "int8_ef"}}, "communication.reduce_dtype=int8_ef"),
        ({"communication": {"shard_optimizer": True}}, "communication.shard_optimizer=true"),
        ({"communication": {"bucket_mb": 3.0}}, "communication.bucket_mb=3.0 has no effect"),
        ({"optimizer": {"name": "muon"}}, "optimizer.name=muon"),
        ({"optimizer": {"step_per_bucket": True}}, "optimizer.step_per_bucket=true"),
        ({"train": {"compile": True}}, "train.compile=true"),
        ({"batch": {"global_batch_size": 16, "micro_batch_size": 4, "virtual_ranks": 2}}, "batch.virtual_ranks=2"),
    ],
)
def test_what_its_hooks_do_not_allow_is_refused(tiny_store: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tiny_store, 2, "fsdp", **changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
