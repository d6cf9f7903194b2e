"""Shared by the multi-process tests: pools of ranks, a tiny store, workspaces for real runs."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool
from training_run import ROOT, Workspace

WORDS = {
    "colour": "red blue green black white grey brown".split(),
    "animal": "cat dog cow hen fox owl ant bee rat pig".split(),
    "verb": "sees hears likes finds meets wants".split(),
    "place": "house field river forest garden".split(),
}

TINY = {
    "run": {"name": "tiny", "tensorboard": False, "matmul_ceiling": False},
    "model": {
        "vocab_size": 200, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64,
        "max_positions": 32, "initializer_range": 0.06,
    },
    "data": {"max_seq_len": 32},
    "batch": {"global_batch": 16, "local_batch": 8},
    "communication": {"bucket_mb": 0.02, "timeout_s": 60},
    "optimizer": {"name": "adamw", "lr": 0.01, "beta2": 0.98},
    "schedule": {"warmup_steps": 5, "total_steps": 1000},
    "train": {"precision": "fp32", "max_steps": 20, "eval_every_samples": 160, "log_every_steps": 1, "warmup_batches": 1},
    "system": {"world_size": 2, "device": "cpu", "threads_per_rank": 1},
}  # fmt: skip


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], RankPool]]:
    """`pool(n)`: n gloo ranks, the same ones for the whole session."""
    pools: dict[int, RankPool] = {}

    def get(world: int) -> RankPool:
        return pools.setdefault(world, RankPool(world))

    yield get
    for ranks in pools.values():
        ranks.close()


def write_text(path: Path, num_documents: int = 60) -> None:
    """Documents of a tiny language in MLCommons' form: one sentence a line, a blank line between documents."""
    rng = random.Random(0)

    def sentence() -> str:
        word = {kind: [rng.choice(words), rng.choice(words)] for kind, words in WORDS.items()}
        first, second = (f"{word['colour'][i]} {word['animal'][i]}" for i in (0, 1))
        return f"the {first} {word['verb'][0]} a {second} in the {word['place'][0]} ."

    documents = ("\n".join(sentence() for _ in range(rng.randint(4, 12))) for _ in range(num_documents))
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")


def prepare_data(*arguments: str) -> subprocess.CompletedProcess[str]:
    """scripts/prepare_data.py as a person starts it."""
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--workers", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stores train/ and eval/ of the tiny language. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "text").mkdir()
    write_text(folder / "text" / "tiny.txt")
    done = prepare_data(
        "--corpus", "mlcommons", "--input", str(folder / "text"), "--out", str(folder / "store"), "--vocab-size", "200",
        "--max-seq-len", "32", "--max-predictions", "5", "--dupe-factor", "3", "--eval-fraction", "0.2", "--seed", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "store"


def tiny_config(store: Path) -> dict[str, Any]:
    """The tiny config over a store."""
    config: dict[str, Any] = copy.deepcopy(TINY)
    config["data"] |= {"train": str(store / "train"), "eval": str(store / "eval")}
    return config


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_store: Path) -> Iterator[Workspace]:
    """A folder of the module's own to run the tiny config in. What is still running at the end is killed."""
    space = Workspace(tmp_path_factory.mktemp("runs"), tiny_config(tiny_store))
    yield space
    space.end()
