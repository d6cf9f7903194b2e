"""Result logs that MLPerf's own checker accepts, and logs broken in one way each that it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlperf_logging.mllog import constants

from bert_fast.config import Config
from bert_fast.mlperf.compliance import CheckerVerdict, check_log
from bert_fast.mlperf.log import ResultLog
from bert_fast.mlperf.rules import RULESET, TARGET_ACCURACY, evaluation_interval

Edit = Callable[[list[str]], list[str]]


def write_log(path: Path, config: Config, accuracies: tuple[float, ...] = (0.5, 0.7301)) -> Path:
    """The calls of a run, in its order (train/loop.py)."""
    log = ResultLog(path)
    log.submission(config)
    log.event(constants.CACHE_CLEAR, False)
    log.start(constants.INIT_START)
    log.hyperparameters(config)
    log.end(constants.INIT_STOP)
    log.start(constants.RUN_START)
    log.event(constants.TRAIN_SAMPLES, 1000)
    log.event(constants.EVAL_SAMPLES, 100)
    for number, accuracy in enumerate(accuracies):
        log.start(constants.BLOCK_START, first_epoch_num=32 * number, epoch_count=32)
        log.end(constants.BLOCK_STOP, first_epoch_num=32 * number)
        with log.interval(constants.EVAL_START, constants.EVAL_STOP, epoch_num=32 * (number + 1)):
            log.event(constants.EVAL_ACCURACY, accuracy, epoch_num=32 * (number + 1))
    log.end(constants.RUN_STOP, status=constants.SUCCESS, resumed=False)
    log.close()
    return path


@pytest.fixture
def config_of(make_config: Callable[..., Config]) -> Callable[[str], Config]:
    return lambda division: make_config(f"mlperf.division={division}", "optimizer.name=lamb", "mlperf.enabled=true")


def checked(path: Path, config: Config, edit: Edit | None = None, **values: Any) -> CheckerVerdict:
    write_log(path, config, **values)
    if edit:
        before = path.read_text().splitlines()
        after = edit(list(before))
        assert after != before, "the edit must change the log"
        path.write_text("\n".join(after) + "\n")
    return check_log(path, RULESET)


def without(key: str) -> Edit:
    return lambda lines: [line for line in lines if f'"key": "{key}"' not in line]


def swapped(first: str, second: str) -> Edit:
    def edit(lines: list[str]) -> list[str]:
        a, b = (next(i for i, line in enumerate(lines) if f'"key": "{key}"' in line) for key in (first, second))
        lines[a], lines[b] = lines[b], lines[a]
        return lines

    return edit


def with_value(key: str, value: str) -> Edit:
    return lambda lines: [
        re.sub(r'"value": [^,]+,', f'"value": {value},', line) if f'"key": "{key}"' in line else line for line in lines
    ]


# ---- logs that pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("division", ["open", "closed"])
def test_a_log_of_either_division_passes(tmp_path: Path, config_of: Callable[[str], Config], division: str) -> None:
    verdict = checked(tmp_path / "result_0.txt", config_of(division))
    assert verdict.passed, verdict.text
    assert "SUCCESS" in verdict.text


def test_an_open_log_needs_no_closed_target(tmp_path: Path, config_of: Callable[[str], Config]) -> None:
    assert checked(tmp_path / "result_0.txt", config_of("open"), accuracies=(0.1, 0.36)).passed


def test_the_checker_leaves_nothing_behind(
    tmp_path: Path, config_of: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "result_0.txt", config_of("open"))
    assert check_log("result_0.txt", RULESET).passed, "a relative path is found"
    assert [p.name for p in tmp_path.iterdir()] == ["result_0.txt"]


# ---- logs that do not -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("division", "edit"),
    [
        ("open", without("run_stop")),
        ("open", without("eval_accuracy")),
        ("open", without("cache_clear")),
        ("open", swapped("run_start", "init_stop")),
        ("open", with_value("eval_accuracy", "NaN")),
        ("open", with_value("submission_benchmark", '"resnet"')),
        ("closed", without("opt_lamb_epsilon")),
        ("closed", without("start_warmup_step")),
        ("closed", without("train_samples")),
    ],
    ids=[
        "no run_stop", "no evaluation", "no cache_clear", "wrong order", "NaN accuracy", "other benchmark",
        "closed without epsilon", "closed without start_warmup_step", "no train_samples",
    ],
)  # fmt: skip
def test_broken_logs_fail(tmp_path: Path, config_of: Callable[[str], Config], division: str, edit: Edit) -> None:
    verdict = checked(tmp_path / "result_0.txt", config_of(division), edit)
    assert not verdict.passed, verdict.text


def test_a_closed_log_below_the_target_fails(tmp_path: Path, config_of: Callable[[str], Config]) -> None:
    assert not checked(
        tmp_path / "result_0.txt", config_of("closed"), accuracies=(0.5, TARGET_ACCURACY - 0.0001)
    ).passed


def test_an_empty_log_fails(tmp_path: Path) -> None:
    (tmp_path / "result_0.txt").write_text("")
    assert not check_log(tmp_path / "result_0.txt", RULESET).passed


# ---- the log itself -------------------------------------------------------------------------------------------------


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line.split(":::MLLOG ", 1)[1]) for line in path.read_text().splitlines()]


def test_every_closed_hyperparameter_is_logged_once_with_the_configs_value(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config(
        "optimizer.name=lamb", "optimizer.lr=0.0033", "optimizer.beta1=0.75", "optimizer.beta2=0.9", "optimizer.eps=1e-6",
        "optimizer.weight_decay=0.0166629", "schedule.warmup_steps=290", "schedule.start_warmup_step=-100",
        "schedule.total_steps=600", "schedule.end_lr=1e-5", "schedule.power=0.5", "batch.global_batch_size=48",
        "batch.gradient_accumulation_steps=6", "train.seed=7", "communication.max_norm=2.0",
    )  # fmt: skip
    logged = entries(write_log(tmp_path / "log", config))
    expected = {
        "seed": 7, "global_batch_size": 48, "gradient_accumulation_steps": 6, "max_sequence_length": 32, "opt_name": "lamb",
        "opt_base_learning_rate": 0.0033, "opt_end_learning_rate": 1e-5, "opt_epsilon": 1e-6, "opt_lamb_epsilon": 1e-6,
        "opt_lamb_beta_1": 0.75, "opt_lamb_beta_2": 0.9, "opt_lamb_weight_decay_rate": 0.0166629,
        "opt_learning_rate_warmup_steps": 290, "num_warmup_steps": 290, "start_warmup_step": -100,
        "opt_learning_rate_training_steps": 600, "opt_lamb_learning_rate_decay_poly_power": 0.5,
        "opt_gradient_clip_norm": 2.0,
    }  # fmt: skip
    for key, value in expected.items():
        assert [entry["value"] for entry in logged if entry["key"] == key] == [value], key


def test_an_open_log_has_what_the_optimizer_and_the_decay_read(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    config = make_config(
        "optimizer.name=pytorch_optimizer", "optimizer.class_name=SOAP", "optimizer.arguments={betas: [0.8, 0.95]}",
        "schedule.decay=cosine", "mlperf.division=open", "averaging.method=last",
    )  # fmt: skip
    logged = {entry["key"]: entry["value"] for entry in entries(write_log(tmp_path / "log", config))}
    assert logged["opt_name"] == "SOAP"
    assert logged["optimizer"]["arguments"] == {"betas": [0.8, 0.95]}
    assert logged["schedule"]["decay"] == "cosine"
    assert logged["averaging"]["method"] == "last"
    unread = {"opt_epsilon", "opt_lamb_beta_1", "opt_lamb_beta_2", "opt_lamb_learning_rate_decay_poly_power"}
    assert not unread & set(logged)


def test_lines_carry_time_file_and_metadata(tmp_path: Path, config_of: Callable[[str], Config]) -> None:
    logged = entries(write_log(tmp_path / "log", config_of("open")))
    times = [entry["time_ms"] for entry in logged]
    assert times == sorted(times)
    accuracy = [entry for entry in logged if entry["key"] == "eval_accuracy"]
    assert [(entry["value"], entry["metadata"]["epoch_num"]) for entry in accuracy] == [(0.5, 32), (0.7301, 64)]
    assert all(Path(entry["metadata"]["file"]).name.startswith("test_log") for entry in accuracy), "the caller's line"
    stop = next(entry for entry in logged if entry["key"] == "run_stop")
    assert stop["metadata"]["status"] == "success"
    assert stop["event_type"] == "INTERVAL_END"


def test_resumed_logs_are_appended_to(tmp_path: Path) -> None:
    for append in (False, True, True):
        log = ResultLog(tmp_path / "log", append=append)
        log.event("key", 1)
        log.close()
    assert len(entries(tmp_path / "log")) == 3
    ResultLog(tmp_path / "log").close()
    assert (tmp_path / "log").read_text() == ""


def test_a_log_cut_short_goes_on_and_ends_once(tmp_path: Path) -> None:
    """By a kill in a line, and by one after the end of the run was logged and before its last files."""
    path = tmp_path / "log"
    log = ResultLog(path)
    log.start(constants.RUN_START)
    log.end(constants.RUN_STOP, status=constants.SUCCESS)
    log.close()
    with open(path, "a", encoding="utf-8") as file:
        file.write(':::MLLOG {"key": "eval_acc')
    log = ResultLog(path, append=True)
    log.event("resumed", 5)
    log.end(constants.RUN_STOP, status=constants.SUCCESS)
    log.close()
    assert [entry["key"] for entry in entries(path)] == [constants.RUN_START, "resumed", constants.RUN_STOP]


def test_two_logs_do_not_mix(tmp_path: Path) -> None:
    """mllog keeps one logger a process; ours are their own."""
    first, second = ResultLog(tmp_path / "first"), ResultLog(tmp_path / "second")
    first.event("one", 1)
    second.event("two", 2)
    assert [entry["key"] for entry in entries(tmp_path / "first")] == ["one"]
    assert [entry["key"] for entry in entries(tmp_path / "second")] == ["two"]
    first.close()
    second.close()


def test_other_ranks_write_nothing(
    tmp_path: Path, config_of: Callable[[str], Config], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    log = ResultLog(None)
    log.submission(config_of("open"))
    with log.interval("eval_start", "eval_stop", epoch_num=1):
        log.event("x", 1)
    log.close()
    assert list(tmp_path.glob("*.txt")) == []
    assert capsys.readouterr().out == ""


# ---- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "interval"),
    [
        (256, 150_000), (448, 150_000), (768, 150_000), (2048, 150_000), (3072, 175_000), (4096, 175_000),
        (4608, 200_000), (8192, 225_000), (12_288, 275_000), (13_888, 300_000), (16_384, 325_000),
    ],
)  # fmt: skip
def test_evaluation_interval_of_published_batches(batch: int, interval: int) -> None:
    assert evaluation_interval(batch) == interval


def test_constants_of_the_benchmark() -> None:
    assert (RULESET, TARGET_ACCURACY) == ("5.0.0", 0.720)
