"""A run seen through its folder while the files change, and scripts/watch.py on it."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import watch as watch_script
import yaml
from rich.console import Console
from support.paths import ROOT
from support.run_files import run_record

from bert_fast.errors import UserError
from bert_fast.report.console import sparkline
from bert_fast.report.forecast import forecast
from bert_fast.report.foreign_run import REQUIRED_VALUES, VALUE_READERS
from bert_fast.report.live import RunWatch
from bert_fast.report.schema import FORMAT, EvaluationLine, SkippedLine, StepLine
from bert_fast.report.tail import Tail

SCRIPT = ROOT / "scripts" / "watch.py"

CONFIG = """
run: {name: made_up}
batch: {global_batch_size: 64}
train: {seed: 3, max_steps: 100}
evaluation: {target_accuracy: 0.5, every_samples: 640}
"""


def step_line(step: int, **values: Any) -> str:
    line = {
        "kind": "step", "step": step, "samples": 64 * step, "time_s": 0.2 * step, "loss": 9.0 - 0.01 * step,
        "samples_per_s": 400.0, "imbalance": [1.0] * 10, "compute_imbalance": [1.1] * 10, "compute_ms": [100.0, 120.0],
        "exposed_ms": 8.0, "data_ms": 1.6, "optimizer_ms": 2.0,
    }  # fmt: skip
    return json.dumps({**line, **values}) + "\n"


def eval_line(step: int, accuracy: float) -> str:
    line = {"kind": "eval", "step": step, "samples": 64 * step, "time_s": 0.2 * step + 0.1, "accuracy": accuracy}
    return json.dumps(line) + "\n"


def append(folder: Path, *lines: str, file: str = "metrics.jsonl") -> None:
    with open(folder / file, "a") as out:
        out.writelines(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    (made / "config.yaml").write_text(CONFIG)
    return made


def look(watch: RunWatch) -> dict[str, Any]:
    watch.poll()
    return watch.snapshot()


def quiet(folder: Path, seconds: float) -> None:
    """Make all of the folder's files look that old."""
    then = time.time() - seconds
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))


def event(key: str, **metadata: Any) -> str:
    return f":::MLLOG {json.dumps({'key': key, 'value': 1, 'metadata': metadata})}\n"


# ---- files that change ----------------------------------------------------------------------------------------------


def test_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path)
    assert list(tail.read()[1]) == []
    path.write_text("a\nb\nhal")
    assert list(tail.read()[1]) == [b"a", b"b"]
    assert list(tail.read()[1]) == []
    with open(path, "a") as file:
        file.write("f\nc\n")
    replaced, lines = tail.read()
    assert (replaced, list(lines)) == (False, [b"half", b"c"])


@pytest.mark.parametrize("new", ["n\n", "new line\nlonger than before\n"])
def test_tail_starts_again_in_another_file(tmp_path: Path, new: str) -> None:
    path = tmp_path / "lines"
    path.write_text("a\nb\nhalf")
    tail = Tail(path)
    list(tail.read()[1])
    path.write_text(new)  # the same inode: the number does not tell
    replaced, lines = tail.read()
    assert (replaced, list(lines)) == (True, new.encode().split(b"\n")[:-1])


def test_tail_reads_more_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = [b"x" * size for size in (0, 3, 20, 7, 1)]
    path.write_bytes(b"\n".join([*lines, b"rest"]))
    assert list(Tail(path, block_bytes=7).read()[1]) == lines


def test_run_restarted_in_the_folder(folder: Path) -> None:
    watch = RunWatch(folder)
    append(folder, *(step_line(step) for step in range(10, 60, 10)), eval_line(50, 0.4))
    assert look(watch)["step"] == 50
    shutil.rmtree(folder)
    assert look(watch)["state"] == "waiting"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.replace("max_steps: 100", "max_steps: 900"))
    append(folder, step_line(10, time_s=1.0))
    now = look(watch)
    assert (now["step"], now["max_steps"], now["accuracy"], now["sessions"]) == (10, 900, None, 1)
    assert len(now["losses"]) == 1


def test_line_cut_off_by_a_crash(folder: Path) -> None:
    append(folder, step_line(10), step_line(20)[:40], "\n", "7\n", "[1]\n", step_line(20))
    watch = RunWatch(folder)
    assert look(watch)["step"] == 20
    append(folder, step_line(30)[:-20])
    assert look(watch)["step"] == 20


# ---- states ---------------------------------------------------------------------------------------------------------


def test_states(folder: Path) -> None:
    watch = RunWatch(folder)
    assert look(RunWatch(folder.parent / "later"))["state"] == "waiting"
    assert look(watch)["state"] == "waiting"
    append(folder, step_line(10), step_line(20))
    assert look(watch)["state"] == "running"
    quiet(folder, 95)
    now = look(watch)
    assert now["state"] == "silent"
    assert now["state_text"].startswith(("silent since 1:3", "silent since 1:4"))
    append(folder, step_line(30, time_s=104.0))  # a gap of 100 s is this run's custom
    quiet(folder, 95)
    assert look(watch)["state"] == "running"
    (folder / "stopped.json").write_text('{"step": 30, "signal": "SIGTERM"}')
    now = look(watch)
    assert now["state"] == "stopped"
    assert now["state_text"].startswith("stopped by SIGTERM at step 30")
    (folder / "stopped.json").unlink()
    append(folder, event("run_stop", status="aborted"), file="result_0.txt")
    assert look(watch)["state"] == "ended"
    append(folder, event("resumed"), file="result_0.txt")
    assert look(watch)["state"] == "running"
    for reached, target, text in (
        (1, 0.5, "target reached"),
        (0, 0.5, "target missed"),
        (0, None, "no target was set"),
    ):
        record = {"format": FORMAT, "metrics": {"target_reached": reached}, "target_accuracy": target, "sessions": 2}
        (folder / "metrics.json").write_text(json.dumps(record))
        now = look(watch)
        assert now["state"] == "finished"
        assert now["state_text"].endswith(text)


@pytest.mark.parametrize("name", ["README.md", "."])
def test_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(UserError, match="metrics.jsonl"):
        RunWatch(tmp_path / name).poll()


def older(tree: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in tree.items() if name != "format"})


def test_a_run_of_an_older_form_is_refused_in_one_line(folder: Path) -> None:
    """While it goes and when it is done: its values would be read as if they were not set."""
    append(folder, step_line(10))
    (folder / "metrics.json").write_text(older(run_record().as_json()))
    done = script(folder, "--once")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "metrics.json was written before the settings were renamed (it has no format)" in done.stderr
    (folder / "metrics.json").unlink()
    (folder / "config.yaml").write_text("batch: {global_batch: 64}\ntrain: {seed: 3, target_accuracy: 0.5}\n")
    with pytest.raises(UserError, match=r"config\.yaml was written before the settings were renamed"):
        RunWatch(folder).poll()


def test_the_names_are_those_of_the_schema() -> None:
    """Of what a run writes nothing is read by another name."""
    names = {field.name for kind in (StepLine, EvaluationLine, SkippedLine) for field in fields(kind)}
    assert set(VALUE_READERS) <= names
    for kind in (StepLine, EvaluationLine):
        assert set(REQUIRED_VALUES[kind.kind]) <= {field.name for field in fields(kind)}


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_numbers(folder: Path) -> None:
    append(
        folder,
        *(step_line(step) for step in (10, 20)),
        eval_line(20, 0.3),
        step_line(30, data_ms=16.0, compute_imbalance=[1.4] * 10, loss=float("nan")),
        '{"kind": "skipped", "step": 29, "bad_step": 28, "ranks": [1]}\n',
    )
    (folder / "checkpoints/step-00000010").mkdir(parents=True)
    (folder / "checkpoints/step-00000010/complete.json").write_text("{}")
    (folder / "checkpoints/step-00000020").mkdir()  # being written
    now = look(RunWatch(folder))
    assert (now["name"], now["seed"], now["step"], now["max_steps"], now["samples"]) == ("made_up", 3, 30, 100, 1920)
    assert now["samples_per_s_overall"] == pytest.approx(64 * 30 / 6.0)
    assert now["remaining_at_most_s"] == pytest.approx(0.2 * 70)
    assert (now["data_share"], now["data_share_overall"]) == (pytest.approx(0.1), pytest.approx(0.04))  # of 160 ms
    assert now["exposed_share"] == pytest.approx(0.05)
    assert (now["imbalance_measured"], now["imbalance_measured_overall"]) == (pytest.approx(1.4), pytest.approx(1.2))
    assert now["checkpoint"]["step"] == 10
    assert (now["skipped"], now["skipped_last"]["bad_step"]) == (1, 28)
    assert now["losses"] == "█▁?"
    assert now["no_forecast"] == "no forecast: fewer than 4 evaluations"


@pytest.mark.parametrize("logged", [False, True])
def test_resumed_run_forgets_what_is_done_again(folder: Path, logged: bool) -> None:
    append(folder, *(step_line(step) for step in (10, 20, 30)), eval_line(20, 0.3), eval_line(30, 0.4))
    if logged:
        append(folder, event("run_start"), event("resumed"), file="result_0.txt")
    append(folder, step_line(25))
    now = look(RunWatch(folder))
    assert (now["step"], now["accuracy"], now["sessions"], len(now["losses"])) == (25, 0.3, 2, 3)


def test_resumes_at_the_last_line_are_in_the_log(folder: Path) -> None:
    append(folder, *(step_line(step) for step in (10, 20, 30)))
    append(folder, event("run_start"), event("resumed"), event("resumed"), file="result_0.txt")
    watch = RunWatch(folder)
    assert look(watch)["sessions"] == look(watch)["sessions"] == 3


def test_slow_rank_and_its_host(folder: Path) -> None:
    hosts = [{"rank": 1, "host": "node-b"}, {"rank": 0, "host": "node-a"}]
    (folder / "nodes.json").write_text(json.dumps(hosts))
    append(folder, *(step_line(step) for step in range(10, 410, 10)))
    now = look(RunWatch(folder))
    first = now["slowest"][0]
    assert (first["name"], first["share"], first["is_slow"]) == ("rank 1 (node-b)", 1.0, True)
    assert first["lost_s"] == pytest.approx(400 * 0.010)
    assert now["slow_text"].startswith(
        "slow: rank 1 (node-b) is the last in 100 % of log intervals, 9.1 % over the mean"
    )


def test_hosts_of_a_resumed_run(folder: Path) -> None:
    append(folder, step_line(10))
    watch = RunWatch(folder)
    for host in ("first", "second"):
        (folder / "nodes.json").write_text(json.dumps([{"rank": 0, "host": host}, {"rank": 1, "host": host}]))
        assert look(watch)["slowest"][0]["name"] == f"rank 1 ({host})"


def test_times_by_rank_are_used(folder: Path) -> None:
    lines = (step_line(step, data_ms_rank=[60.0, 2.0], exposed_ms_rank=[1.0, 40.0]) for step in range(10, 410, 10))
    append(folder, *lines)
    first = look(RunWatch(folder))["slowest"][0]
    assert (first["rank"], first["is_slow"]) == (0, True)  # computes faster, but its data comes late
    assert first["data_excess"] > first["excess"]


def test_ranks_that_were_given_unequal_work_are_not_judged(folder: Path) -> None:
    append(folder, *(step_line(step, imbalance=[1.3] * 10) for step in range(10, 410, 10)))
    now = look(RunWatch(folder))
    assert now["slowest"] == []
    assert now["slow_text"] == "not told: ranks were given unequal work"


def test_resumed_by_other_ranks(folder: Path) -> None:
    append(folder, *(step_line(step) for step in range(10, 210, 10)))
    append(folder, *(step_line(step, compute_ms=[100.0, 100.0, 130.0]) for step in range(210, 410, 10)))
    assert look(RunWatch(folder))["slowest"][0]["rank"] == 2


# ---- forecast -------------------------------------------------------------------------------------------------------


def evaluations(accuracies: list[float]) -> list[dict[str, Any]]:
    return [{"samples": 1000 * i, "accuracy": a, "time_s": 10.0 * i} for i, a in enumerate(accuracies, start=1)]


def test_forecast_on_a_line() -> None:
    rising = evaluations([0.1 + 0.02 * i for i in range(8)])  # the last: 0.24 at 8,000 samples
    found = forecast(rising, 0.29, 1000, 20_000)
    assert isinstance(found, dict)
    assert (found["samples"], found["within"]) == (11_000, True)  # 2.5 evaluations ahead are 3
    assert found["in_s"] == pytest.approx(30.0)
    assert found["time_s"] == pytest.approx(110.0)
    late = forecast(rising, 0.29, 1000, 9_000)
    assert isinstance(late, dict)
    assert not late["within"]


@pytest.mark.parametrize(
    ("accuracies", "target", "why"),
    [
        ([0.1, 0.2, 0.3], 0.5, "fewer than 4"),
        ([0.3, 0.3, 0.3, 0.3, 0.3], 0.5, "does not rise"),
        ([0.1, 0.2, 0.3, 0.4, 0.3, 0.4, 0.3, 0.4], 0.5, "does not rise"),
        ([0.4, 0.3, 0.2, 0.1], 0.5, "does not rise"),
        ([0.30, 0.31, 0.32, 0.33], 0.5, "further ahead"),
        ([0.1, 0.2, float("nan"), 0.3], 0.5, "fewer than 4"),
        ([0.1, 0.2, 0.3, 0.6], 0.5, "reached"),
        ([], 0.5, "fewer than 4"),
        ([0.1], None, "no target"),
    ],
)
def test_no_forecast(accuracies: list[float], target: float | None, why: str) -> None:
    found = forecast(evaluations(accuracies), target, 1000)
    assert isinstance(found, str)
    assert why in found


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 7.0, float("nan")]) == "▁█?"
    assert sparkline([float(i) for i in range(1000)], 8) == "▁▂▃▄▅▆▇█"


# ---- the script -----------------------------------------------------------------------------------------------------


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def test_once_and_json(folder: Path) -> None:
    append(folder, *(step_line(step) for step in (10, 20)), eval_line(20, 0.3), step_line(30, loss=float("nan")))
    done = script(folder, "--once")
    assert (done.returncode, done.stderr) == (0, "")
    for shown in ("made_up, seed 3", "running", "30 of 100", "0.3000 at step 20", "no forecast"):
        assert shown in done.stdout
    done = script(folder, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    now = json.loads(done.stdout, parse_constant=pytest.fail)
    assert (now["step"], now["loss"], now["state"]) == (30, None, "running")


def test_once_is_clear_about_a_wrong_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    for wrong in (tmp_path, tmp_path / "absent", tmp_path / "x"):
        done = script(wrong, "--once")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


# ---- files of anyone ------------------------------------------------------------------------------------------------

WRONG = [
    math.inf, -math.inf, math.nan, 1e308, -1e308, 10**4000, -1, 0, "text", "\x1b[2J" * 50_000, "[/]", [], {}, None, True,
    [["x"]], [1e308] * 10, [-1] * 10, [1.0] * 3, ["a", "b"], [{"rank": 10**12, "host": "a"}], [{"rank": 0, "host": 1}],
]  # fmt: skip


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("kind", ["step", "eval", "skipped", "unknown"])
def test_values_of_another_kind_in_a_line(folder: Path, kind: str, value: Any) -> None:
    """Each value of each line in turn: the line is read, or left out and counted, and what is printed is short and plain."""
    good = {
        "step": json.loads(step_line(25, data_ms_rank=[1.0, 2.0], exposed_ms_rank=[1.0, 2.0], lr=0.1, grad_norm=1.0)),
        "eval": json.loads(eval_line(20, 0.3)),
        "skipped": {"kind": "skipped", "step": 29, "bad_step": 28, "ranks": [1]},
        "unknown": {"kind": "unknown", "step": 0},
    }[kind]
    append(folder, *(step_line(step) for step in (10, 20)), *(eval_line(step, 0.01 * step) for step in range(1, 8)))
    append(
        folder, *(json.dumps({**good, name: value}) + "\n" for name in good), json.dumps(value) + "\n", step_line(30)
    )
    now = look(RunWatch(folder))
    assert now["step"] >= 30
    assert_plain(now)


def assert_plain(now: dict[str, Any]) -> None:
    out = io.StringIO()
    Console(file=out, width=200).print(watch_script.table(now))
    json.dumps(watch_script.strict(now), allow_nan=False)
    for text in (out.getvalue(), watch_script.line(now)):
        assert len(text) < 8000
        assert not any(ord(character) < 32 for character in text.replace("\n", ""))


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("config.yaml", "run"), ("config.yaml", "run.name"), ("config.yaml", "train.seed"), ("config.yaml", "train.max_steps"),
        ("config.yaml", "evaluation.target_accuracy"), ("config.yaml", "evaluation.every_samples"),
        ("config.yaml", "batch.global_batch_size"), ("metrics.json", "metrics"), ("metrics.json", "sessions"),
        ("metrics.json", "target_accuracy"), ("stopped.json", "step"), ("stopped.json", "signal"), ("nodes.json", ""),
        ("metrics.json", ""), ("stopped.json", ""), ("config.yaml", ""), ("result_0.txt", "metadata.status"),
        ("result_0.txt", "metadata"), ("result_0.txt", "key"),
    ],
)  # fmt: skip
def test_values_of_another_kind_beside_the_lines(folder: Path, file: str, path: str, value: Any) -> None:
    append(folder, *(step_line(step) for step in (10, 20)), *(eval_line(step, 0.01 * step) for step in range(1, 8)))
    tree: Any = {
        "config.yaml": yaml.safe_load(CONFIG),
        "metrics.json": {"format": FORMAT, "metrics": {}, "target_accuracy": 0.5, "sessions": 1},
        "stopped.json": {"step": 3, "signal": "SIGTERM"}, "nodes.json": [],
        "result_0.txt": {"key": "run_stop", "value": None, "metadata": {"status": "aborted"}},
    }[file]  # fmt: skip
    node, *keys = tree, *path.split(".")
    for key in keys[:-1]:
        node = node[key]
    if path:
        node[keys[-1]] = value
    text = json.dumps(tree if path else value) + "\n"
    (folder / file).write_text(f":::MLLOG {text}" if file == "result_0.txt" else text)
    if (file, path, value) == ("metrics.json", "", {}):
        with pytest.raises(UserError, match="it has no format"):
            look(RunWatch(folder))
    else:
        assert_plain(look(RunWatch(folder)))


@pytest.mark.parametrize(
    "file", ["config.yaml", "metrics.json", "stopped.json", "nodes.json", "metrics.jsonl", "result_0.txt"]
)
@pytest.mark.parametrize(
    "content", ["deep", "bytes", "!!bool x", "2026-13-45", "pipe", "folder", "/dev/zero", "sparse"]
)
def test_files_of_another_kind(folder: Path, file: str, content: str) -> None:
    """Left out, or refused in one line that names the file: never a traceback, never without end."""
    append(folder, step_line(10))
    path = folder / file
    path.unlink(missing_ok=True)
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    elif content == "/dev/zero":
        path.symlink_to(content)
    elif content == "sparse":
        with open(path, "wb") as out:
            out.truncate(1 << 40)
    else:
        data = {"deep": b'{"a":' + b"[" * 100_000, "bytes": b"\xff\x00{\n"}.get(content, content.encode())
        path.write_bytes(data + b"\n")
    if file in ("metrics.jsonl", "result_0.txt") and content in ("pipe", "folder", "/dev/zero", "sparse"):
        with pytest.raises(UserError, match=file):
            look(RunWatch(folder))
    else:
        assert_plain(look(RunWatch(folder)))


def test_names_are_no_markup_and_no_control_characters(tmp_path: Path) -> None:
    name = "[/] [bold]x\x1b[2J"
    folder = tmp_path / name.replace("/", "")
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"run": {"name": name}, "train": {"seed": 1}}))
    (folder / "nodes.json").write_text(json.dumps([{"rank": 0, "host": name}, {"rank": 1, "host": name}]))
    append(folder, *(step_line(step) for step in range(10, 410, 10)))
    (folder / "checkpoints/step-[x]").mkdir(parents=True)
    (folder / "checkpoints/step-[x]/complete.json").write_text("{}")
    for arguments in ((folder, "--once"), (f"{folder}-2", "--once"), (folder,)):
        if len(arguments) == 1:
            append(folder, event("run_stop", status=name), file="result_0.txt")
        done = script(*arguments)
        assert "Traceback" not in done.stderr
        assert "[bold]x" in done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr


def test_lines_left_out_are_counted(folder: Path) -> None:
    append(folder, step_line(10), step_line(20)[:40] + "\n", step_line(20, samples="many"), step_line(30))
    now = look(RunWatch(folder))
    assert (now["step"], now["lines_left_out"]) == (30, 2)
    assert ("lines left out", "2 of metrics.jsonl: cut off, or not as a run writes them") in watch_script.rows(now)


def test_follows_until_the_end_without_a_terminal(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), "--interval", "0.02"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("waiting")
        append(folder, step_line(10))
        assert process.stdout.readline().startswith("running | step 10 ")
        record = {"format": FORMAT, "metrics": {"target_reached": 1}, "target_accuracy": 0.5}
        (folder / "metrics.json").write_text(json.dumps(record))
        assert process.stdout.readline().startswith("finished: target reached | step 10 ")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_no_torch() -> None:
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); runpy.run_path({str(SCRIPT)!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
