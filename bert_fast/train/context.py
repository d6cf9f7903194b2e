"""What every phase of a run writes to, listens to and measures with."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bert_fast.config import Config
from bert_fast.data.store import Store
from bert_fast.mlperf.log import ResultLog
from bert_fast.report.console import ProgressLine
from bert_fast.report.metrics import MetricsWriter
from bert_fast.report.schema import EvaluationLine
from bert_fast.run_folder import RESULT_LOG, run_folder
from bert_fast.train.clock import Clock
from bert_fast.train.environment import Environment
from bert_fast.train.health.heartbeat import Heartbeat, open_store
from bert_fast.train.health.judgement import Verdict
from bert_fast.train.health.signals import StopFlag
from bert_fast.train.telemetry.energy import EnergyTally


@dataclass(frozen=True)
class RunContext:
    """One run on one rank: its settings and place, its logs, clocks and watchers. Only rank 0's logs write.

    resume:    whether the run goes on from a checkpoint
    clock:     MLPerf's and the throughput clock
    heartbeat: says where this rank is, and which rank is lost
    stop:      set by a signal
    energy:    this rank's share of the nodes' meters
    store_of:  the data store in a folder; a program of many runs gives one that keeps the stores it has opened
    on_evaluation: told of every evaluation; True ends the run there ("stopped early"). Rank 0's answer counts, and all
               ranks have one or none has
    """

    config: Config
    environment: Environment
    resume: bool
    folder: Path
    clock: Clock
    mllog: ResultLog
    metrics: MetricsWriter
    line: ProgressLine
    heartbeat: Heartbeat
    stop: StopFlag
    energy: EnergyTally
    store_of: Callable[[str], Store] = Store
    on_evaluation: Callable[[EvaluationLine], bool] | None = None

    def log(self, text: str) -> None:
        """A line on rank 0's terminal that stays."""
        self.line.log(text)

    def close(self) -> None:
        """The run is done: this rank may be silent from now on."""
        self.heartbeat.stop()
        self.metrics.close()


def open_context(
    config: Config,
    environment: Environment,
    resume: bool,
    on_lost: Callable[[Verdict], None],
    *,
    store_of: Callable[[str], Store] = Store,
    on_evaluation: Callable[[EvaluationLine], bool] | None = None,
) -> RunContext:
    """Open the run's logs; nothing is started yet.

    Args:
        on_lost: called from another thread, with the verdict, when a rank is lost and this one may wait for it for ever.
        store_of, on_evaluation: as `RunContext` has them.
    """
    is_main, folder = environment.is_main, run_folder(config)
    stop = StopFlag()
    return RunContext(
        config=config,
        environment=environment,
        resume=resume,
        folder=folder,
        clock=Clock(),
        mllog=ResultLog(folder / RESULT_LOG if is_main and config.mlperf.enabled else None, append=resume),
        metrics=MetricsWriter(folder if is_main else None, append=resume, tensorboard=config.run.tensorboard),
        line=ProgressLine(enabled=is_main),
        heartbeat=Heartbeat(
            environment, open_store(), config.communication.timeout_s, on_lost, lambda: stop.number == signal.SIGTERM
        ),
        stop=stop,
        energy=EnergyTally(environment),
        store_of=store_of,
        on_evaluation=on_evaluation,
    )
