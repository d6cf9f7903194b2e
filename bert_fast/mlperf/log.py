"""The MLPerf result log: the only caller of mllog. All keys of ruleset 5.0.0, for the closed and the open division."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

from bert_fast.config import Config
from bert_fast.config.choices import DECAYS, OPTIMIZERS
from bert_fast.files import cut_last_line, write_atomically
from bert_fast.mlperf.rules import open_because, wants_short_status, wants_tensors

_STATUS = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "research": "Research, Development, or Internal (RDI)",
    "preview": "Preview",
}


class _StrictHandler(logging.FileHandler):
    """A handler that lets errors through (logging's own prints and goes on): a log with holes is not valid."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if error is not None:
            raise error


def _reopen(path: Path) -> None:
    """Prepare the log of a stopped run for more lines: remove an unfinished last line and the end of the run."""
    cut_last_line(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if f'"key": "{constants.RUN_STOP}"' not in line]
    if kept != lines:  # it ended before its last files were written, and repeats its last steps
        write_atomically(path, "".join(kept))


class ResultLog:
    """A run's result log: `:::MLLOG` and one JSON object per line, with time, key, value, and the line that logged it.

    Rank 0 writes it, from init_start to run_stop; the other ranks have a log without a path, which writes nothing, so that
    they run the same code. Who submits and the hyper-parameters (`submission`, `hyperparameters`, `tensors`) come before
    init_stop. The rest is logged as it happens, by MLPerf's keys: run_start and run_stop, a block_start and block_stop
    around the steps between two evaluations, eval_start, eval_stop and eval_accuracy with the samples so far as
    epoch_num, and tracked_stats. Keys of our own, which the checkers let pass, are open_because, the data
    sets' hashes, eval_samples_of_training_text, interrupted, resumed and a few of the hyper-parameters. All
    times are wall-clock milliseconds.

    Each line is flushed before the call returns, and an error in writing is raised: a log with holes is not valid.
    """

    def __init__(self, path: Path | None, *, append: bool = False) -> None:
        """`path` is the file, None to write nothing. `append` continues the log of a run that stopped."""
        self._logger: MLLogger | None = None
        if path is None:
            return
        if append and path.is_file():
            _reopen(path)
        sink = logging.Logger("bert_fast.mllog")
        handler = _StrictHandler(path, mode="a" if append else "w", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(message)s"))
        sink.addHandler(handler)
        self._handler = handler
        root = str(Path(__file__).resolve().parents[2])
        self._logger = MLLogger(sink, default_stack_offset=2, root_dir=root)

    def event(self, key: str, value: Any = None, **metadata: Any) -> None:
        """One point in time (POINT_IN_TIME)."""
        if self._logger:
            self._logger.event(key, value, metadata or None)

    def start(self, key: str, **metadata: Any) -> None:
        """The start of an interval (INTERVAL_START)."""
        if self._logger:
            self._logger.start(key, None, metadata or None)

    def end(self, key: str, **metadata: Any) -> None:
        """The end of an interval (INTERVAL_END)."""
        if self._logger:
            self._logger.end(key, None, metadata or None)

    @contextmanager
    def interval(self, start: str, stop: str, **metadata: Any) -> Iterator[None]:
        """Log the block as an interval whose start and stop have keys of their own (eval_start, eval_stop)."""
        self.start(start, **metadata)
        yield
        self.end(stop, **metadata)

    def submission(self, config: Config) -> None:
        """Who submits what: benchmark, division, organization, platform, status, contact."""
        mlperf = config.mlperf
        self.event(constants.SUBMISSION_BENCHMARK, constants.BERT)
        self.event(constants.SUBMISSION_DIVISION, mlperf.division)
        self.event(constants.SUBMISSION_ORG, mlperf.organization)
        self.event(constants.SUBMISSION_PLATFORM, mlperf.platform)
        self.event(
            constants.SUBMISSION_STATUS, mlperf.status if wants_short_status(mlperf.ruleset) else _STATUS[mlperf.status]
        )
        self.event(constants.SUBMISSION_POC_NAME, mlperf.poc_name)
        self.event(constants.SUBMISSION_POC_EMAIL, mlperf.poc_email)
        if mlperf.division == "open":
            self.event("open_because", open_because(config))

    def hyperparameters(self, config: Config) -> None:
        """Log every hyperparameter of the closed rules under MLPerf's keys, the same for LAMB and Adam.

        What the optimizer or the decay does not read is left out. In the open division, what they read follows by our names.
        """
        optimizer, schedule = config.optimizer, config.schedule
        reads = {*OPTIMIZERS[optimizer.name].settings, *DECAYS[schedule.decay].settings}
        for key, value in (
            (constants.SEED, config.train.seed),
            (constants.GLOBAL_BATCH_SIZE, config.batch.global_batch_size),
            (constants.GRADIENT_ACCUMULATION_STEPS, config.batch.gradient_accumulation_steps),
            ("max_sequence_length", config.data.max_seq_len),
            (constants.OPT_NAME, optimizer.class_name or optimizer.name),
            (constants.OPT_BASE_LR, optimizer.lr),
            *_if("end_lr" in reads, ("opt_end_learning_rate", schedule.end_lr)),
            *_if("eps" in reads, ("opt_epsilon", optimizer.eps), (constants.OPT_LAMB_EPSILON, optimizer.eps)),
            *_if("beta1" in reads, (constants.OPT_LAMB_BETA_1, optimizer.beta1)),
            *_if("beta2" in reads, (constants.OPT_LAMB_BETA_2, optimizer.beta2)),
            (constants.OPT_LAMB_WEIGHT_DECAY, optimizer.weight_decay),
            (constants.OPT_LR_WARMUP_STEPS, schedule.warmup_steps),
            (constants.NUM_WARMUP_STEPS, schedule.warmup_steps),
            (constants.START_WARMUP_STEP, schedule.start_warmup_step),
            (constants.OPT_LR_TRAINING_STEPS, schedule.total_steps),
            *_if("power" in reads, ("opt_lamb_learning_rate_decay_poly_power", schedule.power)),
            ("opt_gradient_clip_norm", config.communication.max_norm),
            ("opt_gradient_clip_mode", config.communication.clip),
            ("target_accuracy", config.evaluation.target_accuracy),
            ("number_of_ranks", config.system.world_size),
            ("number_of_nodes", config.system.world_size // config.system.node_size),
        ):
            self.event(key, value)
        if config.batch.virtual_ranks > 1:
            self.event("virtual_ranks", config.batch.virtual_ranks)
        if config.mlperf.division == "open":
            names = ("name", "lr", "weight_decay", *OPTIMIZERS[optimizer.name].settings)
            self.event("optimizer", {name: getattr(optimizer, name) for name in names})
            names = ("warmup_steps", "total_steps", "decay", *DECAYS[schedule.decay].settings)
            self.event("schedule", {name: getattr(schedule, name) for name in names})
            if config.averaging.method != "none":
                self.event("averaging", config.averaging.model_dump(mode="json"))

    def tensors(self, names: Iterable[str], ruleset: str) -> None:
        """Log the tensors that were initialized, by TensorFlow's names, for rulesets that ask for them."""
        if wants_tensors(ruleset):
            for name in names:
                self.event(constants.WEIGHTS_INITIALIZATION, tensor=name)

    def throughput(self, samples_per_s: float, step: int) -> None:
        """Log samples per second up to a step, without evaluations."""
        self.event("tracked_stats", {"throughput": samples_per_s}, step=step)

    def close(self) -> None:
        """Close the file."""
        if self._logger:
            self._handler.close()


def _if(condition: bool, *events: tuple[str, Any]) -> tuple[tuple[str, Any], ...]:
    return events if condition else ()
