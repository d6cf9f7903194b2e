"""Between a program and its user: every failure that a user can fix is one line and an exit code.

Standard library only, so that a program can guard itself before it imports anything that may be missing:

    from bert_fast.command import guarded, guard_imports

    guard_imports()
    import numpy as np

    @guarded
    def main() -> int: ...
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import select
import sys
import traceback
from collections.abc import Callable
from types import TracebackType

from bert_fast.errors import LostRankError, TrainingError, UserError
from bert_fast.exit_codes import ExitCode

_LONGEST_LINE = 2000  # characters
_OURS = ("bert_fast", "scripts")
_DISTRIBUTIONS = {  # where a package is installed under another name than it is imported by
    "yaml": "pyyaml",
    "mlperf_logging": "mlperf-logging",
    "google_crc32c": "google-crc32c",
    "flash_attn": "flash-attn",
    "pynvml": "nvidia-ml-py",
    "transformer_engine": "transformer-engine",
}


def one_line(text: object, longest: int = _LONGEST_LINE) -> str:
    """Text as a terminal can show it: on one line, no control characters, cut where it is longer than `longest`."""
    text = str(text)
    shown = "".join(
        character if character.isprintable() else " " if character == "\n" else ascii(character)[1:-1]
        for character in text[:longest]
    )
    return shown + (f"... ({len(text):,} characters)" if len(text) > longest else "")


def explain(error: BaseException) -> tuple[str, ExitCode] | None:
    """What to tell the user, and the exit code; None for what can only be a bug."""
    if isinstance(error, UserError):
        return str(error), ExitCode.USER_ERROR
    if isinstance(error, TrainingError):
        return str(error), ExitCode.TRAINING_ERROR
    if isinstance(error, LostRankError):
        return str(error), ExitCode.LOST_RANK
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on, or starts again", ExitCode.INTERRUPTED
    if isinstance(error, ImportError):
        text = _missing_package(error)
        return (text, ExitCode.USER_ERROR) if text else None
    if isinstance(error, MemoryError):
        return (
            f"there is not enough memory ({error or 'no details'}); give it a smaller input or fewer workers",
            ExitCode.USER_ERROR,
        )
    if isinstance(error, OSError) and error.errno is not None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"disk full ({error.filename or 'no file named'}); free space and run the same command again",
                ExitCode.USER_ERROR,
            )
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; check the path, its permissions and its disk", ExitCode.USER_ERROR
    return None


def _missing_package(error: ImportError) -> str | None:
    """The line for a third-party package that is missing or cannot be loaded; None if the module is Python's or ours."""
    name = (error.name or "").partition(".")[0]
    if not name or name in _OURS:
        return None
    if name in sys.stdlib_module_names:
        return f"this Python has no module {error.name}, which belongs to its standard library; use a complete Python"
    package = _DISTRIBUTIONS.get(name, name)
    command = f"python -m pip install -c constraints.txt {package}"
    if isinstance(error, ModuleNotFoundError):
        return f"the package {package} is missing; install it with: {command}"
    return f"the package {package} cannot be loaded ({error}); install it again with: {command}"


def guarded(main: Callable[..., int]) -> Callable[..., int]:
    """A `main` whose failures are one line on stderr and one of the `ExitCode`s.

    A bug has its traceback before that line. Where nobody reads the output any more nothing is printed, as by the programs
    of the shell.
    """

    @functools.wraps(main)
    def run(*arguments: object) -> int:
        try:
            try:
                return main(*arguments)
            finally:
                sys.stdout.flush()  # here, and not when Python ends, where a closed pipe can no longer be silent
        except (Exception, KeyboardInterrupt) as error:
            return report(error)

    return run


def report(error: BaseException) -> ExitCode:
    """Print the line of an error, after its traceback if it is a bug; nothing if nobody reads. Returns the exit code."""
    if isinstance(error, BrokenPipeError) and drop_output_without_reader():
        return ExitCode.PIPE
    explained = explain(error)
    if explained is None:
        traceback.print_exception(error)
        explained = f"unexpected {type(error).__name__}: {error} (traceback above; please report it)", ExitCode.BUG
    text, code = explained
    print(f"error: {one_line(text)}", file=sys.stderr, flush=True)
    return code


def guard_imports() -> None:
    """From here on, a missing package or Ctrl-C outside of a guarded `main` is one line, too."""
    sys.excepthook = _excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    raise SystemExit(report(error.with_traceback(trace)))


def drop_output_without_reader() -> bool:
    """Whether stdout is a pipe whose reader has left. Then what is buffered goes nowhere: Python would complain at its end."""
    try:
        output = sys.stdout.fileno()
        poller = select.poll()
        poller.register(output, 0)
        if not poller.poll(0):
            return False
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # no file, or a system without poll
        return False
    return True


def whole(least: int, most: int = 2**31) -> Callable[[str], int]:
    """The type of an argparse option: a whole number between `least` and `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{one_line(text, 80)} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{one_line(text, 80)} is not between {least:,} and {most:,}")
        return value

    return parse


def positive(text: str) -> float:
    """The type of an argparse option: a positive number that is not absurdly large."""
    value = not_negative(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{one_line(text, 80)} is not positive")
    return value


def not_negative(text: str) -> float:
    """The type of an argparse option: zero, or a positive number that is not absurdly large."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{one_line(text, 80)} is not a number") from None
    if not 0 <= value < 1e12:
        raise argparse.ArgumentTypeError(f"{one_line(text, 80)} is not positive, or far too large")
    return value


def share(text: str) -> float:
    """The type of an argparse option: a part of a whole, from 0 to 1."""
    value = not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{one_line(text, 80)} is not between 0 and 1")
    return value
