"""What a stage of scripts/gpu_check.py is given, what it gives back, and how it runs in a process of its own."""

from __future__ import annotations

import importlib
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bert_fast.files import write_json

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, UNAVAILABLE, NO_TIME = "passed", "failed", "not available", "no time left"


class NotAvailable(Exception):  # noqa: N818 (no error: a stage or case that this machine cannot run)
    """This machine has not got what a stage or a case needs; the text says what."""


class CheckFailed(Exception):  # noqa: N818 (a verdict)
    """What was checked is not as it must be."""


@dataclass
class Result:
    """What a stage found.

    Attributes:
        summary: the stage's one line for the table.
        metrics: numbers by name, as they stand in gpu_check.json (`mfu/large/ours_best`).
        details: whatever else belongs in the record: rows of a table, versions.
        left_out: cases that were not run, each with its reason.
        failures: what is not as it must be; the stage has failed if there is one.
    """

    summary: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass
class Context:
    """What a stage runs with.

    Attributes:
        device: `cuda` or `cpu`; on a CPU every stage takes its tiny form.
        out: folder of the records; a stage writes its own files there under its name.
        scratch: folder that is removed at the end of the whole check, shared by the stages.
        deadline: `time.time()` at which the stage is ended, whatever it does.
    """

    device: str
    out: Path
    scratch: Path
    deadline: float
    result: Result = field(default_factory=Result)
    record: Path | None = None

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def has_time(self, seconds: float, what: str) -> bool:
        """Whether `what` may still be begun; if not, it is noted as left out."""
        if self.seconds_left() >= seconds:
            return True
        self.result.left_out.append(f"{what}: no time left")
        return False

    def case(self, name: str, action: Callable[[], None]) -> bool:
        """Run one case of the stage: what it lacks or fails is noted, and the next case runs. Whether it passed."""
        try:
            action()
        except NotAvailable as missing:
            self.result.left_out.append(f"{name}: {missing}")
            return False
        except Exception as error:
            if not isinstance(error, CheckFailed):
                traceback.print_exc()  # into the stage's log
            text = (str(error) or type(error).__name__).strip().splitlines()[0][:300]
            self.result.failures.append(f"{name}: {text}")
            return False
        finally:
            self.save()
        return True

    def save(self) -> None:
        """Write down what was found so far: a stage that is killed leaves that."""
        if self.record is not None:
            write_json(self.record, {**vars(self.result), "status": FAILED, "why": "the stage was ended in the middle"})


@dataclass(frozen=True)
class Stage:
    """One entry of the table in scripts/gpu_check.py.

    Attributes:
        module: the module whose `run(context)` is the stage.
        limit_s: seconds after which its process is killed, on a GPU.
        what: for `--list`.
        arguments: handed to `run` by name.
    """

    module: str
    limit_s: float
    what: str
    arguments: dict[str, Any] = field(default_factory=dict)


def run_in_process(stage: Stage, context: Context, log: Path) -> None:
    """The body of a stage's process: everything it prints goes to `log`, what it found to `context.record`."""
    os.setsid()  # the whole group can be ended at once, with what the stage has started
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    assert context.record is not None
    if context.tiny:  # tiny tensors are faster on one thread
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    status, why = PASSED, ""
    try:
        importlib.import_module(stage.module).run(context, **stage.arguments)
    except NotAvailable as missing:
        status, why = UNAVAILABLE, str(missing)
    except Exception as error:
        traceback.print_exc()
        status, why = FAILED, (str(error) or type(error).__name__).strip().splitlines()[0][:300]
    result = context.result
    if result.failures:
        status, why = FAILED, "; ".join([*([why] if why else []), *result.failures])
    write_json(context.record, {**vars(result), "status": status, "why": why})
    sys.stdout.flush()
    os._exit(0)  # the record is whole; threads of CUDA, gloo or torch.compile need not be waited for
