"""The MLPerf result log, with all keys of ruleset 5.0.0 for both divisions. The only module that calls mllog."""

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
from bert_fast.files import cut_last_line, write_atomically
from bert_fast.mlperf.rules import open_because, wants_short_status, wants_tensors

_STATUS = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "research": "Research, Development, or Internal (RDI)",
    "preview": "Preview",
}


class _StrictHandler(logging.FileHandler):
    """A handler that raises errors, where logging's own prints them and goes on: a log with gaps is worthless."""

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
    """Writes the result log line by line. Times are taken by mllog, in milliseconds since the epoch."""

    def __init__(self, path: Path | None, *, append: bool = False) -> None:
        """
        Args:
            path: of the log (result_0.txt); None on ranks other than 0, where nothing is written.
            append: continue the log of a run that was stopped.
        """
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
        """Log a point in time."""
        if self._logger:
            self._logger.event(key, value, metadata or None)

    def start(self, key: str, **metadata: Any) -> None:
        """Log the start of an interval."""
        if self._logger:
            self._logger.start(key, None, metadata or None)

    def end(self, key: str, **metadata: Any) -> None:
        """Log the end of an interval."""
        if self._logger:
            self._logger.end(key, None, metadata or None)

    @contextmanager
    def interval(self, start: str, stop: str, **metadata: Any) -> Iterator[None]:
        """Log the block as an interval whose start and stop have keys of their own (eval_start, eval_stop)."""
        self.start(start, **metadata)
        yield
        self.end(stop, **metadata)

    def submission(self, config: Config) -> None:
        """Log who submits what."""
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
        """Log every hyperparameter of the closed rules under MLPerf's keys, the same for LAMB and Adam."""
        optimizer, schedule = config.optimizer, config.schedule
        for key, value in (
            (constants.SEED, config.train.seed),
            (constants.GLOBAL_BATCH_SIZE, config.batch.global_batch_size),
            (constants.GRADIENT_ACCUMULATION_STEPS, config.batch.gradient_accumulation_steps),
            ("max_sequence_length", config.data.max_seq_len),
            (constants.OPT_NAME, optimizer.name),
            (constants.OPT_BASE_LR, optimizer.lr),
            ("opt_end_learning_rate", schedule.end_lr),
            ("opt_epsilon", optimizer.eps),
            (constants.OPT_LAMB_EPSILON, optimizer.eps),
            (constants.OPT_LAMB_BETA_1, optimizer.beta1),
            (constants.OPT_LAMB_BETA_2, optimizer.beta2),
            (constants.OPT_LAMB_WEIGHT_DECAY, optimizer.weight_decay),
            (constants.OPT_LR_WARMUP_STEPS, schedule.warmup_steps),
            (constants.NUM_WARMUP_STEPS, schedule.warmup_steps),
            (constants.START_WARMUP_STEP, schedule.start_warmup_step),
            (constants.OPT_LR_TRAINING_STEPS, schedule.total_steps),
            ("opt_lamb_learning_rate_decay_poly_power", schedule.power),
            ("opt_gradient_clip_norm", config.communication.max_norm),
            ("opt_gradient_clip_mode", config.communication.clip),
            ("target_accuracy", config.evaluation.target_accuracy),
            ("number_of_ranks", config.system.world_size),
            ("number_of_nodes", config.system.world_size // config.system.node_size),
        ):
            self.event(key, value)

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
