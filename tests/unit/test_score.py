"""scripts/score.py: figures of logs by hand, MLPerf's mean, and logs that are none."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bert_fast.errors import UserError
from bert_fast.mlperf.score import score_folder, score_run

ROOT = Path(__file__).resolve().parents[2]


def write_log(
    path: Path, pace_s: float = 0.1, startup_s: float = 3.0, evaluations: int = 4, status: str = "success"
) -> None:
    """Evaluations every 20 steps of 64 samples, `pace_s` a step; a rank prefix and lines of other kinds in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["hello"]

    def event(key: str, seconds: float, value: Any = None, **metadata: Any) -> None:
        line = {"key": key, "value": value, "time_ms": int(1e6 + 1e3 * seconds), "metadata": metadata}
        lines.append(f"0: :::MLLOG {json.dumps(line)}")

    event("submission_division", -5, "open")
    event("global_batch_size", -4, 64)
    event("seed", -4, 11)
    event("run_start", 0)
    now = 0.0
    for number in range(1, evaluations + 1):
        now = startup_s + number * 20 * pace_s
        event("eval_accuracy", now, 0.2 + 0.02 * number, epoch_num=number * 20 * 64)
    event("run_stop", now + 0.5, status=status)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_log_by_hand(tmp_path: Path) -> None:
    write_log(tmp_path / "result_0.txt")
    run = score_run(tmp_path / "result_0.txt")
    assert (run.division, run.global_batch, run.seed, run.converged) == ("open", 64, 11, True)
    assert (run.samples, run.steps) == (4 * 20 * 64, 80)
    assert run.time_s == pytest.approx(3 + 8 + 0.5)
    assert run.step_s == pytest.approx(0.1)
    assert run.startup_s == pytest.approx(3.0, abs=1e-6)
    assert run.evaluations[-1] == (11.0, 5120, pytest.approx(0.28))


def test_mlperfs_mean_and_the_rate_per_accelerator(tmp_path: Path) -> None:
    folder = tmp_path / "org/results/box/bert"
    for number in range(10):
        write_log(folder / f"result_{number}.txt", pace_s=0.1 + 0.01 * number)
    (tmp_path / "org/systems").mkdir()
    (tmp_path / "org/systems/box.json").write_text(
        '{"number_of_nodes": "2", "accelerators_per_node": 8}', encoding="utf-8"
    )
    score = score_folder(folder)
    assert (score.name, score.accelerators, len(score.runs)) == ("box", 16, 10)
    assert score.minutes == pytest.approx((3.5 + 80 * 0.145) / 60)
    assert score.rate == pytest.approx(5120 / (3.5 + 80 * 0.145) / 16)
    write_log(folder / "result_0.txt", status="aborted")
    one_lost = score_folder(folder).minutes
    assert one_lost == pytest.approx((3.5 + 80 * 0.155) / 60), "it counts as the slowest"
    write_log(folder / "result_1.txt", status="aborted")
    assert score_folder(folder).minutes is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing of the kind\n", "no MLLOG line"),
        (":::MLLOG {broken\n", "line 1 is no MLLOG event"),
        (':::MLLOG {"key": "run_start", "value": null, "time_ms": 1}\n', "has no run_stop"),
    ],
)
def test_logs_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "result_0.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        score_folder(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    for number in range(3):
        write_log(tmp_path / f"mine/result_{number}.txt")
    script = [sys.executable, str(ROOT / "scripts/score.py")]
    out = ["--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.svg"), "--json", str(tmp_path / "a.json")]
    done = subprocess.run([*script, str(tmp_path / "mine"), *out], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "a.csv", encoding="utf-8") as file:
        header, row = list(csv.reader(file))
    found = dict(zip(header, row, strict=True))
    assert (found["system"], found["minutes"], found["samples"], found["step ms"]) == (
        "mine",
        "0.1917",
        "5120",
        "100.0",
    )
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert record["metrics"]["score_minutes/mine"] == pytest.approx(11.5 / 60)
    assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<?xml")
    done = subprocess.run([*script, str(tmp_path / "none")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
