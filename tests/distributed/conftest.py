"""Shared by the multi-process tests: pools of ranks, the tiny store, workspaces for real runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.rank_pool import RankPool
from support.tiny_task import config_over, prepare_store
from support.training_run import Workspace


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """`pool(n)`: n gloo ranks, the same ones for the whole session."""
    pools: dict[int, RankPool] = {}
    scratch = tmp_path_factory.mktemp("pools")

    def get(world: int) -> RankPool:
        return pools.setdefault(world, RankPool(world, scratch))

    yield get
    for ranks in pools.values():
        ranks.close()


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stores train/ and eval/ of the tiny language. No test may change it."""
    return prepare_store(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Iterator[Workspace]:
    """A folder of the module's own to run the tiny config in. What still runs at the end is killed."""
    space = Workspace(tmp_path_factory.mktemp("runs"), config_over(tiny_store))
    yield space
    space.end()
