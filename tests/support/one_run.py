"""A whole run of one rank in this process, as `run_pretraining.py` makes it but for its last files."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bert_fast.config import Config
from bert_fast.run_folder import create_folder
from bert_fast.train.context import RunContext, open_context
from bert_fast.train.environment import Environment
from bert_fast.train.health.signals import HANDLED
from bert_fast.train.run import RunSummary, run
from support.steps import cpu_rank


@contextmanager
def opened(config: Config, resume: bool = False, environment: Environment | None = None) -> Iterator[RunContext]:
    """The context of a run, closed at the end whatever happens; rank 0 makes the run's folder."""
    environment = environment or cpu_rank()
    if environment.is_main:
        create_folder(config, resume, commit="a commit")
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    context = open_context(config, environment, resume, on_lost=print)
    try:
        yield context
    finally:
        for number, handler in handlers.items():  # the run's end with its process
            signal.signal(number, handler)
        context.mllog.close()
        context.close()


def execute(config: Config, resume: bool = False) -> tuple[RunContext, RunSummary]:
    """A run up to its last step; `run_record.finish` makes its last files from what this returns."""
    with opened(config, resume) as context:
        return context, run(context, time.time())
