"""A rank that was started with other code or another config: one clear line on all ranks, before any gradient moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from tiny_task import config_over
from training_run import Workspace

from bert_fast.cli import config_from_tree
from bert_fast.errors import UserError
from bert_fast.train.agreement import check_parameters
from bert_fast.train.build import build
from bert_fast.train.environment import Environment

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]


def environment_of(rank: int, world: int) -> Environment:
    return Environment(rank, rank, world, torch.device("cpu"), torch.float32)


def compare_parameters(rank: int, world: int, of_ranks: list[list[tuple[str, list[int]]]]) -> str | None:
    try:
        check_parameters(of_ranks[rank], environment_of(rank, world))
    except UserError as error:
        return str(error)
    return None


A, B = ("layers.0.weight", [4, 2]), ("layers.0.bias", [4])


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ([B, A], "parameter 0 is layers.0.bias [4] there and layers.0.weight [4, 2] on rank 0"),
        ([A], "parameter 1 is missing there and layers.0.bias [4] on rank 0"),
        ([A, ("layers.0.bias", [8])], "parameter 1 is layers.0.bias [8] there and layers.0.bias [4] on rank 0"),
    ],
)
def test_other_parameters_are_named(pool: Pools, last: list[tuple[str, list[int]]], message: str) -> None:
    found = pool(4).call(compare_parameters, [[A, B], [A, B], last, last])
    assert len(set(found)) == 1
    assert found[0] is not None
    assert found[0].startswith("rank 2 has other parameters than rank 0: ")
    assert message in found[0]
    assert pool(2).call(compare_parameters, [[A, B], [A, B]]) == [None, None]


def build_with(rank: int, world: int, trees: list[dict[str, Any]]) -> str | None:
    try:
        build(config_from_tree(trees[rank]), environment_of(rank, world))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("section", "name", "value", "text"),
    [
        ("communication", "clip", "none", 'communication.clip is "none" there and "bucket_before_reduce" on rank 0'),
        ("communication", "bucket_mb", 5.0, "communication.bucket_mb is 5.0 there and 0.02 on rank 0"),
        ("model", "num_layers", 3, "layers.2.qkv.weight [96, 32] there and heads.decoder_bias [200] on rank 0"),
        ("optimizer", "when", "bucket", 'optimizer.when is "bucket" there and "end" on rank 0'),
    ],
)
def test_another_config_on_one_rank_is_named(
    pool: Pools, tiny_store: Path, section: str, name: str, value: object, text: str
) -> None:
    trees = [config_over(tiny_store), config_over(tiny_store)]
    trees[1][section][name] = value
    found = pool(2).call(build_with, trees)
    assert found[0] == found[1]
    assert found[0] is not None
    assert text in found[0]
    assert found[0].startswith("rank 1 has ")


def test_a_list_of_buckets_that_does_not_cover_the_model_is_said(workspace: Workspace) -> None:
    settings = ("train.max_steps=1", "train.eval_every_samples=100000")
    code, run = workspace.run("run.folder=short", "communication.bucket_mb=[0.02,0.01]", *settings)
    assert code == 0, run.stderr
    assert "communication.bucket_mb lists 2 sizes and the model fills 3 buckets: the last size repeats" in run.stdout
    code, run = workspace.run("run.folder=long", "communication.bucket_mb=[0.02,100,5,5]", *settings)
    assert code == 0, run.stderr
    assert "communication.bucket_mb lists 4 sizes and the model fills 2 buckets: the others are not used" in run.stdout
