"""The picture of the README is what its script makes of the records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.paths import ROOT

from bert_fast.errors import UserError
from scripts.benchmarks import claim_picture

BALANCE = ROOT / "results/balance/step.json"
OVERLAP = ROOT / "results/overlap/layers-200mbit.json"


def test_the_picture_is_up_to_date(tmp_path: Path) -> None:
    claim_picture.draw(
        claim_picture.slowest_over_even(BALANCE), claim_picture.step_and_exposed_s(OVERLAP), tmp_path / "claim.svg"
    )
    assert (tmp_path / "claim.svg").read_text(encoding="utf-8") == (ROOT / "docs/images/claim.svg").read_text(
        encoding="utf-8"
    )


def test_the_defaults_are_the_best_rows() -> None:
    slowest = claim_picture.slowest_over_even(BALANCE)
    assert min(slowest, key=lambda name: slowest[name]) == "balanced"
    steps = claim_picture.step_and_exposed_s(OVERLAP)
    assert list(steps) == sorted(steps, key=lambda name: -steps[name][0])
    compute = [step - exposed for step, exposed in steps.values()]
    assert max(compute) == pytest.approx(min(compute))  # exposed is over one cycle without communication


def test_a_record_without_the_metric_is_named(tmp_path: Path) -> None:
    record = tmp_path / "step.json"
    record.write_text(json.dumps({"metrics": {}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"step\.json has no metric measured/pad_to_longest"):
        claim_picture.slowest_over_even(record)
    record.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="it has no metrics"):
        claim_picture.slowest_over_even(record)
