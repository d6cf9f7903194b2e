"""Pairs of runs: whose time is divided by whose, and what a record must have in common with its yardstick."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from support.paths import ROOT

from bert_fast.config.load import load_config
from bert_fast.errors import UserError
from scripts.benchmarks.time_to_train.__main__ import (
    BASELINE,
    RECORD,
    Comparison,
    check_record,
    raw_samples,
    summarise,
    table,
)


def metrics(seconds: float, reached: int = 1, rate: float = 100.0, share: float = 0.04) -> dict[str, Any]:
    return {
        "time_to_train_s": seconds,
        "samples_to_target": 1000,
        "target_reached": reached,
        "final_accuracy": 0.3,
        "samples_per_s": rate,
        "tokens_per_s": rate,
        "evaluation_share": share,
    }


def test_a_record_is_measured_by_its_yardstick() -> None:
    pairs = [
        {"record": metrics(10, rate=200, share=0.02), "mini": metrics(40, share=0.1)},
        {"record": metrics(20, rate=300, share=0.04), "mini": metrics(60, share=0.2)},
        {"record": metrics(20, reached=0, share=0.06), "mini": metrics(10, share=0.3)},
    ]
    samples = raw_samples(pairs, False, RECORD)
    found = summarise(samples, RECORD)
    assert samples["time_to_train_ratio_mini_over_record"] == [4, 3, None]
    assert found["time_to_train_ratio_mini_over_record"] == 3.5
    assert found["num_ratios"] == 2
    assert found["throughput_ratio_record_over_mini"] == 2
    assert (found["evaluation_share"], found["evaluation_share/mini"]) == (0.04, 0.2)
    assert " none |" in table(samples, found, RECORD)


def test_no_ratio_where_every_pair_missed_the_target() -> None:
    pairs = [{"record": metrics(10, reached=0), "mini": metrics(40)}]
    found = summarise(raw_samples(pairs, False, RECORD), RECORD)
    assert found["time_to_train_ratio_mini_over_record"] is None


def test_the_baseline_has_no_share_of_evaluation() -> None:
    slow = metrics(40, rate=50)
    del slow["evaluation_share"]
    samples = raw_samples([{"ours": metrics(10), "hf": slow}], True, BASELINE)
    assert samples["time_to_train_ratio_hf_over_ours"] == [2.0]  # quick: of times per sample
    assert "evaluation_share/hf" not in samples


@pytest.mark.parametrize("comparison", [BASELINE, RECORD])
def test_sides_take_turns(comparison: Comparison) -> None:
    assert comparison.order(1) == comparison.order(2)[::-1]


def test_a_record_of_another_task_is_refused(tmp_path: Path) -> None:
    mini, record = ROOT / "configs/mini_cpu.yaml", tmp_path / "record.yaml"
    record.write_text(mini.read_text().replace("target_accuracy: 0.30", "target_accuracy: 0.29"))
    args = argparse.Namespace(config=str(mini), record=str(record), overrides=[], quick=False)
    with pytest.raises(UserError, match=r"evaluation.target_accuracy=0.29 and .* 0.3: no record of the same task"):
        check_record(load_config(mini, []), args)
