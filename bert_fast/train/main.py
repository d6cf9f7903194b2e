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
from bert_fast.command import (
    EXIT_BUG,
    EXIT_PIPE,
    EXIT_TRAINING,
    EXIT_USER,
    drop_output_without_reader,
    explain,
    one_line,
)
from bert_fast.config import Config, as_plain
from bert_fast.config.load import load_config
from bert_fast.config.yaml_files import to_yaml
from bert_fast.errors import LostRankError, TrainingError, UserError
from bert_fast.files import write_json
from bert_fast.launch import local as launch
from bert_fast.launch.mpi import adopt_mpi
from bert_fast.launch.provenance import commit
from bert_fast.launch.slurm import adopt_slurm, is_launched
from bert_fast.memory.estimate import machine_memory
from bert_fast.mlperf.rules import check_division
from bert_fast.run_folder import create_folder, run_folder, take_folder
from bert_fast.train.complete import EXIT_TARGET_MISSED, exit_code_of, finished_again, is_over
from bert_fast.train.health.flight_recorder import flight_record, record_flight
from bert_fast.train.setup.inputs import check_inputs

if TYPE_CHECKING:
    from bert_fast.train.loop import Outcome, Run

# What c10d raises when another rank is gone or silent
_LOST_RANK = (
    "gloo",
    "Gloo",
    "NCCL",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "pair closure",
    "Timed out",
    "timed out",
)
_PROCESS_BYTES = 150 << 20  # of a rank that has imported torch and does nothing
_LEAVE_S = 5.0  # for the last words of a rank that leaves


def guarded(action: Callable[[], int]) -> int:
    """Run `action`; errors meant for a person become one line on stderr and an exit code."""
    try:
        return action()
    except UserError as error:
        return _report(str(error), EXIT_USER)
    except TrainingError as error:
        return _report(str(error), EXIT_TRAINING)
    except LostRankError as error:
        return _report(str(error), launch.EXIT_LOST_RANK)
    except KeyboardInterrupt:
        return _report("interrupted before the first step; nothing was written", 130)
    except BrokenPipeError as error:
        return EXIT_PIPE if drop_output_without_reader() else _bug(error)
    except OSError as error:
        where = error.filename or "the run's folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _report(f"disk full ({where}); free space and --resume", EXIT_USER)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE):
            return _report(f"cannot write {where}: {error.strerror}; mend the file system and --resume", EXIT_USER)
        return _explained(error) if error.filename else _bug(error)
    except RuntimeError as error:
        if "Duplicate GPU" in str(error):  # NCCL's words
            return _report(
                "two ranks of a host are on one GPU; start one rank a GPU (system.ranks_per_node) and let every rank see all "
                "of the host's GPUs",
                EXIT_USER,
            )
        if not _is_lost_rank(error):
            return _bug(error)
        return _report(f"lost contact with another rank: {str(error).splitlines()[0][:160]}", launch.EXIT_LOST_RANK)
    except Exception as error:
        return _explained(error)


def _explained(error: Exception) -> int:
    """What every program says of an error, such as a missing package; else a bug."""
    found = explain(error)
    return _report(*found) if found else _bug(error)


def _is_lost_rank(error: RuntimeError) -> bool:
    return any(word in str(error) for word in _LOST_RANK)


def _bug(error: Exception) -> int:
    traceback.print_exc()
    text = str(error).splitlines()[0] if str(error) else ""
    return _report(f"unexpected {type(error).__name__}: {text[:200]} (traceback above; please report it)", EXIT_BUG)


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
    if args.preflight:
        return (
            launch.run_local(config, sys.argv) if not launched and config.system.world_size > 1 else _preflight(config)
        )
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
            _check_room(config)
        if not launched and (config.system.world_size > 1 or config.recovery.max_restarts > 0):
            return launch.run_local(config, sys.argv, lambda: _finished(folder))
        return _be_a_rank(config, args.resume, process_start)
    finally:
        release(folder)


def _finished(folder: Path) -> int | None:
    code = finished_again(folder)
    return exit_code_of(folder) if code is None else code


def _check_room(config: Config) -> None:
    """Refuse to start more processes here than this machine's memory can hold. Raises UserError."""
    needed, there = config.system.world_size * _PROCESS_BYTES, machine_memory()
    if needed > there:
        raise UserError(
            f"system.world_size={config.system.world_size} processes here need at least {needed / 2**30:,.0f} GiB and "
            f"this machine has {there / 2**30:,.0f}; start fewer, or start them on several machines (docs/running.md)"
        )


def _preflight(config: Config) -> int:
    from bert_fast.train.environment import join
    from bert_fast.train.setup.preflight import preflight, say_preflight

    environment = join(config)
    report = preflight(config, environment)
    if environment.is_main:
        say_preflight(report)
    return 0


def _be_a_rank(config: Config, resume: bool, process_start: float) -> int:
    from bert_fast.train.environment import join
    from bert_fast.train.loop import Run
    from bert_fast.train.run_record import finish

    record_flight(run_folder(config))
    environment = join(config)
    if environment.is_main:
        folder = create_folder(config, resume, commit())
        (folder / "stopped.json").unlink(missing_ok=True)
    run = Run(config, environment, resume, process_start, on_lost=_leave)
    try:
        outcome = run.execute()
    except RuntimeError as error:
        if isinstance(error, TrainingError) or "Duplicate GPU" in str(error) or not _is_lost_rank(error):
            raise
        who = run.heartbeat.diagnose() or str(error).splitlines()[0][:160]
        raise LostRankError(_lost_text(who)) from error
    if outcome.status != "stopped":
        finish(run, outcome)
    run.heartbeat.stop()
    run.metrics.close()
    return _exit_code(run, outcome) if environment.is_main else 0  # one rank speaks for the run


def _lost_text(who: str) -> str:
    return f"lost contact with another rank: {who}. Start again with --resume{flight_record()}"


def _leave(who: str) -> None:
    """Called beside a main thread that may wait for ever, perhaps for a file system that does not answer us either."""
    last = threading.Timer(_LEAVE_S, os._exit, (launch.EXIT_LOST_RANK,))
    last.daemon = True
    last.start()
    code = _report(_lost_text(who), launch.EXIT_LOST_RANK)
    sys.stdout.flush()
    os._exit(code)


def _exit_code(run: Run, outcome: Outcome) -> int:
    """Exit code of a run that ended by itself or was stopped."""
    if outcome.status != "stopped":
        return EXIT_TARGET_MISSED if outcome.status == "aborted" else 0
    step, name = run.progress.step, outcome.signal_name
    write_json(run.folder / "stopped.json", {"step": step, "signal": name})
    print(f"stopped by {name} at step {step}; go on with --resume", flush=True)
    return 128 + int(getattr(signal, name or "", signal.SIGTERM))


def _report(text: str, code: int) -> int:
    """One line. Under our launcher it goes to a file, so that ranks with the same error speak once."""
    text = one_line(text)
    folder, rank = os.environ.get(launch.ERROR_FOLDER), os.environ.get("RANK")
    if folder and rank is not None:
        try:
            Path(folder, f"code-{rank}").write_text(str(code), encoding="ascii")
            Path(folder, f"rank-{rank}").write_text(text, encoding="utf-8")
            return code
        except OSError:  # a disk that is full, perhaps what the text is about
            pass
    print(f"error: {f'rank {rank}: ' if rank is not None else ''}{text}", file=sys.stderr, flush=True)
    return code


def _die_with_launcher() -> None:
    """Ask Linux to end this rank if its launcher is killed, so that none is left behind."""
    launcher = os.environ.get(launch.LAUNCHER_PID)
    if launcher is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(launcher):  # it was gone before we asked
            sys.exit(launch.EXIT_LOST_RANK)
