"""A rank that was started with other code or another config: one clear line on all ranks, before any gradient moves."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.rank_pool import RankPool
from support.steps import cpu_rank
from support.tiny_task import config_over

from bert_fast.balance.planner import Planner
from bert_fast.config import sections
from bert_fast.config.load import config_from_tree
from bert_fast.data.store import Store, merge_parts, write_part
from bert_fast.errors import UserError
from bert_fast.run_folder import CHECKPOINTS, checkpoints_in
from bert_fast.train import run as run_phases
from bert_fast.train.checkpoint.resume import MAY_CHANGE
from bert_fast.train.checkpoint.train_state import TrainState
from bert_fast.train.context import open_context
from bert_fast.train.setup.consistency import MAY_DIFFER, check_config, check_parameters
from bert_fast.train.setup.cost_model import make_planner

pytestmark = pytest.mark.distributed

Pools = Callable[[int], RankPool]


def compare_parameters(rank: int, world: int, of_ranks: list[list[tuple[str, list[int]]]]) -> str | None:
    try:
        check_parameters(of_ranks[rank], cpu_rank(rank, world))
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


# ---- settings and stores --------------------------------------------------------------------------------------------


def start(rank: int, world: int, trees: list[dict[str, Any]], strays_at: int | None = None) -> dict[str, Any]:
    """A run of this rank: how it ended, and after how many steps. From step `strays_at`, rank 1 draws other samples."""
    states: list[TrainState] = []

    def remembered(*arguments: Any) -> TrainState:
        states.append(TrainState(*arguments))
        return states[0]

    def straying(*arguments: Any) -> Planner:
        planner = make_planner(*arguments)
        drawn = planner.draw
        if strays_at is not None and rank == 1:
            planner.draw = lambda step: drawn(step + (step >= strays_at))  # type: ignore[method-assign]
        return planner

    text, config = None, config_from_tree(trees[rank])
    context = open_context(config, cpu_rank(rank, world), resume=False, on_lost=print)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_phases, "TrainState", remembered)
        patch.setattr(run_phases, "make_planner", straying)
        try:
            run_phases.run(context, time.time())
        except UserError as error:
            text = str(error)
        finally:
            context.close()
            dist.barrier()
    steps = states[0].progress.step if states else 0
    return {"error": text, "steps": steps, "saved": len(checkpoints_in(context.folder / CHECKPOINTS))}


def trees_of(store: Path, folder: Path) -> list[dict[str, Any]]:
    """The same config for two ranks, for a run of four steps."""
    tree = config_over(store)
    tree["evaluation"] |= {"every_samples": 32}
    tree["train"] |= {"max_steps": 4, "log_every_steps": 2, "warmup_batches": 0}
    tree["run"] |= {"folder": str(folder)}
    folder.mkdir()
    return [copy.deepcopy(tree) for _ in range(2)]


def change_store(source: Path, folder: Path, order: slice | None = None, **manifest: Any) -> str:
    """A copy of a store with some of its samples, or another order of them, or with fields of its manifest changed."""
    store = Store(source)
    samples = [store[index] for index in range(len(store))][order or slice(None)]
    kept = {name: store.manifest[name] for name in ("vocab_sha256", "vocab_size", "mask_id", "params")}
    folder.mkdir()
    merge_parts(folder, [write_part(folder / "part", samples)], {**kept, **manifest})
    return str(folder)


STORES: dict[str, tuple[str, dict[str, Any], str]] = {
    "fewer training samples": ("train", {"order": slice(0, -10)}, "num_samples of data.train"),
    "another order of the training samples": ("train", {"order": slice(None, None, -1)}, "sha256 of data.train"),
    "a training store of another text": ("train", {"text_sha256": "0" * 64}, "text_sha256 of data.train"),
    "fewer evaluation samples": ("eval", {"order": slice(3, None)}, "num_samples of evaluation.data"),
    "another order of the evaluation samples": ("eval", {"order": slice(None, None, -1)}, "sha256 of evaluation.data"),
}
SETTINGS: list[tuple[str, object, str]] = [
    ("balance.strategy", "random", 'balance.strategy is "random" there and "balanced" on rank 0'),
    (
        "balance.cost",
        {"linear": 7.0, "quadratic": 0.1},
        'balance.cost is {"linear": 7.0, "quadratic": 0.1} there and {"linear": 5.0',
    ),
    ("data.dynamic_masking", True, "data.dynamic_masking is true there and false on rank 0"),
    ("evaluation.num_samples", 5, "evaluation.num_samples is 5 there and null on rank 0"),
    ("mlperf.enabled", False, "mlperf.enabled is false there and true on rank 0"),
    ("train.seed", 1, "train.seed is 1 there and 0 on rank 0"),
    ("train.log_every_steps", 1, "train.log_every_steps is 1 there and 2 on rank 0"),
    ("checkpoint.every_steps", 3, "checkpoint.every_steps is 3 there and 0 on rank 0"),
    ("run.measure_peak_flops", True, "run.measure_peak_flops is true there and false on rank 0"),
    ("evaluation.batch_size", 5, "evaluation.batch_size is 5 there and 64 on rank 0"),
    ("communication.clip", "none", 'communication.clip is "none" there and "bucket_before_reduce" on rank 0'),
    ("communication.bucket_mb", 5.0, "communication.bucket_mb is 5.0 there and 0.02 on rank 0"),
    ("model.num_layers", 3, "model.num_layers is 3 there and 2 on rank 0"),
    ("communication.max_norm", 2.0, "communication.max_norm is 2.0 there and 1.0 on rank 0"),
    ("optimizer.name", "lamb", 'optimizer.name is "lamb" there and "adamw" on rank 0'),
    ("optimizer.step_per_bucket", True, "optimizer.step_per_bucket is true there and false on rank 0"),
]


def refused(ends: list[dict[str, Any]], text: str) -> None:
    """All ranks said the same before the first step."""
    assert ends[0]["error"] == ends[1]["error"]
    assert ends[0]["error"] is not None
    assert ends[0]["error"].startswith("rank 1 has ")
    assert text in ends[0]["error"]
    assert [end["steps"] for end in ends] == [0, 0]


@pytest.mark.parametrize("case", STORES)
def test_another_store_on_one_rank_is_named(pool: Pools, tiny_store: Path, tmp_path: Path, case: str) -> None:
    split, change, text = STORES[case]
    section, field = ("data", "train") if split == "train" else ("evaluation", "data")
    trees = trees_of(tiny_store, tmp_path / "run")
    section, field = ("data", "train") if split == "train" else ("evaluation", "data")
    trees[0][section][field] = change_store(tiny_store / split, tmp_path / "first")
    trees[1][section][field] = change_store(tiny_store / split, tmp_path / "other", **change)
    refused(pool(2).call(start, trees), text)


def test_a_store_that_one_rank_cannot_read_is_named(pool: Pools, tiny_store: Path, tmp_path: Path) -> None:
    trees = trees_of(tiny_store, tmp_path / "run")
    trees[1]["evaluation"]["data"] = str(tmp_path / "nothing")
    refused(pool(2).call(start, trees), f'evaluation.data is "unreadable: no data at {tmp_path / "nothing"}'[:60])
    trees[0]["evaluation"]["data"] = str(tmp_path / "nothing")
    ends = pool(2).call(start, trees)  # all alike: the store's own words
    assert {str(end["error"])[:10] for end in ends} == {"no data at"}


@pytest.mark.parametrize(("name", "value", "text"), SETTINGS, ids=[name for name, _, _ in SETTINGS])
def test_another_setting_on_one_rank_is_named(
    pool: Pools, tiny_store: Path, tmp_path: Path, name: str, value: object, text: str
) -> None:
    trees = trees_of(tiny_store, tmp_path / "run")
    section, field = name.split(".")
    for tree in trees:
        tree.setdefault("balance", {}).update(cost={"linear": 5.0, "quadratic": 0.1})
    trees[1].setdefault(section, {})[field] = value
    refused(pool(2).call(start, trees), text)


def test_a_rank_that_resumes_alone_is_named(pool: Pools, tiny_store: Path, tmp_path: Path) -> None:
    found = pool(2).call(compare_resume, config_over(tiny_store))
    assert found[0] == found[1]
    assert "--resume is true there and false on rank 0" in str(found[0])


def compare_resume(rank: int, world: int, tree: dict[str, Any]) -> str | None:
    try:
        check_config(config_from_tree(tree), rank == 1, cpu_rank(rank, world))
    except UserError as error:
        return str(error)
    return None


def test_the_same_data_in_other_places_is_let_through(pool: Pools, tiny_store: Path, tmp_path: Path) -> None:
    trees = trees_of(tiny_store, tmp_path / "run")
    shutil.copytree(tiny_store, tmp_path / "copy")
    trees[1]["data"] |= {"train": str(tmp_path / "copy/train"), "scrub_mb_per_s": 0.0}
    trees[1]["system"]["threads_per_rank"] = 2
    assert [(end["error"], end["steps"]) for end in pool(2).call(start, trees)] == [(None, 4)] * 2


@pytest.mark.parametrize(("step", "done", "text"), [
    (0, 0, "rank 1 has another start than rank 0: the plan of the first step is ["),
    (1, 2, "planned other samples than rank 0 in the 2 steps before step 2, so these steps are wrong and are not saved"),
    (2, 4, "planned other samples than rank 0 in the 2 steps before step 4, so these steps are wrong and are not saved"),
])  # fmt: skip
def test_a_rank_that_strays_from_the_plan_stops_the_run(
    pool: Pools, tiny_store: Path, tmp_path: Path, step: int, done: int, text: str
) -> None:
    trees = trees_of(tiny_store, tmp_path / "run")
    for tree in trees:
        tree["checkpoint"] = {"every_steps": 2, "async_save": False}
        tree.setdefault("balance", {})["prefetch"] = 1
    ends = pool(2).call(start, trees, step)
    assert ends[0]["error"] == ends[1]["error"]
    assert text in str(ends[0]["error"])
    assert [end["steps"] for end in ends] == [done, done]
    assert ends[0]["saved"] == max(0, done // 2 - 1), "the steps that went wrong are not in a checkpoint"


@pytest.mark.parametrize("is_wanted", [False, True])
def test_evaluation_on_the_training_store_is_refused_or_named(
    pool: Pools, tiny_store: Path, tmp_path: Path, is_wanted: bool
) -> None:
    trees = trees_of(tiny_store, tmp_path / "run")
    for tree in trees:
        tree["data"] |= {"allow_shared_text": is_wanted}
        tree["evaluation"] |= {"data": tree["data"]["train"]}
    ends = pool(2).call(start, trees)
    if is_wanted:
        assert [(end["error"], end["steps"]) for end in ends] == [(None, 4)] * 2
        total = len(Store(tiny_store / "train"))
        log = (tmp_path / "run/result_0.txt").read_text(encoding="utf-8")
        assert f'"eval_samples_of_training_text", "value": [{total}, {total}]' in log
        assert "data.allow_shared_text=true: the evaluation set is held out of training" in log
    else:
        assert ends[0] == ends[1]
        assert "samples of the evaluation store" in str(ends[0]["error"])
        assert str(ends[0]["error"]).endswith("or set data.allow_shared_text=true")


def test_what_may_differ_may_also_change() -> None:
    assert set(MAY_DIFFER) <= {name for name in every_setting() if any(fnmatch(name, p) for p in MAY_CHANGE)}


def compare_configs(rank: int, world: int, trees: list[dict[str, Any]]) -> str | None:
    try:
        check_config(config_from_tree(trees[rank]), False, cpu_rank(rank, world))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        ("a/cost.json", "b/cost.json", None),  # what the files say is compared, and not where they are
        ("a/cost.json", "measure", 'balance.cost is "measure" there and "a file" on rank 0'),
        ("flops", "b/cost.json", 'balance.cost is "a file" there and "flops" on rank 0'),
    ],
)
def test_a_cost_file_may_be_in_another_place(
    pool: Pools, tiny_store: Path, mine: str, theirs: str, said: str | None
) -> None:
    trees = [config_over(tiny_store) | {"balance": {"cost": cost}} for cost in (mine, theirs)]
    for found in pool(2).call(compare_configs, trees):
        assert found is None if said is None else said in str(found)


def test_another_cost_in_a_file_in_another_place_is_named(pool: Pools, tiny_store: Path, tmp_path: Path) -> None:
    trees = trees_of(tiny_store, tmp_path / "run")
    for number, tree in enumerate(trees):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"fitted": {"linear": 5.0 + number, "quadratic": 0.1}}), encoding="utf-8")
        tree["balance"] = {"cost": str(path)}
    refused(pool(2).call(start, trees), "rank 1 has another start than rank 0: ")


def every_setting() -> list[str]:
    return [f"{name}.{field}" for name, section in sections().items() for field in section.model_fields]
