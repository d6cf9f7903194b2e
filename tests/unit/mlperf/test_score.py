"""scripts/score.py: figures of logs by hand, MLPerf's mean, and logs that are none."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from score import COLUMNS, row_of
from support.paths import ROOT

from bert_fast.errors import UserError
from bert_fast.mlperf.score import score_folder, score_run


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
    assert (run.division, run.global_batch_size, run.seed, run.converged) == ("open", 64, 11, True)
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
        (':::MLLOG {"key": "run_stop", "value": null, "time_ms": 1}\n', "a run_stop and no run_start"),
        (f':::MLLOG {{"key": "a", "value": {"[" * 5000}\n', "line 1 is no MLLOG event"),
        (f'\n:::MLLOG {{"key": "a", "value": {"[" * 150}{"]" * 150}, "time_ms": 1}}\n', "line 2 is no MLLOG event"),
        (f'\n\n:::MLLOG {{"key": "a", "value": "{"x" * 1_100_000}", "time_ms": 1}}\n', "line 3 has 1,100,0.. bytes"),
        (f':::MLLOG {{"key": "a", "value": "{"x" * 1_000_000}", "time_ms": 1}}\n' * 17, "line 17: more than 16 MiB"),
    ],
    ids=["none", "broken", "no start", "deep", "nested", "long", "large"],
)
def test_logs_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "result_0.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        score_folder(tmp_path)
    assert len(str(caught.value)) < 400


def change(path: Path, key: str, /, **values: Any) -> None:
    """Change all events of a key."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        head, mark, text = line.partition(":::MLLOG ")
        event = json.loads(text) if mark else {}
        lines.append(f"{head}{mark}{json.dumps({**event, **values})}" if event.get("key") == key else line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


WRONG = [math.inf, -math.inf, math.nan, 1e308, -5, 10**400, "text", "\x1b[2J" * 50_000, [[1]], {"a": 1}, True, None, 0]


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("global_batch_size", "value"), ("run_start", "time_ms"), ("run_stop", "time_ms"), ("run_stop", "metadata"),
        ("eval_accuracy", "value"), ("eval_accuracy", "metadata"), ("eval_accuracy", "time_ms"), ("seed", "value"),
        ("submission_division", "value"), ("run_start", "key"),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_a_dash_or_one_line(tmp_path: Path, key: str, field: str, value: Any) -> None:
    """Whatever stands in a field: figures that are finite, or one short line without control characters."""
    for number in range(3):
        write_log(tmp_path / f"result_{number}.txt")
        change(tmp_path / f"result_{number}.txt", key, **{field: value})
    try:
        row = row_of(score_folder(tmp_path), "5.0.0")
        assert not any(word in cell for cell in row[6:] for word in ("nan", "inf"))
        cells = " ".join(row)
    except UserError as error:
        cells = str(error).removeprefix(str(tmp_path))
    assert len(cells) < 400
    assert not any(ord(character) < 32 for character in cells)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "folder", "sparse"])
def test_a_log_without_end_is_refused_at_once(tmp_path: Path, name: str) -> None:
    log = tmp_path / "result_0.txt"
    if name == "pipe":
        os.mkfifo(log)
    elif name == "folder":
        log.mkdir()
    elif name == "sparse":
        with open(log, "wb") as file:
            file.truncate(1 << 40)
    else:
        log.symlink_to(name)
    with pytest.raises(UserError, match=r"result_0\.txt (is no regular file|has 1,048,576 MiB.* at most 256 MiB)"):
        score_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("scaling.json", '{"scaling_factor": Infinity}'), ("scaling.json", '{"scaling_factor": "x"}'),
        ("scaling.json", "[" * 9000), ("scaling.json", "[]"), ("scaling.json", '{"scaling_factor": -1}'),
        ("systems/box.json", "[1]"), ("systems/box.json", "[" * 9000), ("systems/box.json", "\x00"),
    ],
)  # fmt: skip
def test_damaged_files_beside_the_logs(tmp_path: Path, name: str, text: str) -> None:
    for number in range(3):
        write_log(tmp_path / f"box/bert/result_{number}.txt")
    path = tmp_path / "box/bert" / name if name == "scaling.json" else tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=Path(name).name):
        score_folder(tmp_path / "box/bert")


@pytest.mark.parametrize("count", ["", "many", 1e400, None, -1])
def test_accelerators_that_are_not_told_are_a_dash(tmp_path: Path, count: Any) -> None:
    for number in range(3):
        write_log(tmp_path / f"results/box/bert/result_{number}.txt")
    (tmp_path / "systems").mkdir()
    (tmp_path / "systems/box.json").write_text(json.dumps({"number_of_nodes": 2, "accelerators_per_node": count}))
    row = dict(zip(COLUMNS, row_of(score_folder(tmp_path / "results/box/bert"), "5.0.0"), strict=True))
    assert (row["accelerators"], row["samples/s/accelerator"]) == ("-", "-")


# ---- logs of the first rounds ---------------------------------------------------------------------------------------


def write_old_log(
    path: Path, *, epochs: list[Any] | None = None, train_samples: list[Any] | None = None, cadence: list[int] | None = None,
    step_s: float = 0.1791, startup_s: float = 0.0, eval_s: float = 0.0, timed: bool = True, stop: bool = True,
    training_steps: int | None = 7100,
) -> None:  # fmt: skip
    """A run of 2,551,360 samples at a batch of 448: 5,695 steps of `step_s`, evaluated after each of `cadence` samples.

    Args:
        epochs: what the evaluations have as epoch_num; the samples if None.
        train_samples: values under that key: one each evaluation, or fewer, at the end.
        eval_s: seconds of an evaluation; the log has its start and end if `timed`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []

    def event(key: str, seconds: float, value: Any = None, **metadata: Any) -> None:
        line = {"key": key, "value": value, "time_ms": round(1e6 + 1e3 * seconds), "metadata": metadata}
        lines.append(f":::MLLOG {json.dumps(line)}")

    cadence = cadence or [335 * 448] * 17
    event("submission_division", -5, "closed")
    event("global_batch_size", -4, 448)
    if training_steps:
        event("opt_learning_rate_training_steps", -4, training_steps)
    event("run_start", 0)
    now, samples = startup_s, 0
    each = train_samples or []
    for number, between in enumerate(cadence):
        samples += between
        now += step_s * between / 448
        if timed:
            event("eval_start", now)
        now += eval_s
        if len(each) == len(cadence):
            event("train_samples", now, each[number])
        event(
            "eval_accuracy",
            now,
            0.721 if number + 1 == len(cadence) else 0.5,
            epoch_num=epochs[number] if epochs else samples,
        )
        if timed:
            event("eval_stop", now)
    if len(each) != len(cadence):
        for value in each:
            event("train_samples", now, value)
    if stop:
        event("run_stop", now, status="success")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


PASSED = [335 * 448 * n for n in range(1, 18)]


@pytest.mark.parametrize(
    ("epochs", "train_samples", "key"),
    [
        (None, [156_725_653], "epoch_num"),
        (None, [0.7211], "epoch_num"),
        (None, [2_551_360], "epoch_num"),
        ([1] * 17, [2_551_360], "train_samples"),
        (list(range(1, 18)), [2_551_360], "train_samples"),
        ([0.01 * n for n in range(17)], [2_551_360], "train_samples"),
        ([1] * 17, PASSED, "train_samples"),
        ([1] * 17, [2_551_360, 0.7211], "train_samples"),
    ],
)
def test_samples_are_read_from_the_key_that_can_hold_them(
    tmp_path: Path, epochs: list[Any] | None, train_samples: list[Any], key: str
) -> None:
    write_old_log(tmp_path / "result_0.txt", epochs=epochs, train_samples=train_samples)
    run = score_run(tmp_path / "result_0.txt")
    assert (run.samples, run.steps, run.samples_key, run.converged) == (2_551_360, 5695, key, True)
    assert run.step_s == pytest.approx(0.1791, rel=1e-4)


@pytest.mark.parametrize("training_steps", [7100, None])
@pytest.mark.parametrize("train_samples", [None, [0.7211], [156_725_653], ["2551360 of them"], [math.inf], [True]])
def test_samples_that_no_key_tells_are_a_dash(
    tmp_path: Path, train_samples: list[Any] | None, training_steps: int | None
) -> None:
    for number in range(3):
        path = tmp_path / f"result_{number}.txt"
        write_old_log(path, epochs=[1] * 17, train_samples=train_samples, training_steps=training_steps)
    row = dict(zip(COLUMNS, row_of(score_folder(tmp_path), "2.1.0"), strict=True))
    assert row["minutes"] == f"{5695 * 0.1791 / 60:.4f}"
    for column in ("samples", "steps", "step ms", "start-up s", "reference convergence", "samples read from"):
        assert row[column] == "-", column


def test_a_count_far_beyond_the_schedule_is_the_size_of_a_data_set(tmp_path: Path) -> None:
    write_old_log(tmp_path / "result_0.txt", epochs=[1] * 17, train_samples=[9_000_000])
    assert score_run(tmp_path / "result_0.txt").samples is None


def test_the_reference_judges_the_samples_that_were_read(tmp_path: Path) -> None:
    for number in range(3):
        write_old_log(tmp_path / f"result_{number}.txt", epochs=[1] * 17, train_samples=[2_551_360])
    row = dict(zip(COLUMNS, row_of(score_folder(tmp_path), "2.1.0"), strict=True))
    assert (row["samples"], row["steps"], row["step ms"]) == ("2,551,360", "5,695", "179.1")
    assert row["reference convergence"] == "passed"
    assert row["samples read from"] == "train_samples"


@pytest.mark.parametrize("timed", [True, False])
def test_startup_where_the_first_evaluation_comes_later_than_the_others(tmp_path: Path, timed: bool) -> None:
    """A first evaluation after 20 intervals: their 20 evaluations, in the pace of the others, made the start-up negative."""
    cadence = [20 * 50 * 448, *[50 * 448] * 10]
    write_old_log(tmp_path / "result_0.txt", cadence=cadence, startup_s=4.0, eval_s=2.0, timed=timed)
    run = score_run(tmp_path / "result_0.txt")
    assert run.step_s == pytest.approx(0.1791 + 2 / 50, rel=1e-4), "with evaluation"
    if timed:
        assert run.startup_s == pytest.approx(4.0, abs=0.02)
    else:
        assert run.startup_s is None


def test_startup_is_never_negative(tmp_path: Path) -> None:
    write_old_log(tmp_path / "result_0.txt", startup_s=-20.0)
    assert score_run(tmp_path / "result_0.txt").startup_s is None


@pytest.mark.parametrize("end", ["", ':::MLLOG {"key": "eval_acc'])
def test_a_run_that_was_cut_off_counts_as_the_slowest(tmp_path: Path, end: str) -> None:
    for number in range(4):
        write_old_log(tmp_path / f"result_{number}.txt", step_s=0.1 + 0.01 * number, stop=number != 0)
    with open(tmp_path / "result_0.txt", "a", encoding="utf-8") as file:
        file.write(end)
    score = score_folder(tmp_path)
    assert [run.converged for run in score.runs] == [False, True, True, True]
    assert score.runs[0].cut_off
    assert score.runs[0].time_s == pytest.approx(5695 * 0.1)
    assert score.minutes == pytest.approx(5695 * 0.125 / 60), "without the fastest and the one without end"
    (tmp_path / "result_1.txt").write_text(':::MLLOG {"key": "init_start", "value": null, "time_ms": 1}\n')
    two_lost = score_folder(tmp_path)
    assert two_lost.minutes is None
    assert dict(zip(COLUMNS, row_of(two_lost, "2.1.0"), strict=True))["converged"] == "2"


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
    odd = tmp_path / "$\\frac [/] \x1b[2J_|\udcff"
    write_log(odd / "result_0.txt")
    done = subprocess.run([*script, str(odd), *out], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    done = subprocess.run([*script, str(tmp_path / "none")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
