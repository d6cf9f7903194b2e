"""One training run of a search: in this process, or as a program of its own. Both give what an evaluation reaches them."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from bert_fast.claims import release
from bert_fast.config import Config, as_plain
from bert_fast.config.load import config_from_tree
from bert_fast.config.yaml_files import to_yaml
from bert_fast.data.store import Store
from bert_fast.errors import TrainingError, UserError
from bert_fast.exit_codes import ExitCode, of_signal
from bert_fast.launch.slurm import is_launched
from bert_fast.report.metrics import of_kind, read_metrics
from bert_fast.report.schema import EvaluationLine, StepLine, parse_line
from bert_fast.report.tail import Tail
from bert_fast.run_folder import METRICS_LINES, create_folder
from tuning.outcome import CurvePoint, Outcome
from tuning.study_file import Study

ROOT = Path(__file__).resolve().parents[2]
Watch = Callable[[CurvePoint], bool]  # told of each evaluation; True ends the run there
POLL_S = 0.5
STOP_S = 60.0  # for a program to end once it is asked to
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_STOPPED = {code for number in STOP_SIGNALS for code in (of_signal(number), -number)}  # exit codes of a stopped program


class DivergedError(Exception):
    """The run's loss or gradients were no longer finite: a property of its point."""

    def __init__(self, text: str, outcome: Outcome) -> None:
        super().__init__(text)
        self.outcome = replace(outcome, diverged=True)


class Run(Protocol):
    """How runs of a search are computed."""

    def __call__(self, config: Config, watch: Watch) -> Outcome:
        """Train to the target, to `train.max_steps`, or until `watch` is true.

        Raises:
            DivergedError: the loss or the gradients were not finite.
            Exception: the run failed.
            KeyboardInterrupt: a signal came.
        """


def check_runs(study: Study) -> None:
    """Find what every trial of a contestant would fail on: data that is missing, an optimizer that cannot be built.

    Where Slurm starts the runs, both are a matter of the nodes, and perhaps of a container; nothing is checked here then.

    Raises:
        UserError: one line with the contestant and how to fix it.
    """
    if study.file.execution == "run" and _is_in_allocation():
        return
    from bert_fast.model.bert import BertForPretraining
    from bert_fast.optim.build import build_optimizer
    from bert_fast.train.setup.inputs import check_inputs

    checked = []
    for cell in study.cells:
        config = cell.config({name: dimension.ends()[0] for name, dimension in cell.space.items()}, 0)
        if (config.optimizer, config.data, config.evaluation, config.checkpoint) in checked:
            continue
        checked.append((config.optimizer, config.data, config.evaluation, config.checkpoint))
        tiny = {"vocab_size": 16, "hidden_size": 8, "num_layers": 1, "num_heads": 1, "intermediate_size": 16}
        try:
            model = BertForPretraining(config.model.model_copy(update=tiny))
            build_optimizer(model.named_parameters(), config.optimizer)
            check_inputs(config)
        except UserError as error:
            raise UserError(f"{study.path}: {cell.name}: {error}") from None


def runner(study: Study, log: TextIO) -> Run:
    """What computes the runs of a study; `log` gets what they print."""
    return InProcess(log) if study.file.execution == "in_process" else AsProgram(log)


class StoreCache:
    """The data stores that a process has opened, each once."""

    def __init__(self) -> None:
        self._stores: dict[str, Store] = {}

    def __call__(self, folder: str) -> Store:
        if folder not in self._stores:
            self._stores[folder] = Store(folder)
        return self._stores[folder]


def point_of(line: EvaluationLine) -> CurvePoint:
    """An evaluation as a search keeps it."""
    return CurvePoint(line.samples, line.time_s, line.accuracy)


class InProcess:
    """Runs of one rank in this process, one after another: stores are opened once, torch is imported once."""

    def __init__(self, log: TextIO) -> None:
        """`log` gets what the runs print."""
        self._log, self._stores = log, StoreCache()

    def __call__(self, config: Config, watch: Watch) -> Outcome:
        """See `Run`."""
        with tempfile.TemporaryDirectory(prefix="bert_fast-trial-") as folder, redirect_stdout(self._log):
            try:
                return self._run(_quiet(config, Path(folder) / "run"), watch)
            finally:
                gc.collect()  # a run's hooks and tensors refer to each other: without this, several runs' lie in memory

    def _run(self, config: Config, watch: Watch) -> Outcome:
        from bert_fast.train.context import open_context
        from bert_fast.train.environment import join, needs_process_group
        from bert_fast.train.health.signals import HANDLED
        from bert_fast.train.run import run

        if config.system.world_size != 1 or needs_process_group(config):
            raise UserError(
                "execution=in_process runs one rank without a process group; set system.world_size: 1, or execution: run"
            )
        handlers = {number: signal.getsignal(number) for number in HANDLED}
        folder, started = create_folder(config, False, "search"), time.time()
        context = open_context(
            config,
            join(config),
            resume=False,
            on_lost=lambda _: None,
            store_of=self._stores,
            on_evaluation=lambda line: watch(point_of(line)),
        )
        try:
            summary = run(context, started)
        except TrainingError as error:
            context.metrics.close()
            raise DivergedError(str(error), outcome_of(folder, config, pruned=False)) from None
        finally:
            context.close()
            release(folder)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if context.stop.number:  # whoever handles it now hears of it
                signal.raise_signal(context.stop.number)
        if summary.outcome.status == "stopped":
            raise KeyboardInterrupt
        return outcome_of(folder, config, pruned=summary.outcome.status == "stopped early")


class AsProgram:
    """Runs as programs of their own: run_pretraining.py here, the supervisor of a Slurm job in an allocation."""

    def __init__(self, log: TextIO, command_of: Callable[[Path], list[str]] | None = None) -> None:
        """
        Args:
            log: gets what the runs print.
            command_of: the program that trains a config file, of the project if None.
        """
        self._log, self._command_of = log, command_of or program_of

    def __call__(self, config: Config, watch: Watch) -> Outcome:
        """See `Run`."""
        base = Path(config.run.results_dir) if os.environ.get("SLURM_JOB_ID") else None  # where all nodes can read it
        if base is not None:
            base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="bert_fast-trial-", dir=base) as temporary:
            folder, path, printed = (Path(temporary).absolute() / name for name in ("run", "config.yaml", "output.txt"))
            path.write_text(to_yaml(as_plain(_quiet(config, folder))), encoding="utf-8")
            with printed.open("wb") as output:
                process = subprocess.Popen(
                    self._command_of(path), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
                )
                try:
                    pruned = _follow(process, folder, watch)
                finally:
                    _end(process)
            lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
            self._log.writelines(f"{line}\n" for line in lines)
            self._log.flush()
            return _result(process.returncode, lines, folder, config, pruned)


def _is_in_allocation() -> bool:
    return bool(os.environ.get("SLURM_JOB_ID")) and not is_launched()


def program_of(config: Path) -> list[str]:
    """The program that trains a config, in the allocation of a Slurm job where this is one."""
    if _is_in_allocation():
        return [sys.executable, "-m", "bert_fast.launch.supervise", "--no-requeue", "--config", str(config)]
    return [sys.executable, str(ROOT / "run_pretraining.py"), "--config", str(config)]


def _follow(process: subprocess.Popen[bytes], folder: Path, watch: Watch) -> bool:
    """Wait for a run to end, telling `watch` of its evaluations. Returns whether it is to be ended here."""
    tail, is_over = Tail(folder / METRICS_LINES), False
    while not is_over:
        is_over = process.poll() is not None
        for text in tail.read()[1]:
            line = parse_line(text, METRICS_LINES)
            if isinstance(line, EvaluationLine) and watch(point_of(line)) and not is_over:
                return True
        if not is_over:
            time.sleep(POLL_S)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a program that still runs to end; end it if it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:  # also if a signal breaks off the wait
        if process.poll() is None:
            process.kill()
            process.wait()


def _result(code: int, lines: list[str], folder: Path, config: Config, pruned: bool) -> Outcome:
    """The outcome of a program by its exit code and what it printed. Raises what a `Run` raises."""
    if pruned or code in (ExitCode.OK, ExitCode.TARGET_MISSED):
        return outcome_of(folder, config, pruned)
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = errors[-1] if errors else f"the run ended with exit code {code}; its output is in the worker's log"
    if code == ExitCode.TRAINING_ERROR:
        raise DivergedError(text, outcome_of(folder, config, pruned=False))
    if code in _STOPPED:  # not by us: Slurm ends a job's tasks by themselves
        raise KeyboardInterrupt
    raise UserError(text)


def _quiet(config: Config, folder: Path) -> Config:
    """The same run without what a search does not read."""
    plain: dict[str, Any] = as_plain(config)
    plain["run"] |= {"folder": str(folder), "tensorboard": False, "measure_peak_flops": False}
    plain["mlperf"]["enabled"] = False
    plain["checkpoint"]["save_final_model"] = False
    return config_from_tree(plain, "trial")


def outcome_of(folder: Path, config: Config, pruned: bool) -> Outcome:
    """What the metrics of a run come to."""
    lines = read_metrics(folder) if (folder / METRICS_LINES).is_file() else []
    steps, evaluations = of_kind(lines, StepLine), of_kind(lines, EvaluationLine)
    last = max((line.step for line in lines), default=0)
    times = [config.batch.global_batch_size / line.samples_per_s for line in steps if line.samples_per_s > 0]
    return Outcome(
        curve=[point_of(line) for line in evaluations],
        steps=last,
        samples=last * config.batch.global_batch_size,
        seconds=max([line.time_s for line in steps] + [line.time_s for line in evaluations], default=0.0),
        step_ms=1e3 * _median(times),
        optimizer_ms=_median([line.optimizer_ms for line in steps]),
        pruned=pruned,
    )


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
