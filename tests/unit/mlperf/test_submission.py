"""A package of ten runs: right ones of both divisions pass every checker of MLPerf, and each way to break one is reported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlperf_logging.mllog import constants
from support.paths import ROOT

from bert_fast.claims import claimed
from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.mlperf.compliance import check_log
from bert_fast.mlperf.convergence import judge, reference_point, reference_points
from bert_fast.mlperf.log import ResultLog
from bert_fast.mlperf.rules import INIT_LIMIT_S, check_init_time
from bert_fast.mlperf.submission import CheckRow, check_runs, check_submission, lay_out
from bert_fast.mlperf.system import FIELDS, STATUSES, collect_system, complete_system, read_given_fields, template
from bert_fast.model.checkpoints import google_variables
from bert_fast.run_folder import RUN

RULESET = "5.0.0"
PERSON = {"submitter": "org", "status": STATUSES[2], "system_name": "box", "host_networking_topology": "none"}


def write_log(path: Path, config: Config, samples: int = 2_500_000, ruleset: str = RULESET) -> Path:
    """The calls of a run, in its order (train/loop.py)."""
    log = ResultLog(path)
    log.submission(config)
    log.event(constants.CACHE_CLEAR, True)
    log.start(constants.INIT_START)
    log.hyperparameters(config)
    log.tensors((name for _, name in google_variables(24)), ruleset)
    log.end(constants.INIT_STOP)
    log.start(constants.RUN_START)
    log.event(constants.TRAIN_SAMPLES, 156_725_653)
    log.event(constants.EVAL_SAMPLES, 10_000)
    log.event("train_dataset_sha256", "a" * 64)
    log.event("eval_dataset_sha256", "b" * 64)
    for number, accuracy in enumerate((0.5, 0.7301), start=1):
        log.start(constants.BLOCK_START, first_epoch_num=samples * (number - 1) // 2, epoch_count=samples // 2)
        log.end(constants.BLOCK_STOP, first_epoch_num=samples * (number - 1) // 2)
        with log.interval(constants.EVAL_START, constants.EVAL_STOP, epoch_num=samples * number // 2):
            log.event(constants.EVAL_ACCURACY, accuracy, epoch_num=samples * number // 2)
        log.throughput(1000.0, number)
    log.end(constants.RUN_STOP, status=constants.SUCCESS, resumed=False)
    log.close()
    return path


@pytest.fixture
def make(tmp_path: Path, make_config: Callable[..., Config]) -> Callable[..., Path]:
    """`make(division, samples=..., edit={number: edit of the text})`: a laid-out package."""

    def build(
        division: str, samples: int = 2_500_000, edit: dict[int, Callable[[str], str]] | None = None,
        sources: Sequence[str] = ("main.py",),
    ) -> Path:  # fmt: skip
        logs = []
        for number in range(10):
            config = make_config(
                f"mlperf.division={division}", "optimizer.name=lamb", "mlperf.enabled=true", f"train.seed={number}",
                "batch.global_batch_size=448", "batch.micro_batch_size=448", "system.world_size=1",
                "evaluation.target_accuracy=0.72",
            )  # fmt: skip
            path = write_log(tmp_path / "logs" / f"{number}.txt", config, samples)
            text = path.read_text()
            if edit and number in edit:
                changed = edit[number](text)
                assert changed != text, "the edit must change the log"
                path.write_text(changed)
            logs.append(path)
        description = complete_system({}, PERSON, division, 1)
        (tmp_path / "code").mkdir(exist_ok=True)
        (tmp_path / "code" / "main.py").write_text("print()\n")
        return lay_out(
            logs, tmp_path / "out", organization="org", system="box", description=description,
            sources=[tmp_path / "code" / name for name in sources], root=tmp_path / "code", notes="how\n",
        )  # fmt: skip

    (tmp_path / "logs").mkdir()
    return build


def faults(rows: list[CheckRow]) -> dict[str, str]:
    return {row.check.removeprefix("box: "): row.detail for row in rows if row.passed is False}


@pytest.mark.parametrize("division", ["open", "closed"])
def test_a_right_package_passes_every_checker(make: Callable[..., Path], division: str) -> None:
    package = make(division)
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    rows, figures = check_submission(package, RULESET)
    assert faults(rows) == {}
    assert figures["package_passed"] == 1
    names = {row.check for row in rows}
    assert {"package checker", "result summarizer", "box: system description", "box: compliance checker"} <= names
    assert {
        "results/box/bert/result_9.txt",
        "systems/box.json",
        "benchmarks/bert/implementations/bert_fast/main.py",
    } <= {path.relative_to(package).as_posix() for path in before}
    after = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    assert after == before, "checking writes nothing into the package, so it can be checked again"


def test_a_closed_package_that_is_faster_than_the_reference_is_scaled(make: Callable[..., Path]) -> None:
    point = reference_point(448, RULESET)
    assert point is not None
    samples = 2_300_000
    rows, figures = check_submission(make("closed", samples), RULESET)
    assert faults(rows) == {}
    score = next(row.detail for row in rows if row.check == "box: score")
    assert f"x {point.mean / samples:.5f} by the reference" in score
    minutes = float(score.split(" min")[0])
    assert figures["minutes/box"] == pytest.approx(minutes * point.mean / samples, rel=0.2, abs=1e-3)


def test_a_closed_package_that_is_too_fast_fails(make: Callable[..., Path]) -> None:
    found = faults(check_submission(make("closed", 2_000_000), RULESET)[0])
    assert "2,000,000 samples are fewer than the 2,274,732" in found["samples to converge"]
    assert {"RCP checker", "package checker"} <= set(found)


# ---- ten ways to break one log --------------------------------------------------------------------------------------


def without(key: str) -> Callable[[str], str]:
    return lambda text: "".join(line for line in text.splitlines(True) if f'"key": "{key}"' not in line)


def valued(key: str, value: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        return "".join(
            re.sub(r'"value": [^,]+,', f'"value": {value},', line) if f'"key": "{key}"' in line else line
            for line in text.splitlines(True)
        )

    return edit


def swapped(text: str) -> str:
    lines = text.splitlines(True)
    a, b = (next(n for n, line in enumerate(lines) if f'"key": "{key}"' in line) for key in ("init_stop", "run_start"))
    lines[a], lines[b] = lines[b], lines[a]
    return "".join(lines)


def doubled(text: str) -> str:
    line = next(line for line in text.splitlines(True) if '"key": "global_batch_size"' in line)
    return text + line.replace("448", "449")


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "missing key": (without("opt_lamb_beta_1"), "compliance checker"),
    "missing cache_clear": (without("cache_clear"), "compliance checker"),
    "wrong order": (swapped, "compliance checker"),
    "bad accuracy": (valued("eval_accuracy", "0.7199"), "compliance checker"),
    "NaN": (valued("eval_accuracy", "NaN"), "compliance checker"),
    "duplicate seed": (valued("seed", "4"), "seeds"),
    "no seed": (without("seed"), "seeds"),
    "another batch": (valued("global_batch_size", "896"), "one setting"),
    "two batches": (doubled, "compliance checker"),
    "cut short": (lambda text: text[: len(text) * 2 // 3], "readable"),
    "empty": (lambda text: "", "readable"),
    "success below the target": (valued("eval_accuracy", "0.1"), "accuracy"),
    "an accuracy that is none": (valued("eval_accuracy", "null"), "readable"),
    "a batch of nothing": (valued("global_batch_size", "0"), "readable"),
    "a line that is no event": (lambda text: text + ":::MLLOG 5\n", "readable"),
    "samples that are none": (lambda text: text.replace('"epoch_num": 1250000', '"epoch_num": "many"'), "readable"),
    "another data set": (valued("eval_dataset_sha256", '"c"'), "one setting"),
    "resumed": (lambda text: text.replace('"key": "block_start"', '"key": "resumed"', 1), "never resumed"),
    "garbage": (lambda text: text.replace('{"namespace"', "{namespace", 3), "readable"),
}


@pytest.mark.parametrize("name", ["results/box/bert/result_7.txt", "systems/box.json"])
def test_a_package_with_a_file_without_end_is_refused_at_once(make: Callable[..., Path], name: str) -> None:
    package = make("open")
    path = package / name
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"{path.name} is no regular file"):
        check_submission(package, RULESET)
    path.unlink()
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=f"{path.name} has 1,048,576 MiB"):
        check_submission(package, RULESET)


@pytest.mark.parametrize("division", ["closed", "open"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_log_is_reported_with_its_name(make: Callable[..., Path], name: str, division: str) -> None:
    edit, check = BROKEN[name]
    if division == "open" and name in ("missing key", "bad accuracy", "two batches"):
        return  # no fault of this kind in the open division
    package = make(division, edit={7: edit})
    rows, found_division = check_runs(package / "results/box/bert", RULESET)
    found = faults(rows)
    assert found_division == division
    assert check in found, found
    assert "result_7.txt" in found[check]


def test_one_run_of_ten_may_miss_the_target_and_two_may_not(make: Callable[..., Path]) -> None:
    def aborted(text: str) -> str:
        return text.replace('"status": "success"', '"status": "aborted"').replace("0.7301", "0.6")

    for count, passed in ((1, True), (2, False)):
        rows, _ = check_runs(make("open", edit=dict.fromkeys(range(count), aborted)) / "results/box/bert", RULESET)
        row = next(row for row in rows if row.check == "box: converged")
        assert row.passed is passed
        assert "result_0.txt" in row.detail


def test_one_broken_log_fails_the_package_though_the_checker_forgives_one(make: Callable[..., Path]) -> None:
    rows, figures = check_submission(make("open", edit={3: without("cache_clear")}), RULESET)
    found = faults(rows)
    assert "result_3.txt" in found["compliance checker"]
    assert "package checker" not in found, "MLPerf's accepts one under its scoring"
    assert figures["package_passed"] == 0


def test_nine_results_are_refused_or_reported(make: Callable[..., Path], tmp_path: Path) -> None:
    package = make("open")
    (package / "results/box/bert/result_4.txt").unlink()
    found = faults(check_submission(package, RULESET)[0])
    assert found["10 results"] == "result_4.txt is missing"
    assert "package checker" in found
    logs = sorted((package / "results/box/bert").glob("*.txt"))
    with pytest.raises(UserError, match="a package has 10 results and 9 were given"):
        lay_out(
            logs, tmp_path / "new", organization="o", system="s", description={}, sources=[], root=tmp_path, notes=""
        )


def test_a_package_without_a_system_description(make: Callable[..., Path]) -> None:
    package = make("open")
    (package / "systems/box.json").unlink()
    found = faults(check_submission(package, RULESET)[0])
    assert found["system description"] == "systems/box.json is missing"
    assert "package checker" in found


def test_no_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder of the organization"):
        check_submission(tmp_path, RULESET)


def test_laying_out_again_replaces_what_was_laid_out_and_nothing_else(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    package = make("open")
    code = package / "benchmarks/bert/implementations/bert_fast"
    mine = [
        package / "results/box/bert/README.md",
        package / "results/mine.txt",
        code / "tuned/notes.md",
        code / "run.sh",
    ]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    (tmp_path / "code" / "old").mkdir()
    (tmp_path / "code" / "old" / "part.py").write_text("print()\n", encoding="utf-8")
    make("open", sources=["main.py", "old/part.py"])
    assert (code / "old/part.py").is_file()
    make("open")
    assert not (code / "old").exists(), "the code has this file no longer"
    assert all(path.read_text(encoding="utf-8") == "mine" for path in mine)
    assert len(list((package / "results/box/bert").glob("result_*.txt"))) == 10


@pytest.mark.parametrize("name", ["systems/box.json", "benchmarks/bert/implementations/bert_fast/README.md"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_of_the_users_is_not_laid_over(make: Callable[..., Path], tmp_path: Path, name: str, when: str) -> None:
    """Made by hand, or changed by hand since."""
    if when == "after":
        make("open")
    path = tmp_path / "out/org" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine", encoding="utf-8")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=f"{re.escape(name)} is not as this command wrote it; move it away"):
        make("open")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


# ---- older rulesets, convergence points, system descriptions --------------------------------------------------------


@pytest.mark.parametrize("ruleset", ["1.1.0", "2.0.0", "2.1.0", "4.1.0", "5.0.0"])
def test_a_closed_log_passes_older_rulesets(tmp_path: Path, make_config: Callable[..., Config], ruleset: str) -> None:
    config = make_config(
        "mlperf.enabled=true", "mlperf.division=closed", "optimizer.name=lamb", f"mlperf.ruleset={ruleset}"
    )
    verdict = check_log(write_log(tmp_path / "result_0.txt", config, ruleset=ruleset), ruleset)
    assert verdict.passed, verdict.text


def test_published_reference_points() -> None:
    points = reference_points(RULESET)
    assert sorted(points) == [448, 4608, 6144, 6912, 12_288, 13_056, 16_384], "pruned"
    assert len(reference_points(RULESET, pruned=False)) == 13
    assert (round(points[448].mean), round(points[448].least)) == (2_414_421, 2_274_732)
    between = reference_point(768, RULESET)
    assert between is not None
    assert (round(between.mean), between.kind) == (2_443_934, "interpolated")
    assert between.least == pytest.approx(2_306_738, abs=2)
    assert reference_point(64, RULESET).global_batch_size == 448  # type: ignore[union-attr]
    assert reference_point(100_000, RULESET) is None
    with pytest.raises(UserError, match="has no reference convergence points"):
        reference_points("0.7.0")


def test_judging_runs() -> None:
    def of(samples: list[Any]) -> tuple[bool, float]:
        verdict = judge(samples, 448, RULESET)
        return verdict.passed, verdict.scale

    assert of([2_500_000] * 10) == (True, 1.0)
    assert of([2_500_000] * 9 + [None]) == (True, 1.0)
    assert of([2_500_000] * 8 + [None, None])[0] is False
    assert of([2_300_000] * 10) == (True, pytest.approx(2_414_421.33 / 2_300_000))
    assert of([2_200_000] * 10)[0] is False
    assert judge([2_932_736] * 10, 16_384, RULESET).passed is False, "the open ADAM point is no closed result"


def test_a_description_of_this_machine_is_complete(tmp_path: Path) -> None:
    description = complete_system(collect_system(), PERSON, "open", 4)
    assert list(description) == list(FIELDS)
    assert len(FIELDS) == 33
    assert all(isinstance(value, str) for value in description.values())
    assert description["number_of_nodes"] == "4"
    assert int(description["host_processor_vcpu_count"]) >= 1
    (tmp_path / "s.yaml").write_text(template(collect_system()))
    assert set(read_given_fields(tmp_path / "s.yaml")).isdisjoint(PERSON), "blanks stay blank"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"submitter": "", "system_name": "  "}, "missing submitter, system_name; write them in the YAML"),
        ({"submitter": None, "status": None}, "missing submitter, status; write them in the YAML"),
        ({"status": "onprem"}, "status 'onprem' must be one of: Available on-premise;"),
        ({"accelerators_per_node": "eight"}, "accelerators_per_node 'eight' must be a whole number"),
        ({"coolness": 3}, "unknown field coolness; known: submitter,"),
        ({"division": "closed"}, "division 'closed' and the logs say 'open'"),
    ],
)
def test_bad_descriptions(change: dict[str, Any], message: str) -> None:
    person = {name: value for name, value in {**PERSON, **change}.items() if value is not None}
    with pytest.raises(UserError, match=re.escape(message)):
        complete_system({}, person, "open", 1)


def test_initialisation_has_a_limit() -> None:
    check_init_time(INIT_LIMIT_S["closed"], "closed")
    check_init_time(INIT_LIMIT_S["closed"] + 1, "open")
    with pytest.raises(UserError, match="took 31 minutes and mlperf.division=closed allows 30"):
        check_init_time(31 * 60, "closed")


# ---- the command ----------------------------------------------------------------------------------------------------


def submit(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/submit.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_command_collects_logs_and_says_what_fails(make: Callable[..., Path], tmp_path: Path) -> None:
    logs = make("open") / "results/box/bert"
    (tmp_path / "s.yaml").write_text("\n".join(f"{name}: {value}" for name, value in PERSON.items()))
    arguments = ("--system", tmp_path / "s.yaml", "--out", tmp_path / "sub", "--json", tmp_path / "v.json")
    done = submit("--logs", logs, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every check passed" in done.stdout
    assert json.loads((tmp_path / "v.json").read_text())["metrics"]["package_passed"] == 1
    package = tmp_path / "sub/org"
    assert (package / "benchmarks/bert/implementations/bert_fast/run_pretraining.py").is_file()
    (package / "results/box/bert/result_2.txt").unlink()
    again = submit("--check", package)
    assert again.returncode == 1
    assert "FAILED box: 10 results: result_2.txt is missing" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logs", "nowhere"], "--system FILE is missing"),
        (["--logs", "nowhere", "--system", "none.yaml"], "none.yaml does not exist; make one with --describe"),
        (["--check", "nowhere"], "nowhere: no results/<system>/bert in it"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = submit(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_finished_seeds_of_another_config_are_refused_and_stopped_ones_run_anew(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("\n".join(f"{name}: {value}" for name, value in PERSON.items()))
    folder = tmp_path / "out/runs/seed-0"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    (folder / "config.yaml").write_text("run: {name: other}\n")
    arguments = ("--config", ROOT / "configs/mini_cpu.yaml", "--system", tmp_path / "s.yaml", "--out", tmp_path / "out")
    done = submit(*arguments)
    assert done.returncode == 2
    assert "seed-0 holds a run of another config" in done.stderr
    for path in folder.iterdir():
        path.unlink()
    with claimed(folder, RUN):
        (folder / "result_0.txt").write_text("a stopped run's")
        (folder / "NOTES.md").write_text("mine")
    again = submit(*arguments, "data.train=nowhere")
    assert "no data at nowhere" in again.stderr, "the run itself was tried"
    assert not (folder / "result_0.txt").exists()
    assert (folder / "NOTES.md").read_text() == "mine"
    (folder / ".bert_fast.json").unlink()
    again = submit(*arguments, "data.train=nowhere")
    assert "seed-0 holds files that are not a run's (NOTES.md)" in again.stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--runs", "9"], "--runs 9: a package has 10 results"),
        (["--name", "a/b"], "system 'a/b' must begin with a letter"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_the_runs(tmp_path: Path, extra: list[str], message: str) -> None:
    (tmp_path / "s.yaml").write_text("\n".join(f"{name}: {value}" for name, value in PERSON.items()))
    done = submit(
        "--config", ROOT / "configs/mini_cpu.yaml", "--system", tmp_path / "s.yaml", "--out", tmp_path / "out", *extra
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
