"""communication.bucket_mb=auto: what is measured, that all ranks plan the same, and that the plan can be taken as config."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support.one_run import execute
from support.rank_pool import RankPool
from support.steps import cpu_rank
from support.tiny_training import make_config as tiny_config
from support.tiny_training import train
from support.training_run import Workspace

from bert_fast.config import Config
from bert_fast.run_folder import BUCKETS_RECORD, run_folder
from bert_fast.train.setup.bucket_sizes import measure_ready_times
from bert_fast.train.setup.build import build

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]


def planned(rank: int, world: int, config: Config, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """How this rank laid out its buckets, and what it measured for it; ranks differ in speed. `before`: a run's record."""
    components = build(config, cpu_rank(rank, world), before)
    layout, record = components.engine.layout, components.bucket_record
    found: dict[str, Any] = {
        "buckets": [bucket.parameters for bucket in layout.buckets],
        "bytes": [sum(layout.numel[i] for i in bucket.parameters) * 4 for bucket in layout.buckets],
        "groups": [group.name for group in layout.groups],
        "record": None,
    }
    if record is not None:
        found |= {"record": record.as_json(), "mib": record.bucket_mb(), "summary": record.summary()}
    return found


@pytest.mark.parametrize("clip", ["none", "bucket_before_reduce"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_lays_out_the_same_plan(pool: Pools, tiny_store: Path, world: int, clip: str) -> None:
    config = tiny_config(tiny_store, world, communication={"bucket_mb": "auto", "clip": clip})
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
    (result, _) = pool(2).call(planned, tiny_config(tiny_store, 2, communication=limits))
    assert len(result["buckets"]) > 4
    for members, size in zip(result["buckets"], result["bytes"], strict=True):
        assert len(members) == 1 or size <= 0.01 * 2**20


def test_auto_trains_the_same(pool: Pools, tiny_store: Path) -> None:
    weights = [
        pool(2).call(train, tiny_config(tiny_store, 2, communication={"bucket_mb": bucket_mb}))[0]["weights"]
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

    times = measure_ready_times(parameters, forward, cpu_rank())
    assert 0 < times[1] < times[0] <= times[2]
    assert all(p.grad is None for p in parameters)


def test_the_list_for_people_gives_the_planned_buckets(pool: Pools, tiny_store: Path) -> None:
    auto = pool(2).call(planned, tiny_config(tiny_store, 2, communication={"bucket_mb": "auto", "max_bucket_mb": 0.03}))
    listed = pool(2).call(planned, tiny_config(tiny_store, 2, communication={"bucket_mb": auto[0]["mib"]}))
    assert len(auto[0]["buckets"]) > 1
    assert [one["buckets"] for one in listed] == [auto[0]["buckets"]] * 2
    assert listed[0]["record"] is None, "nothing is measured"


def test_a_resumed_run_keeps_its_buckets(pool: Pools, tiny_store: Path) -> None:
    """Whatever it would plan now: sums over other buckets may be rounded differently."""
    config = tiny_config(tiny_store, 2, communication={"bucket_mb": "auto"})
    record = pool(2).call(planned, config)[0]["record"]
    units = [unit["name"] for unit in record["units"]]
    for ends in ([1, len(units)], [len(units) - 1, len(units)], list(range(1, len(units) + 1))):
        for found in pool(2).call(planned, config, {**record, "ends": ends}):
            assert found["record"] is None, "nothing is measured"
            assert len(found["buckets"]) == len(ends)
            firsts = [found["groups"].index(units[begin]) for begin in (0, *ends[:-1])]
            assert firsts == [0, *ends[:-1]]
            sizes = [unit["bytes"] for unit in record["units"]]
            edges = zip((0, *ends[:-1]), ends, strict=True)
            assert found["bytes"] == [sum(sizes[begin:end]) for begin, end in edges]


def test_a_record_of_other_units_is_not_taken(pool: Pools, tiny_store: Path) -> None:
    config = tiny_config(tiny_store, 2, communication={"bucket_mb": "auto"})
    record = pool(2).call(planned, config)[0]["record"]
    other = copy.deepcopy(record)
    other["units"][0]["name"] = "layers.7"
    for found in pool(2).call(planned, config, other):
        assert found["record"] is not None, "it is planned anew"
        assert [unit["name"] for unit in found["record"]["units"]] == [unit["name"] for unit in record["units"]]


def test_resuming_takes_the_record_of_the_runs_folder(make_config: Callable[..., Config]) -> None:
    settings = ("communication.bucket_mb=auto", "checkpoint.every_steps=1")
    _, first = execute(make_config(*settings, "train.max_steps=2"))
    config = make_config(*settings, "train.max_steps=4")
    path = run_folder(config) / BUCKETS_RECORD
    record = json.loads(path.read_text(encoding="utf-8"))
    assert len(first.prepared.components.engine.layout.buckets) == len(record["ends"])
    record["ends"] = list(range(1, len(record["units"]) + 1))  # one unit each, which a fast link would never be given
    path.write_text(json.dumps(record), encoding="utf-8")
    _, second = execute(config, resume=True)
    assert [bucket.name for bucket in second.prepared.components.engine.layout.buckets] == [
        f"bucket {number}" for number in range(len(record["units"]))
    ]
    assert json.loads(path.read_text(encoding="utf-8")) == record


def test_a_run_writes_its_plan_and_a_config_takes_it(workspace: Workspace) -> None:
    code, run = workspace.run("run.folder=auto", "communication.bucket_mb=auto", "train.max_steps=4")
    assert code == 0, run.stderr
    assert "buckets: " in run.stdout
    fragment = yaml.safe_load((workspace.folder / "auto/buckets.yaml").read_text(encoding="utf-8"))
    record = json.loads((workspace.folder / "auto/buckets.json").read_text(encoding="utf-8"))
    assert len(fragment["communication"]["bucket_mb"]) == len(record["ends"])
    caps = ", ".join(map(repr, fragment["communication"]["bucket_mb"]))
    code, run = workspace.run("run.folder=taken", f"communication.bucket_mb=[{caps}]", "train.max_steps=4")
    assert code == 0, run.stderr
    assert "communication.bucket_mb lists" not in run.stdout, "the model fills as many buckets"
    total = sum(unit["bytes"] for unit in record["units"])
    assert math.isclose(sum(fragment["communication"]["bucket_mb"]), total / 2**20, rel_tol=1e-12)
