"""Runs of a search: real ones in this process, and programs that are followed, ended and read."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.paths import ROOT
from support.run_files import evaluation_line
from support.tuning import make_study

from bert_fast import claims
from bert_fast.config import Config, as_plain
from bert_fast.data import store as store_module
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode, of_signal
from tuning import trial
from tuning.journal import JOURNAL
from tuning.outcome import CurvePoint
from tuning.study_file import Study
from tuning.trial import STOP_SIGNALS, AsProgram, DivergedError, InProcess, check_runs, program_of
from tuning.workers import StopRequest, work

optuna = pytest.importorskip("optuna")
MakeConfig = Callable[..., Config]
LR = {"low": 1e-3, "high": 1e-2, "log": True}


def go_on(_point: CurvePoint) -> bool:
    return False


def tiny_study(folder: Path, config: Config, **changes: Any) -> Study:
    """A study of real runs over the tiny stores: 8 samples a step, an evaluation every 4 steps."""
    plain = as_plain(config)
    plain["run"]["folder"] = None
    base = folder / "base.yaml"
    base.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return make_study(
        folder,
        **{
            "base": str(base), "set": {}, "batches": {8: {}}, "cap_samples": 96, "trials": 2, "target": 0.9,
            "contestants": {"adamw": {"set": {"optimizer.name": "adamw"}, "space": {"optimizer.lr": LR}}},
            **changes,
        },
    )  # fmt: skip


def folders_left() -> set[str]:
    import tempfile

    return {path.name for path in Path(tempfile.gettempdir()).glob("bert_fast-trial-*")}


# ---- in this process ------------------------------------------------------------------------------------------------------


def test_a_real_run_to_its_cap(make_config: MakeConfig) -> None:
    before, log, seen = folders_left(), io.StringIO(), list[CurvePoint]()
    outcome = InProcess(log)(make_config("train.max_steps=12"), lambda point: bool(seen.append(point)))
    assert (outcome.steps, outcome.samples, outcome.pruned) == (12, 96, False)
    assert outcome.curve == seen
    assert [point.samples for point in seen] == [32, 64, 96]
    assert all(0 <= point.accuracy <= 1 for point in seen)
    assert 0 < seen[0].seconds < seen[1].seconds <= outcome.seconds
    assert outcome.step_ms > 0
    assert 0 < outcome.optimizer_ms < outcome.step_ms
    assert "step" in log.getvalue()
    assert folders_left() == before


def test_the_same_config_gives_the_same_curve(make_config: MakeConfig) -> None:
    config, run = make_config("train.max_steps=12"), InProcess(io.StringIO())
    curves = [[point.accuracy for point in run(each, go_on).curve] for each in (config, config)]
    assert curves[0] == curves[1]
    losses = InProcess(io.StringIO())(make_config("train.max_steps=12", "train.seed=5"), go_on)
    assert [point.accuracy for point in losses.curve] != curves[0]


def test_it_ends_where_it_is_told_to(make_config: MakeConfig) -> None:
    outcome = InProcess(io.StringIO())(make_config("train.max_steps=12"), lambda point: point.samples >= 64)
    assert (outcome.samples, outcome.pruned) == (64, True)
    assert len(outcome.curve) == 2


def test_it_ends_at_the_target(make_config: MakeConfig) -> None:
    config = make_config("train.max_steps=12", "evaluation.target_accuracy=0.0001", "optimizer.lr=0.01")
    outcome = InProcess(io.StringIO())(config, go_on)
    assert outcome.samples < 96
    assert not outcome.pruned
    assert outcome.value(0.0001, 96)[1] is False


def test_many_runs_leave_nothing_behind(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads, files, handlers, claims: as after the first. Each store is opened once."""
    opened = []
    real = trial.Store

    def counted(folder: str) -> Any:
        opened.append(folder)
        return real(folder)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where no other search has its folders
    monkeypatch.setattr(claims, "TOUCH_EVERY_S", 0.01)  # after which a released claim's thread ends
    monkeypatch.setattr(trial, "Store", counted)
    monkeypatch.setattr(store_module, "Store", counted)
    run, config = InProcess(io.StringIO()), make_config()
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    run(config, go_on)

    def state() -> tuple[int, int, set[str], Any]:
        for thread in threading.enumerate():
            if thread.name == "claim":
                thread.join(5)
        files = len(list(Path("/proc/self/fd").iterdir()))
        return threading.active_count(), files, folders_left(), [signal.getsignal(number) for number in STOP_SIGNALS]

    first = state()
    assert first[3] == handlers
    for ends in (go_on, lambda _: True, go_on):
        run(config, ends)
    assert state() == first, [each.name for each in threading.enumerate()]
    with pytest.raises(DivergedError):
        run(make_config("optimizer.lr=1e30"), go_on)
    assert state() == first, [each.name for each in threading.enumerate()]
    with pytest.raises(ZeroDivisionError):
        run(config, lambda _: bool(1 / 0))
    assert state() == first, [each.name for each in threading.enumerate()]
    assert sorted(opened) == sorted({config.data.train, config.evaluation.data})


def test_a_diverging_run(make_config: MakeConfig) -> None:
    with pytest.raises(DivergedError, match="finite") as error:
        InProcess(io.StringIO())(make_config("optimizer.lr=1e30", "train.max_steps=40"), go_on)
    assert not error.value.outcome.pruned
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_it_and_reaches_the_worker(make_config: MakeConfig, number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]

    def signalled(_point: CurvePoint) -> bool:
        signal.raise_signal(number)
        return False

    with StopRequest() as stop, pytest.raises(KeyboardInterrupt), stop.breaking():
        InProcess(io.StringIO())(make_config("train.max_steps=40"), signalled)
    assert stop.number == number
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before


def test_several_ranks_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="execution=in_process runs one rank"):
        InProcess(io.StringIO())(make_config("system.world_size=2", "batch.micro_batch_size=4"), go_on)


def test_a_search_of_real_runs(make_config: MakeConfig, tmp_path: Path) -> None:
    from tuning.search import Search

    study = tiny_study(tmp_path, make_config(), cap_samples=64)
    assert work(study, tmp_path / "out") == ExitCode.OK
    search = Search(study, tmp_path / "out")
    assert search.is_complete
    for each in search.trials(study.cells[0]):
        record = each.user_attrs["outcome"]
        assert (record["samples"], record["steps"], record["censored"]) == (64, 8, True)
        assert [row[0] for row in record["curve"]] == [32, 64]
        assert each.value == record["value"] > 64
    (log,) = (tmp_path / "out/workers").glob("*.log")
    assert "step" in log.read_text(encoding="utf-8")


# ---- programs -------------------------------------------------------------------------------------------------------------

FAKE = """\
import json, signal, sys, time, yaml
from pathlib import Path
config = yaml.safe_load(Path(sys.argv[1]).read_text())
folder = Path(config["run"]["folder"]); folder.mkdir()
code = CODE
def stop(number, frame):
    (Path(__file__).parent / "stopped").write_text(str(number)); sys.exit(128 + number)
if DEAF:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, stop)
with open(folder / "metrics.jsonl", "a") as file:
    for line in LINES:
        file.write(line + "\\n"); file.flush()
        time.sleep(0.01)
print("a line of the run", flush=True)
if code == "wait":
    time.sleep(60)
if code:
    print("error: the loss is not finite at step 3", file=sys.stderr)
if isinstance(code, int) and code < 0:
    import os; os.kill(os.getpid(), -code)
sys.exit(code)
"""


def program(
    folder: Path, code: int | str = 0, accuracies: tuple[float, ...] = (0.1, 0.2), deaf: bool = False
) -> AsProgram:
    lines = [json.dumps(evaluation_line(25 * n, accuracy).as_json()) for n, accuracy in enumerate(accuracies, 1)]
    text = FAKE.replace("CODE", repr(code)).replace("LINES", repr(lines)).replace("DEAF", repr(deaf))
    (folder / "fake.py").write_text(text, encoding="utf-8")
    return AsProgram(io.StringIO(), lambda config: [sys.executable, str(folder / "fake.py"), str(config)])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "POLL_S", 0.02)


@pytest.mark.parametrize("code", [ExitCode.OK, ExitCode.TARGET_MISSED])
def test_a_program_to_its_end(make_config: MakeConfig, tmp_path: Path, quick: None, code: ExitCode) -> None:
    before, seen = folders_left(), list[CurvePoint]()
    outcome = program(tmp_path, int(code))(make_config(), lambda point: bool(seen.append(point)))
    assert [point.accuracy for point in seen] == [0.1, 0.2] == [point.accuracy for point in outcome.curve]
    assert outcome.steps == 50
    assert not outcome.pruned
    assert folders_left() == before


def test_a_program_is_ended_where_it_is_pruned(make_config: MakeConfig, tmp_path: Path, quick: None) -> None:
    outcome = program(tmp_path, "wait")(make_config(), lambda point: point.accuracy > 0.15)
    assert outcome.pruned
    assert len(outcome.curve) == 2
    assert (tmp_path / "stopped").read_text(encoding="utf-8") == str(int(signal.SIGTERM))


def test_a_program_that_does_not_end_is_killed(
    make_config: MakeConfig, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "STOP_S", 0.2)
    assert program(tmp_path, "wait", deaf=True)(make_config(), lambda _: True).pruned


def test_a_program_is_ended_with_its_worker(make_config: MakeConfig, tmp_path: Path, quick: None) -> None:
    """Another signal meanwhile does not leave it behind."""

    def signalled(_point: CurvePoint) -> bool:
        signal.raise_signal(signal.SIGUSR1)
        return False

    with StopRequest() as stop, pytest.raises(KeyboardInterrupt), stop.breaking():
        program(tmp_path, "wait")(make_config(), signalled)
    assert (tmp_path / "stopped").exists()


@pytest.mark.parametrize("code", [of_signal(signal.SIGTERM), of_signal(signal.SIGUSR1), -int(signal.SIGTERM)])
def test_a_program_that_was_stopped_is_no_result(
    make_config: MakeConfig, tmp_path: Path, quick: None, code: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        program(tmp_path, code)(make_config(), go_on)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ExitCode.TRAINING_ERROR, DivergedError), (ExitCode.USER_ERROR, UserError), (ExitCode.LOST_RANK, UserError),
        (ExitCode.BUG, UserError),
    ],
)  # fmt: skip
def test_a_program_that_fails(
    make_config: MakeConfig, tmp_path: Path, quick: None, code: ExitCode, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="^the loss is not finite at step 3$") as error:
        program(tmp_path, int(code))(make_config(), go_on)
    if isinstance(error.value, DivergedError):
        assert len(error.value.outcome.curve) == 2


def test_the_program_in_an_allocation_is_the_supervisor_which_never_requeues(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    config = Path("c.yaml")
    assert program_of(config) == [sys.executable, str(ROOT / "run_pretraining.py"), "--config", "c.yaml"]
    monkeypatch.setenv("SLURM_JOB_ID", "36")
    command = program_of(config)
    assert command[1:] == ["-m", "bert_fast.launch.supervise", "--no-requeue", "--config", "c.yaml"]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert program_of(config)[1] == str(ROOT / "run_pretraining.py")


@pytest.mark.slow
def test_a_real_program(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search whose trials are runs of two ranks, beside what it gives in this process with two virtual ranks."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    from tuning.search import Search

    found = []
    for name, settings in (
        ("run", {"system.world_size": 2, "batch.micro_batch_size": 4}),
        ("in_process", {"batch.virtual_ranks": 2, "batch.micro_batch_size": 4}),
    ):
        study = tiny_study(tmp_path, make_config(), set=settings, execution=name, trials=1, cap_samples=64)
        assert work(study, tmp_path / name) == ExitCode.OK
        search = Search(study, tmp_path / name)
        (each,) = search.trials(study.cells[0])
        assert each.state.name == "COMPLETE", each.user_attrs
        found.append(each.user_attrs["outcome"])
    assert found[0]["samples"] == found[1]["samples"] == 64
    accuracies = [[row[2] for row in record["curve"]] for record in found]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.02)


# ---- what is found before anything starts -----------------------------------------------------------------------------------


def package(class_name: str, **arguments: Any) -> dict[str, Any]:
    optimizer = {"name": "pytorch_optimizer", "class_name": class_name, "arguments": arguments}
    return {"contestants": {"one": {"set": {"optimizer": optimizer}, "space": {"optimizer.lr": LR}}}}


def test_a_study_that_can_run(make_config: MakeConfig, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_optimizer")
    check_runs(tiny_study(tmp_path, make_config(), **package("SOAP")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (package("Lionn"), "did you mean Lion"),
        (package("Lion", momentun=0.5), "momentun"),
        ({"set": {"data.train": "nowhere"}}, "no data at nowhere"),
    ],
)
def test_what_every_trial_would_fail_on(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(UserError) as error:
        check_runs(tiny_study(tmp_path, make_config(), **changes))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_package_that_is_not_installed(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match="one/all/8: .*pip install -c constraints.txt pytorch_optimizer"):
        check_runs(tiny_study(tmp_path, make_config(), **package("SOAP")))


def tune(*arguments: str) -> int:
    import tune as program  # scripts/tune.py

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tune.py", *arguments])
        patch.setattr(sys, "excepthook", sys.__excepthook__)
        try:
            return program.main()
        except SystemExit as end:
            return int(end.code or 0)


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        (["run"], package("Lionn"), "did you mean Lion"),
        (["worker"], package("Lion", momentun=0.5), "momentun"),
        (["run"], {"set": {"optimizer.name": "adamww"}}, "did you mean"),
        (["run", "--contestants", "adamw,soap"], {}, "no contestant soap"),
        (["run", "--trials", "0"], {}, "--trials"),
        (["run", "--workers", "many"], {}, "--workers"),
        (["final"], {"final": {"seeds": [1]}}, "nothing was searched"),
        (["final", "--part", "4/4"], {}, "4/4 is not of the form I/N"),
        (["final", "--part", "1"], {}, "1 is not of the form I/N"),
        (["final", "--part", "-1/4"], {}, "--part"),
        (["final", "--part", "0/0"], {}, "0/0"),
        (["report"], {}, "nothing was searched"),
    ],
)  # fmt: skip
def test_the_command_line_refuses(
    make_config: MakeConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    changes: dict[str, Any],
    said: str,
) -> None:
    """One line, exit code 2, and no folder."""
    from support.tuning import write_study

    base = tmp_path / "base.yaml"
    plain = as_plain(make_config())
    base.write_text(yaml.safe_dump(plain), encoding="utf-8")
    one = {"contestants": {"adamw": {"space": {"optimizer.lr": LR}}}}
    study = write_study(tmp_path, **{"base": str(base), "set": {}, "batches": {8: {}}, **one, **changes})
    command, *options = arguments
    assert tune(command, str(study), "--out", str(tmp_path / "out"), *options) == ExitCode.USER_ERROR
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert said in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_last_round_without_a_complete_trial(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, however many workers there would be."""
    from tuning.search import Search

    study = tiny_study(tmp_path, make_config(), final={"seeds": [1]})
    Search(study, tmp_path / "out")
    before = (tmp_path / "out" / JOURNAL).read_bytes()
    code = tune("final", str(study.path), "--out", str(tmp_path / "out"), "--workers", "2")
    assert code == ExitCode.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert "no complete trial yet" in line
    assert (tmp_path / "out" / JOURNAL).read_bytes() == before
    assert not (tmp_path / "out/final.jsonl").exists()


@pytest.mark.slow
def test_the_whole_command(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, the last round in two parts, the report."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    changes = {"final": {"seeds": [1, 2]}, "ablations": {"short": {"set": {"schedule.warmup_steps": 1}}}}
    study = tiny_study(tmp_path, make_config(), cap_samples=32, **changes)
    place = (str(study.path), "--out", str(tmp_path / "out"))
    assert tune("run", *place, "--workers", "2") == ExitCode.OK
    assert "2 of 2 trials" in capfd.readouterr().out
    assert tune("final", *place, "--workers", "2") == ExitCode.OK
    lines = (tmp_path / "out/final.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted((json.loads(line)["ablation"] or "", json.loads(line)["seed"]) for line in lines) == [
        ("", 1), ("", 2), ("short", 1), ("short", 2),
    ]  # fmt: skip
    assert tune("report", *place) == ExitCode.OK
    metrics = json.loads((tmp_path / "out/tune.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["trials/adamw"] == 2
