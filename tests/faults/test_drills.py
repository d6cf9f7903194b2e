"""Each drill of scripts/faults/drill.py once, on the tiny task: what is promised of failures is true.

The whole table, with 50 kills, is made by the script: results/faults/.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from scripts.faults import drill as fault_drill
from scripts.faults import drills

pytestmark = [pytest.mark.distributed, pytest.mark.faults]


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """The row of a promise that was kept; skips where the machine does not let us break it."""
    if row["kept"] is None:
        pytest.skip(row["says"])
    assert row["kept"], row
    return row


# One moment here; the others, and the drills marked slow, are also what `python -m scripts.faults.drill` runs
@pytest.mark.parametrize(
    "moment", [pytest.param(each, marks=() if each == "compute" else pytest.mark.slow) for each in drills.MOMENTS]
)
def test_a_killed_rank(against: drills.Against, moment: str) -> None:
    found = kept(drills.kill(against, random.Random(moment), moment))
    assert found["exit_code"] == 0
    assert found["detect_s"] is None or found["detect_s"] <= against.drill.timeout_s + against.drill.slack_s


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("topk_ef", marks=pytest.mark.slow), "onebit_adam"])
def test_a_killed_rank_with_a_lossy_format(against: drills.Against, name: str) -> None:
    kept(drills.kill_with_format(against.drill, random.Random(name), name))


def test_a_rank_that_hangs_is_named_in_time(against: drills.Against) -> None:
    found = kept(drills.silence(against, "hang"))
    assert "rank 1 (" in found["says"]
    assert "forward and backward" in found["says"]


def test_not_a_number(against: drills.Against) -> None:
    kept(drills.not_a_number(against))


@pytest.mark.slow
def test_a_stopped_rank(against: drills.Against) -> None:
    kept(drills.silence(against, "stop"))


@pytest.mark.slow
def test_a_disk_that_does_not_answer(against: drills.Against) -> None:
    kept(drills.silent_disk(against))


@pytest.mark.slow
def test_a_clock_that_jumps(against: drills.Against) -> None:
    kept(drills.skewed_clock(against))


@pytest.mark.slow
def test_a_damaged_checkpoint(against: drills.Against) -> None:
    kept(drills.damaged_checkpoint(against))


@pytest.mark.slow
def test_a_full_disk(against: drills.Against, tmp_path: Path) -> None:
    kept(drills.full_disk(against, tmp_path / "disk"))


@pytest.mark.slow
def test_results_that_turn_read_only(against: drills.Against) -> None:
    kept(drills.read_only_results(against))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["vanishes", "changes"])
def test_a_store_that_is_lost(against: drills.Against, store: Path, how: str) -> None:
    kept(drills.lost_data(against, store, how))


@pytest.mark.slow
def test_a_cut_network(against: drills.Against) -> None:
    kept(drills.cut_network(against))


@pytest.mark.slow
def test_what_a_checkpoint_costs(against: drills.Against, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement itself: all three kinds are there, and one that is waited for makes training wait."""
    monkeypatch.setattr(fault_drill, "BIG", ())
    found = fault_drill.checkpoint_stall(against.drill.config, tmp_path, checkpoints=12, every=3)
    assert {row["kind"] for row in found["records"]} == {"beside", "waited for", "none"}
    assert 0 < found["stall_s"] < found["synchronous_s"]
    assert "training waits" in fault_drill.stall_text(found)
