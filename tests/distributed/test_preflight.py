"""The pre-flight: what it measures, whom it names, what it refuses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.rank_pool import RankPool
from support.tiny_task import config_over
from support.training_run import Workspace

from bert_fast.config.load import config_from_tree
from bert_fast.errors import UserError
from bert_fast.report.preflight import node_table
from bert_fast.train.environment import Environment
from bert_fast.train.setup.preflight import check_facts, describe_slow_ranks, preflight

pytestmark = pytest.mark.distributed


def fly(rank: int, world: int, tree: dict[str, Any], other_data: str) -> dict[str, Any]:
    if rank == 1 and other_data:
        tree["data"]["train"] = other_data
    environment = Environment(rank, rank, world, torch.device("cpu"), torch.float32)
    return preflight(config_from_tree(tree), environment)


def test_every_rank_has_the_whole_report(pool: Callable[[int], RankPool], tiny_store: Path) -> None:
    reports = pool(2).call(fly, config_over(tiny_store), "")
    first = reports[0]
    (node,) = first["nodes"]
    assert node["ranks"] == [0, 1]
    assert min(node["tflops"]) > 0
    assert min(node["link_mb_s"]) > 0
    assert max(map(abs, node["clock_ms"])) < 500
    assert first["network"]["latency_us"] > 0
    assert reports[1]["network"] == first["network"]
    json.dumps(first)


@pytest.mark.parametrize("kind", ["missing", "another"])
def test_data_that_a_rank_does_not_see_is_refused_by_all(
    pool: Callable[[int], RankPool], tiny_store: Path, tmp_path: Path, kind: str
) -> None:
    other = str(tmp_path / "nothing") if kind == "missing" else str(tiny_store / "eval")
    word = "cannot read data.train" if kind == "missing" else "has another data.train than rank 0"
    with pytest.raises(RuntimeError, match=f"UserError: pre-flight: rank 1 \\(.*{word}"):
        pool(2).call(fly, config_over(tiny_store), other)


FACT = {
    "host": "a", "device": "H100", "device_id": "GPU-1", "cpus": [0, 1], "memory_gib": 64.0, "versions": "torch 2",
    "data": {"data.train": "x", "evaluation.data": "y"},
}  # fmt: skip


def facts(**changes: Any) -> list[dict[str, Any]]:
    """Four ranks on two hosts, the last one changed."""
    found = []
    for rank in range(4):
        found.append({**copy.deepcopy(FACT), "host": "ab"[rank // 2], "device_id": f"GPU-{rank}"})
    found[3] |= changes
    return found


def test_two_ranks_on_one_gpu_are_refused() -> None:
    check_facts(facts())
    with pytest.raises(UserError, match="host b: ranks 2, 3 are all on GPU GPU-2"):
        check_facts(facts(device_id="GPU-2"))


def test_another_version_is_refused() -> None:
    with pytest.raises(UserError, match=r"rank 3 \(b\) runs torch 1 and rank 0 \(a\) torch 2"):
        check_facts(facts(versions="torch 1"))


def test_what_is_slow_is_named() -> None:
    rates, links, offsets = (
        np.array([1.0, 1.0, 1.0, 0.8]),
        np.array([5.0, 5.0, 2.0, 5.0]),
        np.array([0, 0, 0.1, 3600.0]),
    )
    assert describe_slow_ranks(facts(), rates, links, offsets) == [
        "rank 3 (b): matmul at 80 % of the median rank",
        "rank 2 (b): network at 40 % of the median rank",
        "rank 3 (b): clock +3600.0 s from rank 0's; synchronise it",
    ]
    assert describe_slow_ranks(facts(), np.ones(4), np.ones(4), np.zeros(4)) == []


def test_the_table_names_every_node(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {**FACT, "host": f"node-{i}", "ranks": [2 * i, 2 * i + 1], "tflops": [1.0, 1.1], "link_mb_s": [10.0, 12.0],
         "clock_ms": [0.0, 0.2]}
        for i in range(100)
    ]  # fmt: skip
    slow = ["rank 198 (node-99): matmul at 80 % of the median rank"]
    node_table({"world_size": 200, "nodes": rows, "network": {"latency_us": 12.0}, "slow": slow, "seconds": 1.0})
    shown = capsys.readouterr().out
    assert "node-99" in shown
    assert "slow: rank 198 (node-99)" in shown
    assert "36 more nodes are in preflight.json" in shown


def test_a_run_keeps_its_report_and_a_flag_runs_it_alone(workspace: Workspace) -> None:
    code, run = workspace.run("run.folder=flown", "system.preflight=true", "train.max_steps=2")
    assert code == 0, run.stderr
    assert "pre-flight: 2 ranks on 1 nodes" in run.stdout
    assert json.loads((workspace.folder / "flown" / "preflight.json").read_text(encoding="utf-8"))["world_size"] == 2
    code, run = workspace.run("run.folder=alone", "--preflight")
    assert code == 0, run.stderr
    assert "all-reduce:" in run.stdout
    assert not (workspace.folder / "alone").exists()
