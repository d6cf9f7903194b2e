"""The loop: step after step to the target, the last step or a signal; log lines, evaluations and checkpoints in between."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_fast.balance.planner import Planner
from bert_fast.data.scrub import Scrubber
from bert_fast.data.store import Store
from bert_fast.errors import TrainingError, UserError
from bert_fast.optim.schedule import learning_rate
from bert_fast.report.schema import SkippedLine
from bert_fast.trace import span_or_nothing
from bert_fast.train.alarms import Alarms
from bert_fast.train.batches import PlannedStep, StepLoader
from bert_fast.train.checkpoint.async_writer import AsyncCheckpointWriter
from bert_fast.train.checkpoint.checkpointer import Checkpointer
from bert_fast.train.checkpoint.train_state import TrainState
from bert_fast.train.collectives import broadcast_value
from bert_fast.train.context import RunContext
from bert_fast.train.evaluate import Decision, EvaluationRunner
from bert_fast.train.health.nonfinite import NonfiniteWatch
from bert_fast.train.health.phases import COMPUTE, DATA, GRADIENT_SYNC, LOGGING, METRICS_SYNC
from bert_fast.train.health.step_errors import explain
from bert_fast.train.setup.consistency import check_state
from bert_fast.train.step import StepInput, StepResult
from bert_fast.train.telemetry.profile import StepProfile
from bert_fast.train.telemetry.step_metrics import IntervalMetrics


@dataclass
class Outcome:
    """How a run ended."""

    status: str  # success | aborted (max_steps reached) | stopped early (by on_evaluation) | stopped (by a signal)
    reached: bool
    signal_name: str | None = None


class TrainingLoop:
    """What changes from step to step, and the collaborators that each step is reported to."""

    def __init__(
        self,
        context: RunContext,
        state: TrainState,
        writer: AsyncCheckpointWriter,
        planner: Planner,
        loader: StepLoader,
        eval_store: Store,
        scrubber: Scrubber,
        resume_key: dict[str, Any],
    ) -> None:
        config, environment = context.config, context.environment
        self._context, self._state, self._writer = context, state, writer
        self._planner, self._loader, self._scrubber = planner, loader, scrubber
        self._components, self._progress = state.components, state.progress
        self._first_step = state.progress.step
        self._nonfinite = NonfiniteWatch(environment, config.train.max_skipped_steps)
        self._alarms = Alarms(writer, scrubber, environment)
        self._checkpointer = Checkpointer(context, state, writer, resume_key, self._nonfinite)
        self._evaluation = EvaluationRunner(context, state, eval_store)
        self._profile = StepProfile(config.run, environment, context.folder, state.components.step, self._first_step)
        self.metrics = IntervalMetrics(
            environment, state.components, context.clock, state.progress, state.cost, config.batch.global_batch_size
        )

    def run(self) -> Outcome:
        """Train. A collective."""
        outcome = self._run()
        self._log_trace(self._profile.close())
        return outcome

    def _run(self) -> Outcome:
        config, progress = self._context.config, self._progress
        self._evaluation.begin_block()
        if self._evaluation.is_due_at_start and (outcome := self._evaluate()):
            return outcome
        while progress.step < config.train.max_steps:
            self._train_step()
            last = progress.step == config.train.max_steps
            evaluate, checkpoint = self._evaluation.is_due(last), self._checkpointer.is_due(last)
            boundary = progress.step % config.train.log_every_steps == 0 or evaluate or checkpoint or last
            stop = self._log_interval() if boundary else 0
            if evaluate and (outcome := self._evaluate()):
                return outcome
            if stop:
                self._checkpointer.save(wait=True)
                name = signal.Signals(stop).name
                self._context.mllog.event("interrupted", progress.step, signal=name)
                return Outcome("stopped", False, name)
            if checkpoint:
                self._checkpointer.save()
        return Outcome("aborted" if config.evaluation.target_accuracy is not None else "success", False)

    def _evaluate(self) -> Outcome | None:
        """Evaluate; how the run ends by it, None if it goes on. A collective."""
        decision = self._evaluation.run()
        if decision is Decision.REACHED:
            return Outcome("success", True)
        return Outcome("stopped early", False) if decision is Decision.STOP else None

    def _train_step(self) -> None:
        """Fetch, train, count. On a GPU nothing here waits for the device."""
        context, progress = self._context, self._progress
        trace = self._profile.before(progress.step)
        began = time.perf_counter()
        context.heartbeat.at(progress.step, DATA)
        with span_or_nothing(trace, "data", "wait"):
            planned, inputs = next(self._loader)
        data_s = time.perf_counter() - began
        lr = learning_rate(progress.step, context.config.optimizer.lr, context.config.schedule)
        if progress.step == self._first_step:
            first = {"the plan of the first step": [planned.plan.checksum, planned.num_masked]}
            check_state(first, context.environment)
        context.heartbeat.at(progress.step, COMPUTE)
        result = self._compute(planned, inputs, lr)
        if self._components.average is not None:
            self._components.average.after_step(progress.step + 1, result.is_finite)
        self._log_trace(self._profile.after(progress.step))
        progress.count(planned, context.config.batch.global_batch_size, context.clock.elapsed)
        self._nonfinite.add(planned.plan.step, result)
        self.metrics.add(planned.plan, result, planned.num_masked, data_s, lr)
        if context.environment.device.type == "cpu" and not bool(result.is_finite):  # on a GPU the next log line looks
            self._check_finite()

    def _compute(self, planned: PlannedStep, inputs: StepInput, lr: float) -> StepResult:
        try:
            return self._components.step(inputs, lr, self._before_update)
        except (RuntimeError, IndexError) as error:
            rank = self._context.environment.rank
            raise explain(error, planned.plan, rank, planned.micro_batch_tokens(), self._scrubber) from error

    def _before_update(self) -> None:
        """Between backward and the wait for the gradients."""
        self._context.heartbeat.at(self._progress.step, GRADIENT_SYNC)
        self._writer.before_update()

    def _log_trace(self, path: Path | None) -> None:
        if path:
            self._context.log(f"trace of steps: {path} (open in ui.perfetto.dev or chrome://tracing)")

    # ---- log lines and alarms ---------------------------------------------------------------------------------------

    def _check_finite(self) -> None:
        """Say that a step was skipped; stop after too many. A collective where one was."""
        context = self._context
        skipped = self._nonfinite.check(self._progress.step - 1, context.heartbeat.hosts, self._planner)
        if skipped is None:
            return
        if context.environment.is_main:
            context.log(f"warning: {skipped.text}; step skipped ({skipped.in_a_row} in a row)")
            context.metrics.write(SkippedLine(step=self._progress.step, bad_step=skipped.step, ranks=skipped.ranks))
        if skipped.fatal:
            raise TrainingError(skipped.fatal)

    def _log_interval(self) -> int:
        """Exchange metrics and flags between ranks, write a line. Returns the signal at which all ranks shall stop, or 0."""
        context, progress = self._context, self._progress
        if not self.metrics.steps:
            return 0
        context.heartbeat.at(progress.step, METRICS_SYNC)
        if context.environment.device.type == "cuda":
            self._check_finite()
        self._nonfinite.forget_blame()
        summary = self.metrics.summarize(context.stop.number, self._alarms.text is not None)
        context.heartbeat.at(progress.step, LOGGING)
        rank = summary.first_rank_with_other_plan
        if rank is not None:
            raise UserError(
                f"rank {rank} ({context.heartbeat.hosts[rank]}) planned other samples than rank 0 in the {summary.steps} steps "
                f"before step {progress.step}, so these steps are wrong and are not saved; look at the data and memory of that "
                "node, then --resume"
            )
        context.energy.tick()
        if summary.line is not None:  # on rank 0
            context.metrics.write(summary.line)
            context.line.update(
                progress.step,
                progress.samples,
                summary.line.samples_per_s,
                summary.line.loss,
                progress.evaluations[-1].accuracy if progress.evaluations else None,
                context.config.evaluation.target_accuracy,
                (context.config.train.max_steps - progress.step) * summary.seconds / summary.steps,
            )
        if summary.first_rank_with_alarm is not None:
            self._stop_for(summary.first_rank_with_alarm)
        return summary.signal

    def _stop_for(self, rank: int) -> None:
        """All ranks stop for what `rank` has found, and say the same. What is sound is saved first. A collective."""
        text, may_save = broadcast_value((self._alarms.text, self._alarms.may_save), rank)
        if may_save and self._checkpointer.save(wait=True):
            text = f"{text}, then --resume: step {self._progress.step:,} is saved"
        raise UserError(str(text))
