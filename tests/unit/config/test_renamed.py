"""A setting with the name of an earlier version is refused with its new name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bert_fast.config import sections
from bert_fast.config.load import config_from_tree, load_config
from bert_fast.config.renamed import RENAMED
from bert_fast.errors import UserError

NEW = {f"{section}.{name}" for section, model in sections().items() for name in model.model_fields}
PLAIN = sorted(old for old, new in RENAMED.items() if new.value is None)

# What a run of an earlier version left as its config.yaml, all defaults included
OLD: dict[str, dict[str, Any]] = {
    "run": {"name": "run", "matmul_ceiling": True},
    "data": {"train": "t", "eval": "e", "eval_sha256": None, "verify_mb_s": 8.0, "eval_samples": None},
    "batch": {"global_batch": 8, "local_batch": 8, "accumulation": 1, "eval_batch": 64},
    "balance": {
        "strategy": "balanced", "cost_linear": None, "cost_quadratic": None, "cost_file": None, "fit_cost": False,
        "pack_rows": None, "pack_depth": 12, "pack_first": "longest",
    },
    "optimizer": {"when": "end"},
    "schedule": {"total_steps": 10},
    "train": {
        "max_steps": 10, "init_checkpoint": None, "target_accuracy": None, "eval_every_samples": 8, "eval_start_samples": None,
        "eval_at_start": False, "checkpoint_every_steps": 0, "async_checkpoints": True, "checkpoint_timeout_s": 600.0,
        "keep_checkpoints": 2, "save_final_model": False,
    },
    "system": {"settings": None},
}  # fmt: skip


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        config_from_tree(tree, "run.yaml")
    return str(refused.value)


def test_new_names_exist_and_old_ones_do_not() -> None:
    assert {new.field for new in RENAMED.values()} <= NEW
    assert not RENAMED.keys() & NEW


@pytest.mark.parametrize("old", PLAIN)
def test_a_renamed_field_is_refused_with_its_new_name(old: str) -> None:
    section, _, name = old.partition(".")
    assert refusal({section: {name: 1}}) == f"run.yaml: {old} is now {RENAMED[old].field}"


@pytest.mark.parametrize(
    ("section", "values", "said", "new"),
    [
        ("optimizer", "when: bucket", "optimizer.when: bucket is now", "optimizer.step_per_bucket: true"),
        ("optimizer", "when: end", "optimizer.when: end is now", "optimizer.step_per_bucket: false"),
        ("balance", "cost_file: a/cost.json", "balance.cost_file: a/cost.json is now", "balance.cost: a/cost.json"),
        ("balance", "fit_cost: true", "balance.fit_cost: true is now", "balance.cost: measure"),
        ("balance", "fit_cost: false", "balance.fit_cost: false is now", "balance.cost: flops"),
        (
            "balance", "{cost_linear: 1.5, cost_quadratic: 0.25}",
            "balance.cost_linear: 1.5 and balance.cost_quadratic: 0.25 are now", "balance.cost: {linear: 1.5, quadratic: 0.25}",
        ),
        ("balance", "cost_quadratic: 2", "balance.cost_quadratic: 2 is now", "balance.cost: {linear: 0.0, quadratic: 2}"),
    ],
)  # fmt: skip
def test_a_value_that_is_written_in_another_way_is_given(section: str, values: str, said: str, new: str) -> None:
    assert refusal({section: yaml.safe_load(values)}) == f"run.yaml: {said} {new}"
    field, _, value = new.partition(": ")
    tree: dict[str, dict[str, Any]] = {
        "batch": {"global_batch_size": 8, "micro_batch_size": 8}, "schedule": {"total_steps": 10},
        "train": {"max_steps": 10}, "evaluation": {"every_samples": 8},
    }  # fmt: skip
    tree[section] = {field.partition(".")[2]: yaml.safe_load(value)}
    config_from_tree(tree)  # what the message says to write is a config


def test_every_old_field_of_a_file_is_named_on_one_line_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(OLD), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_config(path)
    text = str(refused.value)
    assert text.startswith(f"{path}: run.matmul_ceiling is now run.measure_peak_flops; ")
    assert "\n" not in text
    assert "missing" not in text
    assert "unknown" not in text
    for old, new in RENAMED.items():
        assert old in text
        assert new.field in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch.local_batch=4", "batch.local_batch is now batch.micro_batch_size"),
        ("optimizer.when=bucket", "optimizer.when: bucket is now optimizer.step_per_bucket: true"),
    ],
)
def test_an_override_with_an_old_name_is_refused(tmp_path: Path, override: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("schedule: {total_steps: 10}\n", encoding="utf-8")
    with pytest.raises(UserError) as refused:
        load_config(path, [override])
    assert str(refused.value) == f"{path}: {said}"


def test_an_odd_value_of_an_old_field_breaks_nothing() -> None:
    assert "optimizer.step_per_bucket" in refusal({"optimizer": {"when": [10**9000]}})
    assert "balance.cost" in refusal({"balance": {"cost_file": "a\nb" * 500}})
    assert "did you mean" in refusal({"batch": 3, "optimiser": {"when": 1}})
