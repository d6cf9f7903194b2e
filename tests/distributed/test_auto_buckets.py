"""communication.bucket_mb=auto: what is measured, that all ranks plan the same, and that the plan can be taken as config."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.rank_pool import RankPool
from support.training_run import Workspace
from test_shadow import make_config, train

from bert_fast.config import Config
from bert_fast.train.environment import Environment
from bert_fast.train.setup.bucket_sizes import measure_ready_times
from bert_fast.train.setup.build import build

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]


def planned(rank: int, world: int, config: Config) -> dict[str, Any]:
    """What this rank measured and how it laid out its buckets; ranks differ in speed."""
    components = build(config, Environment(rank, rank, world, torch.device("cpu"), torch.float32))
    record = components.buckets
    assert record is not None
    layout = components.layout
    return {
        "buckets": [bucket.parameters for bucket in layout.buckets], "mib": record.bucket_mb(), "record": record.as_json(),
        "bytes": [sum(layout.numel[i] for i in bucket.parameters) * 4 for bucket in layout.buckets],
        "groups": [group.name for group in layout.groups], "summary": record.summary(),
    }  # fmt: skip


@pytest.mark.parametrize("clip", ["none", "bucket_before_reduce"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_lays_out_the_same_plan(pool: Pools, tiny_store: Path, world: int, clip: str) -> None:
    config = make_config(tiny_store, world, "end", communication={"bucket_mb": "auto", "clip": clip})
    results = [planned(0, 1, config)] if world == 1 else pool(world).call(planned, config)
    for result in results:
        assert result["buckets"] == results[0]["buckets"]
        assert result["record"] == results[0]["record"]
    first = results[0]
    assert [mib * 2**20 for mib in first["mib"]] == first["bytes"]
    units = first["record"]["units"]
    assert sum(unit["bytes"] for unit in units) == sum(first["bytes"])
    assert len(first["buckets"]) == len(first["record"]["ends"])
    if clip == "bucket_before_reduce":
        assert [unit["name"] for unit in units] == first["groups"]
    ready = [unit["ready_s"] for unit in units]
    assert ready == sorted(ready)
    assert first["record"]["predicted_exposed_s"] >= first["record"]["lower_bound_s"] - 1e-12
    assert "predicted exposed communication" in first["summary"]


def test_limits_of_planned_buckets(pool: Pools, tiny_store: Path) -> None:
    limits = {"bucket_mb": "auto", "clip": "none", "max_bucket_mb": 0.01}
    (result, _) = pool(2).call(planned, make_config(tiny_store, 2, "end", communication=limits))
    assert len(result["buckets"]) > 4
    for members, size in zip(result["buckets"], result["bytes"], strict=True):
        assert len(members) == 1 or size <= 0.01 * 2**20


def test_auto_trains_the_same(pool: Pools, tiny_store: Path) -> None:
    weights = [
        pool(2).call(train, make_config(tiny_store, 2, "end", communication={"bucket_mb": bucket_mb}))[0]["weights"]
        for bucket_mb in ("auto", 25.0)
    ]
    np.testing.assert_array_equal(*weights)


def test_ready_times_are_those_of_backward() -> None:
    """The tied parameter is ready last, one without a gradient counts as ready at the end."""
    torch.manual_seed(0)
    tied, middle, unused = (torch.nn.Parameter(torch.randn(200, 200)) for _ in range(3))
    parameters = [tied, middle, unused]

    def forward() -> torch.Tensor:
        hidden = torch.randn(300, 200) @ tied
        for _ in range(10):
            hidden = torch.tanh(hidden)
        return (torch.tanh(hidden @ middle) @ tied.T).square().sum()

    environment = Environment(0, 0, 1, torch.device("cpu"), torch.float32)
    times = measure_ready_times(parameters, forward, environment)
    assert 0 < times[1] < times[0] <= times[2]
    assert all(p.grad is None for p in parameters)


def test_a_run_writes_its_plan_and_the_next_takes_it(workspace: Workspace) -> None:
    code, run = workspace.run("run.folder=auto", "communication.bucket_mb=auto", "train.max_steps=4")
    assert code == 0, run.stderr
    assert "buckets: " in run.stdout
    fragment = yaml.safe_load((workspace.folder / "auto/buckets.yaml").read_text(encoding="utf-8"))
    record = json.loads((workspace.folder / "auto/buckets.json").read_text(encoding="utf-8"))
    assert len(fragment["communication"]["bucket_mb"]) == len(record["ends"])
    caps = ", ".join(map(repr, fragment["communication"]["bucket_mb"]))
    code, run = workspace.run("run.folder=taken", f"communication.bucket_mb=[{caps}]", "train.max_steps=4")
    assert code == 0, run.stderr
    total = sum(unit["bytes"] for unit in record["units"])
    assert math.isclose(sum(fragment["communication"]["bucket_mb"]), total / 2**20, rel_tol=1e-12)
