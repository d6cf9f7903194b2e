"""MLPerf's rules as code: the published intervals, and every way in which a config that claims `closed` can break a rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from bert_fast.config import Config
from bert_fast.config.load import config_from_tree
from bert_fast.errors import UserError
from bert_fast.mlperf.rules import check_division, check_evaluation_set, evaluation_interval, open_because

CLOSED: dict[str, Any] = {
    "model": {
        "vocab_size": 30528, "hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096,
        "max_positions": 512,
    },
    "data": {"train": "t", "max_seq_len": 512},
    "evaluation": {"data": "e", "num_samples": 10_000, "target_accuracy": 0.72, "every_samples": 150_000},
    "checkpoint": {"init_from": "model.ckpt-28252"},
    "batch": {"global_batch_size": 448, "micro_batch_size": 56},
    "communication": {"clip": "global_before_reduce"},
    "optimizer": {"name": "lamb", "lr": 4.25e-4, "weight_decay": 0.01},
    "schedule": {"total_steps": 6700},
    "train": {"max_steps": 6700},
    "system": {"world_size": 8, "device": "cuda"},
    "mlperf": {"division": "closed"},
}  # fmt: skip


def config_with(**changes: Any) -> Config:
    tree = copy.deepcopy(CLOSED)
    for name, value in changes.items():
        section, field = name.split("__")
        tree.setdefault(section, {})[field] = value
    return config_from_tree(tree)


@pytest.mark.parametrize(
    ("global_batch_size", "samples"),
    [(256, 150_000), (448, 150_000), (3072, 175_000), (4096, 175_000), (4608, 200_000), (8192, 225_000),
     (12_288, 275_000), (16_384, 325_000)],
)  # fmt: skip
def test_published_evaluation_intervals(global_batch_size: int, samples: int) -> None:
    assert evaluation_interval(global_batch_size) == samples


def test_a_closed_config_is_let_through() -> None:
    config = config_with()
    assert open_because(config) == []
    check_division(config)
    check_division(config_with(evaluation__every_samples=150_080))  # the next whole batch


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"communication__clip": "bucket_before_reduce"}, "communication.clip=bucket_before_reduce"),
        ({"communication__clip": "none"}, "communication.clip=none"),
        ({"communication__max_norm": 0.5}, "communication.max_norm=0.5"),
        ({"model__num_layers": 12}, "model.num_layers=12"),
        ({"model__vocab_size": 32_000}, "model.vocab_size=32000"),
        ({"model__hidden_dropout": 0.0}, "model.hidden_dropout=0.0"),
        ({"data__max_seq_len": 128}, "data.max_seq_len=128"),
        ({"data__dynamic_masking": True}, "data.dynamic_masking=true"),
        ({"data__allow_shared_text": True}, "data.allow_shared_text=true"),
        ({"evaluation__at_start": True}, "evaluation.at_start=true"),
        ({"model__layer_norm_eps": 1e-3}, "model.layer_norm_eps=0.001"),
        ({"balance__strategy": "stratified_presort"}, "balance.strategy=stratified_presort"),
        ({"evaluation__num_samples": None}, "evaluation.num_samples=None"),
        ({"evaluation__num_samples": 5000}, "evaluation.num_samples=5000"),
        ({"evaluation__target_accuracy": 0.7}, "evaluation.target_accuracy=0.7"),
        ({"evaluation__every_samples": 175_000}, "evaluation.every_samples=175000"),
        ({"evaluation__start_samples": 1_000_000}, "evaluation.start_samples=1000000"),
        ({"checkpoint__init_from": None}, "checkpoint.init_from is not set"),
        ({"schedule__power": 0.5}, "schedule.power=0.5"),
        ({"schedule__end_lr": 1e-5}, "schedule.end_lr=1e-05"),
    ],
)
def test_a_broken_rule_is_named(change: dict[str, Any], named: str) -> None:
    config = config_with(**change)
    assert [reason.split(": ")[0] for reason in open_because(config)] == [named]
    with pytest.raises(UserError, match=f"^mlperf.division=closed: {named}: .*; change it or set mlperf.division=open"):
        check_division(config)


def test_what_makes_the_published_adam_point_open() -> None:
    config = config_with(optimizer__name="adamw", communication__clip="bucket_before_reduce", mlperf__division="open")
    check_division(config)
    assert [reason.split("=")[0] for reason in open_because(config)] == ["optimizer.name", "communication.clip"]


def test_a_small_evaluation_store_is_refused_when_closed() -> None:
    check_evaluation_set(10_000, config_with())
    with pytest.raises(UserError, match="the evaluation store e has 9,999 samples and the rule is 10,000"):
        check_evaluation_set(9_999, config_with())
    check_evaluation_set(9_999, config_with(mlperf__division="open"))
