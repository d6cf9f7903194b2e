"""Every combination of the switches that save memory: the plain run's losses, or a reason why it cannot be had.

Without dropout, so that accumulation draws no other random numbers. What is rounded (moments in few bits) has a tolerance of
its own; everything else is the plain run to 1e-6.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import RankPool
from support.tiny_training import TinyTraining, make_config

from bert_fast.config import Config
from bert_fast.errors import UserError

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]
STEPS = 4
RECOMPUTE = ("none", "attention", "layer", "half_layer", "optimal")
SHARDING: dict[str, dict[str, Any]] = {
    "whole": {}, "released": {}, "shards": {"shard_optimizer": True}, "ZeRO-3": {"engine": "fsdp", "bucket_mb": 25.0},
    "ZeRO-2": {"engine": "fsdp", "bucket_mb": 25.0, "reshard_after_forward": False}, "ddp": {"engine": "ddp"},
    "hybrid": {"engine": "fsdp", "bucket_mb": 25.0, "shard_within_node": True},
}  # fmt: skip
STATES = {"fp32": 1e-6, "bf16": 1e-3, "int8": 5e-3, "int4": 3e-2}
PRECISIONS = {"fp32": 1e-6, "bf16": 1e-6}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
Case = tuple[str, str, str, str, int, bool]


def config_of(store: Path, world: int, case: Case) -> Config:
    recompute, sharding, state, precision, accumulation, by_bucket = case
    micro = 16 // world // accumulation
    memory = {"recompute": recompute, "release_gradients": sharding == "released"}
    return make_config(
        store, world, model=NO_DROPOUT, memory=memory, train={"precision": precision},
        communication={"clip": "global_after_reduce" if not by_bucket else "none", **SHARDING[sharding]},
        optimizer={"state_dtype": state, "step_per_bucket": by_bucket},
        batch={"global_batch_size": 16, "micro_batch_size": micro, "gradient_accumulation_steps": accumulation},
        system={"ranks_per_node": 2 if sharding == "hybrid" else world},
    )  # fmt: skip


def losses(rank: int, world: int, config: Config) -> list[float]:
    task = TinyTraining(rank, world, config)
    return [task.step(number).mlm_sum.item() for number in range(STEPS)]


def plain_of(case: Case) -> Case:
    """What a case is compared with: the same arithmetic, with nothing saved."""
    return ("none", "whole", "fp32", case[3], 1, case[5])


def combinations(world: int) -> list[Case]:
    every = itertools.product(RECOMPUTE, SHARDING, STATES, PRECISIONS, (1, 2), (False, True))
    return [case for case in every if (case[1] == "hybrid") <= (world == 4)]


def allowed(store: Path, world: int, case: Case) -> Config | None:
    """The config of a case; None if it is refused, with a reason on one line."""
    try:
        return config_of(store, world, case)
    except UserError as error:
        reason = str(error)
    assert "\n" not in reason
    assert reason.startswith("config: ")
    return None


def check(pool: Pools, store: Path, world: int, cases: list[Case]) -> tuple[int, int]:
    """How many were run and equal, and how many refused."""
    plain: dict[Case, list[float]] = {}
    passed = refused = 0
    for case in cases:
        config = allowed(store, world, case)
        if config is None:
            refused += 1
            continue
        reference = plain_of(case)
        if reference not in plain:
            plain[reference] = _sums(pool(world).call(losses, config_of(store, world, reference)))
        found = _sums(pool(world).call(losses, config))
        tolerance = max(STATES[case[2]], PRECISIONS[case[3]])
        assert found == pytest.approx(plain[reference], rel=tolerance), case
        passed += 1
    return passed, refused


def _sums(by_rank: list[list[float]]) -> list[float]:
    return [sum(of_step) for of_step in zip(*by_rank, strict=True)]


def test_a_part_of_the_matrix_on_two_ranks(pool: Pools, tiny_store: Path) -> None:
    """Every thirty-first combination."""
    passed, refused = check(pool, tiny_store, 2, combinations(2)[::31])
    assert passed > 4
    assert refused > 4


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_whole_matrix(pool: Pools, tiny_store: Path, world: int) -> None:
    cases = combinations(world) if world == 2 else combinations(world)[::5]
    passed, refused = check(pool, tiny_store, world, cases)
    assert passed + refused == len(cases)
    assert passed > 100
