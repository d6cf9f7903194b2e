"""From a parsed command line to an exit code."""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bert_fast.claims import release
from bert_fast.command import drop_output_without_reader, explain
from bert_fast.config import Config, as_plain
from bert_fast.config.load import load_config
from bert_fast.config.yaml_files import to_yaml
from bert_fast.errors import LostRankError
from bert_fast.exit_codes import ExitCode, of_signal
from bert_fast.files import write_json
from bert_fast.launch.error_report import report_error
from bert_fast.launch.local import LAUNCHER_PID, run_local
from bert_fast.launch.mpi import adopt_mpi
from bert_fast.launch.provenance import commit
from bert_fast.launch.slurm import adopt_slurm, is_launched
from bert_fast.mlperf.rules import check_division
from bert_fast.run_folder import STOPPED, create_folder, run_folder, take_folder
from bert_fast.train.complete import exit_code_of, finished_again, is_over
from bert_fast.train.health.collective_errors import CollectiveError, classify
from bert_fast.train.health.flight_recorder import flight_record, record_flight
from bert_fast.train.setup.inputs import check_inputs, check_room

if TYPE_CHECKING:
    from bert_fast.train.context import RunContext
    from bert_fast.train.health.judgement import Verdict
    from bert_fast.train.run import RunSummary

_LEAVE_S = 5.0  # for the last words of a rank that leaves


def guarded(action: Callable[[], int]) -> int:
    """Run `action`; errors meant for the user become one line on stderr, or the report of a rank, and an `ExitCode`."""
    try:
        return action()
    except BrokenPipeError as error:
        return ExitCode.PIPE if drop_output_without_reader() else _report_bug(error)
    except LostRankError as error:
        return report_error(str(error), ExitCode.LOST_RANK, error.rank, error.last_seen)
    except (Exception, KeyboardInterrupt) as error:
        explained = _explain(error)
        return report_error(*explained) if explained else _report_bug(error)


def _explain(error: BaseException) -> tuple[str, ExitCode] | None:
    """What to tell the user of a run, and the exit code; None for a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted before the first step; nothing was written", ExitCode.INTERRUPTED
    if isinstance(error, OSError):
        where = error.filename or "the run's folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"disk full ({where}); free space and --resume", ExitCode.USER_ERROR
        if error.errno in (errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE):
            return f"cannot write {where}: {error.strerror}; fix the file system and --resume", ExitCode.USER_ERROR
        if not error.filename:
            return None
    kind = classify(error)
    if kind is CollectiveError.SHARED_GPU:
        text = f"{kind.value}; start one rank per GPU (system.ranks_per_node) and let every rank see all of the host's GPUs"
        return text, ExitCode.USER_ERROR
    if kind is CollectiveError.LOST_RANK:
        return f"lost contact with another rank: {_first_line(error)}", ExitCode.LOST_RANK
    return explain(error)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:160] if str(error) else ""


def _report_bug(error: BaseException) -> ExitCode:
    traceback.print_exception(error)
    text = f"unexpected {type(error).__name__}: {_first_line(error)} (traceback above; please report it)"
    return report_error(text, ExitCode.BUG)


def run(args: argparse.Namespace, process_start: float) -> int:
    """Dispatch: print, dry-run, start ranks here, or be a rank."""
    _die_with_launcher()
    config = load_config(args.config, args.overrides)
    if config.mlperf.enabled:
        check_division(config)
    if args.print_config:
        print(to_yaml(as_plain(config)), end="")
        return 0
    if args.dry_run:
        from bert_fast.train.setup.dry_run import dry_run

        dry_run(config)
        return 0
    adopt_mpi()
    adopt_slurm()
    launched = is_launched()
    if config.memory.budget_gib is not None:
        here = launched or config.system.world_size == 1
        config = _within_budget(config, speaks=here and os.environ.get("RANK", "0") == "0")
    if args.preflight:
        return run_local(config, sys.argv) if not launched and config.system.world_size > 1 else _preflight(config)
    folder = run_folder(config)
    if launched and os.environ["RANK"] != "0":
        if is_over(folder):  # rank 0 needs nobody, or is refused
            return 0
        return _be_a_rank(config, args.resume, process_start)
    try:
        code = finished_again(folder)
        if code is not None:
            return code
        check_inputs(config)
        take_folder(config, args.resume)
        if not launched and config.system.device != "cuda":
            check_room(config)
        if not launched and (config.system.world_size > 1 or config.recovery.max_restarts > 0):
            return run_local(config, sys.argv, lambda: _finished(folder))
        return _be_a_rank(config, args.resume, process_start)
    finally:
        release(folder)


def _within_budget(config: Config, speaks: bool) -> Config:
    """The config with the switches that its memory budget leaves open chosen. Raises UserError where nothing fits."""
    from bert_fast.train.setup.memory_fit import fit_lines, fit_to_budget, is_open

    if not is_open(config):
        return config
    config, found = fit_to_budget(config)
    if speaks:
        for line in fit_lines(found):
            print(line, flush=True)
    return config


def _finished(folder: Path) -> int | None:
    code = finished_again(folder)
    return exit_code_of(folder) if code is None else code


def _preflight(config: Config) -> int:
    from bert_fast.train.environment import join
    from bert_fast.train.setup.preflight import preflight, print_preflight

    environment = join(config)
    report = preflight(config, environment)
    if environment.is_main:
        print_preflight(report)
    return 0


def _be_a_rank(config: Config, resume: bool, process_start: float) -> int:
    from bert_fast.train.context import open_context
    from bert_fast.train.environment import join
    from bert_fast.train.run import run as run_phases
    from bert_fast.train.run_record import finish

    record_flight(run_folder(config))
    environment = join(config)
    if environment.is_main:
        folder = create_folder(config, resume, commit())
        (folder / STOPPED).unlink(missing_ok=True)
    context = open_context(config, environment, resume, on_lost=_leave)
    try:
        summary = run_phases(context, process_start)
    except RuntimeError as error:
        if classify(error) is not CollectiveError.LOST_RANK:
            raise
        raise _lost_rank(context.heartbeat.diagnose(), _first_line(error)) from error
    if summary.outcome.status != "stopped":
        finish(context, summary)
    context.close()
    return _exit_code(context, summary) if environment.is_main else 0  # one rank speaks for the run


def _lost_rank(verdict: Verdict | None, error: str) -> LostRankError:
    """The error of a lost rank: of the verdict, or of a collective's `error` where nobody can be named."""
    rank, last_seen = (verdict.rank, verdict.text) if verdict else (None, "")
    text = f"lost contact with another rank: {last_seen or error}. Start again with --resume{flight_record()}"
    return LostRankError(text, rank, last_seen)


def _leave(verdict: Verdict) -> None:
    """Called beside a main thread that may wait for ever, perhaps for a file system that does not answer us either."""
    last = threading.Timer(_LEAVE_S, os._exit, (ExitCode.LOST_RANK,))
    last.daemon = True
    last.start()
    error = _lost_rank(verdict, "")
    code = report_error(str(error), ExitCode.LOST_RANK, error.rank, error.last_seen)
    sys.stdout.flush()
    os._exit(code)


def _exit_code(context: RunContext, summary: RunSummary) -> int:
    """Exit code of a run that ended by itself or was stopped."""
    outcome = summary.outcome
    if outcome.status != "stopped":
        return ExitCode.OK if outcome.status == "success" else ExitCode.TARGET_MISSED
    step, name = summary.state.progress.step, outcome.signal_name
    write_json(context.folder / STOPPED, {"step": step, "signal": name})
    print(f"stopped by {name} at step {step}; go on with --resume", flush=True)
    return of_signal(getattr(signal, name or "", signal.SIGTERM))


def _die_with_launcher() -> None:
    """Ask Linux to end this rank if its launcher is killed, so that none is left behind."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(launcher):  # it was gone before we asked
            sys.exit(ExitCode.LOST_RANK)
