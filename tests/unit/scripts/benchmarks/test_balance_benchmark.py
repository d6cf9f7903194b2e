"""The benchmarks of balance: names of figures, files, bad input; their measures against what is known of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.paths import ROOT

from bert_fast.balance.lengths import wikipedia_like
from scripts.benchmarks.balance import imbalance


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The script's main in this process, which stays on all its cores."""
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)

    def main(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["imbalance", *map(str, arguments)])
        return imbalance.main()

    return main


def test_figures_have_their_names(tmp_path: Path, run: Callable[..., int]) -> None:
    np.save(tmp_path / "lengths.npy", wikipedia_like(20_000))
    assert run(
        "--lengths", tmp_path / "lengths.npy", "--ranks", 8, "--batches", 4, "--steps", 5, "--no-start",
        "--json", tmp_path / "found.json", "--out", tmp_path / "out",
    ) == 0  # fmt: skip
    record = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert record.keys() == {"metrics", "config", "environment", "samples"}
    for strategy in imbalance.STRATEGIES:
        for name in ("imbalance_p99", "imbalance_mean", "plan_ms", "mutual_information_bits"):
            assert isinstance(record["metrics"][f"{strategy}/8x4/{name}"], float)
        assert len(record["samples"][f"{strategy}/8x4/imbalance"]) == 5
    assert "| balanced_free" in (tmp_path / "out/balance.md").read_text(encoding="utf-8")
    assert (tmp_path / "out/imbalance.svg").read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize("content", [None, b"text", np.zeros(0, np.uint16), np.ones((2, 2), int), np.array([0.5])])
def test_bad_lengths_get_one_line(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str], content: object
) -> None:
    path = tmp_path / "lengths.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    assert run("--lengths", path, "--ranks", 8, "--batches", 4, "--no-start") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "give a .npy file of whole numbers" in line


def test_more_ranks_than_samples_get_one_line(
    tmp_path: Path, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "lengths.npy", wikipedia_like(20))
    assert run("--lengths", tmp_path / "lengths.npy", "--ranks", 8, "--batches", 4, "--no-start") == 2
    assert capsys.readouterr().err.startswith(
        "error: random/8x4: batch.global_batch_size=32 is more than the 20 samples"
    )


def test_mutual_information_of_what_is_known() -> None:
    """Independent: zero, bias taken off. Batches of one length each: the entropy of the lengths."""
    rng = np.random.default_rng(0)
    independent = rng.multinomial(500, np.full(16, 1 / 16), size=100).astype(float)
    assert abs(imbalance.mutual_information(independent)) < 0.002
    assert imbalance.mutual_information(100_000 * np.eye(16)) == pytest.approx(4.0, abs=0.001)


def test_bytes_moved_counts_what_changes_ranks() -> None:
    lengths = wikipedia_like(5000)
    for strategy, moves in (("random", False), ("pad_to_longest", False), ("exchange", True), ("balanced", True)):
        planner = imbalance.make_planner(lengths, imbalance.Case(strategy, 8, 4))
        plan = planner.plan(1)
        found = imbalance.bytes_moved(plan, planner.draw(1), planner.lengths_of(plan))
        every = (2 * (3 + 1.3 * planner.lengths_of(plan))).sum() / 8
        assert (found > 0) == moves
        assert found < 1.02 * every


@pytest.mark.slow
def test_measured_step_times_follow_the_plan(tmp_path: Path) -> None:
    """The whole of step_times.py; only what no noise can hide is asserted."""
    command = [
        sys.executable,
        "-m",
        "scripts.benchmarks.balance.step_times",
        "--quick",
        "--json",
        str(tmp_path / "found.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["measured/random/max_over_mean"] > 1.2 > metrics["measured/balanced/max_over_mean"]
    assert metrics["measured/pad_to_longest/max_over_balanced_mean"] > 1.4
