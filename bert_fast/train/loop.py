"""A run from init to verdict: steps, evaluations, checkpoints, signals, logs."""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from mlperf_logging.mllog import constants

from bert_fast.balance.cost import CostModel, cost_record
from bert_fast.balance.planner import Plan
from bert_fast.config import Config
from bert_fast.config.yaml_files import to_yaml
from bert_fast.data.batch import Batch
from bert_fast.data.loader import Prefetcher
from bert_fast.data.masking import mask_id_of, redraw
from bert_fast.data.scrub import Scrubber
from bert_fast.errors import TrainingError, UserError
from bert_fast.files import write_atomically, write_json
from bert_fast.mlperf.log import ResultLog
from bert_fast.mlperf.rules import check_evaluation_set, check_init_time
from bert_fast.model.checkpoints import google_variables
from bert_fast.optim.schedule import learning_rate
from bert_fast.report.console import ProgressLine
from bert_fast.report.metrics import MetricsWriter
from bert_fast.run_folder import run_folder
from bert_fast.trace import span_or_nothing
from bert_fast.train.batches import planned_batches, to_device
from bert_fast.train.checkpoint.async_writer import AsyncCheckpointWriter, saving_group
from bert_fast.train.checkpoint.export import export_model
from bert_fast.train.checkpoint.progress import Progress
from bert_fast.train.checkpoint.resume import latest_valid_checkpoint, load_checkpoint, resume_key
from bert_fast.train.checkpoint.snapshot import captured, optimizer_counts, rank_state
from bert_fast.train.clock import Clock
from bert_fast.train.environment import Environment, describe
from bert_fast.train.evaluate import Evaluation, Evaluator
from bert_fast.train.health.heartbeat import (
    CHECKPOINT,
    COMPUTE,
    DATA,
    EVALUATION,
    EXCHANGE,
    FIGURES,
    FINISHING,
    LOGGING,
    Heartbeat,
)
from bert_fast.train.health.nonfinite import NonfiniteWatch
from bert_fast.train.health.signals import StopFlag
from bert_fast.train.health.step_errors import explain, tokens_of
from bert_fast.train.setup.build import (
    TrainComponents,
    broadcast_value,
    bucket_note,
    build,
    gather_floats,
    matmul_peak,
    seed_ranks,
)
from bert_fast.train.setup.consistency import check_config, check_state, open_stores
from bert_fast.train.setup.cost_model import calibrate, make_cost, make_planner
from bert_fast.train.setup.held_out import find_shared_text, shared_text_note
from bert_fast.train.setup.inputs import checkpoint_vocabulary
from bert_fast.train.setup.page_cache import clear_caches
from bert_fast.train.setup.preflight import preflight, say_preflight
from bert_fast.train.step import StepInput
from bert_fast.train.telemetry.energy import EnergyTally, summed
from bert_fast.train.telemetry.profile import StepProfile
from bert_fast.train.telemetry.step_metrics import IntervalMetrics


@dataclass
class Outcome:
    """How a run ended."""

    status: str  # success | aborted (max_steps reached) | stopped (by a signal)
    reached: bool
    signal_name: str | None = None


class Run:
    """One run on one rank. `execute()` is the whole of it."""

    def __init__(self, config: Config, environment: Environment, resume: bool, process_start: float,
        on_lost: Callable[[str], None],
    ) -> None:  # fmt: skip
        """
        Args:
            on_lost: called from another thread, with the reason, when a rank is lost and this one may wait for it for ever.
        """
        self.config, self.environment, self.resume = config, environment, resume
        self.folder = run_folder(config)
        self._process_start = process_start
        main = environment.is_main
        self.mllog = ResultLog(self.folder / "result_0.txt" if main and config.mlperf.enabled else None, append=resume)
        self.metrics = MetricsWriter(self.folder if main else None, append=resume, tensorboard=config.run.tensorboard)
        self.line = ProgressLine(enabled=main)
        self.clock, self.progress = Clock(), Progress()
        self.stop = StopFlag()
        self.energy = EnergyTally(environment)
        self.heartbeat = Heartbeat(
            environment, config.communication.timeout_s, on_lost, lambda: self.stop.number == signal.SIGTERM
        )
        self._finite = NonfiniteWatch(environment, config.train.max_skipped_steps)
        self.ceiling = 0.0
        self.init_s = 0.0

    # ---- before the clock -------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """init_start to init_stop: nothing here touches the data set."""
        config = self.config
        self.heartbeat.start()
        check_config(config, self.resume, self.environment)
        if self.environment.is_main:
            hosts = [{"rank": rank, "host": host} for rank, host in enumerate(self.heartbeat.hosts)]
            write_json(self.folder / "nodes.json", hosts)
        if config.system.preflight:
            report = preflight(config, self.environment)
            if self.environment.is_main:
                say_preflight(report)
                write_json(self.folder / "preflight.json", report)
        if not self.resume:
            cleared = config.mlperf.clear_caches and clear_caches(self.environment, self.line.say)
            self.mllog.submission(config)
            self.mllog.event(constants.CACHE_CLEAR, cleared)
            self.mllog.start(constants.INIT_START)
            self.mllog.hyperparameters(config)
        self._vocab_sha256 = config.data.vocab_sha256 or checkpoint_vocabulary(config.checkpoint.init_from)
        self.machinery: TrainComponents = build(self._planned_before(config), self.environment)
        if not self.resume:
            variables = (name for _, name in google_variables(config.model.num_layers))
            self.mllog.tensors(variables, config.mlperf.ruleset)
        group = saving_group(self.environment, config.checkpoint.timeout_s)
        self.saver = AsyncCheckpointWriter(
            self.folder / "checkpoints", self.environment, config.checkpoint.keep_last, group
        )
        self.heartbeat.watch_writes(self.saver.own_work.seconds, config.checkpoint.timeout_s)
        self.machinery.step.before_update = self._before_update
        self._record_buckets()
        note = bucket_note(config, self.machinery.layout)
        if note:
            self.line.say(note)
        self.cost, self.cost_source = make_cost(config)
        if config.balance.cost == "measure" and not self.resume:
            fit = calibrate(config, self.environment, self.machinery)
            self.cost, self.cost_source = fit.model, f"warm-up fit, residual {100 * fit.residual:.1f} %"
            seed_ranks(config.train.seed, self.environment)
        if config.run.measure_peak_flops:
            self.ceiling = float(gather_floats([matmul_peak(self.environment)], self.environment).sum())
        if dist.is_initialized():
            dist.barrier()
        self.init_s = time.time() - self._process_start
        if config.mlperf.enabled and not self.resume:
            check_init_time(self.init_s, config.mlperf.division)
            self.mllog.end(constants.INIT_STOP)

    def _planned_before(self, config: Config) -> Config:
        """A resumed run keeps the buckets that were planned for it: sums over other buckets may round differently."""
        path = self.folder / "buckets.yaml"
        if not self.resume or config.communication.bucket_mb != "auto" or not path.is_file():
            return config
        planned = yaml.safe_load(path.read_text(encoding="utf-8"))["communication"]
        return config.model_copy(update={"communication": config.communication.model_copy(update=planned)})

    def _record_buckets(self) -> None:
        """What `bucket_mb: auto` chose, as a fragment that a later run's config can take, and what it was measured from."""
        record = self.machinery.buckets
        if record is None or not self.environment.is_main:
            return
        self.line.say(record.summary())
        chosen = {
            "communication": {"bucket_mb": record.bucket_mb(wire_bytes=self.machinery.engine.wire.dtype.itemsize)}
        }
        write_atomically(self.folder / "buckets.yaml", to_yaml(chosen))
        write_json(self.folder / "buckets.json", record.as_json())

    # ---- on the clock -----------------------------------------------------------------------------------------------

    def execute(self) -> Outcome:
        """Train until the target, the last step, or a signal."""
        self.prepare()
        self.clock.start()
        self.energy.start()
        if not self.resume:
            self.mllog.start(constants.RUN_START)
        self._open_data()
        if self.resume:
            self._restore()
        check_state(
            {
                "the cost of a token and of a squared token": [self.cost.linear, self.cost.quadratic],
                "the step": self.progress.step, "the next evaluation": self.progress.next_evaluation,
            },
            self.environment,
        )  # fmt: skip
        self.planner = make_planner(self.config, self.store.lengths, self.cost, self.store.manifest["max_length"])
        if self.environment.is_main:
            write_json(self.folder / "cost.json", cost_record(self.cost, self.cost_source, None))
        self.first_step = self.progress.step
        prefetcher = Prefetcher(
            self._make_batches, self.progress.step, self.config.train.max_steps, self.config.balance.prefetch
        )
        try:
            outcome = self._steps(prefetcher)
            self._say_trace(self.profile.close())
        except TrainingError:
            self.mllog.end(constants.RUN_STOP, status=constants.ABORTED)
            raise
        except OSError:
            self.heartbeat.at(self.progress.step, CHECKPOINT)
            with contextlib.suppress(RuntimeError):
                self.saver.wait()  # raises if a checkpoint has filled the disk that our log found full: all ranks say that
            raise
        finally:
            prefetcher.close()
            self._blocks.close()
        self.heartbeat.at(self.progress.step, FINISHING)
        if outcome.status != "stopped":
            self._finish_logs(outcome)
        try:
            self.saver.wait()
        except (UserError, RuntimeError) as error:  # of no use to a run that is done
            self.line.say(f"warning: {error}")
        self.line.done()
        return outcome

    def _open_data(self) -> None:
        config = self.config
        data = config.data
        self.store, self.eval_store = open_stores(config, self._vocab_sha256, self.environment)
        vocab = self._vocab_sha256 or self.store.manifest["vocab_sha256"]
        for store, sha256 in ((self.store, None), (self.eval_store, config.evaluation.sha256)):
            store.check(
                vocab_size=config.model.vocab_size, max_seq_len=data.max_seq_len, vocab_sha256=vocab, sha256=sha256
            )
        if config.evaluation.sha256 and self.environment.is_main:
            self.eval_store.check_bytes(config.evaluation.sha256)
        self.shared = find_shared_text(self.store, self.eval_store, config, self.environment)
        if self.shared.found and not self.shared.is_held_out:
            self.line.say(f"warning: {shared_text_note(config, self.shared)} (data.allow_shared_text=true)")
        ranks = config.system.node_size
        self._blocks = Scrubber(self.store, self.environment.local_rank, ranks, data.scrub_mb_per_s)
        self._blocks.start()
        check_evaluation_set(len(self.eval_store), config)
        self._redraw: Callable[..., Batch] | None = None
        if data.dynamic_masking:
            mask_id, size = mask_id_of(self.store.manifest, data.train), self.store.manifest["vocab_size"]
            self._redraw = functools.partial(redraw, seed=config.train.seed, mask_id=mask_id, vocab_size=size)
        self._evaluator: Evaluator | None = None
        self._key = resume_key(config, self.store.manifest["sha256"], self.eval_store.manifest["sha256"])
        if not self.resume:
            self.progress.next_evaluation = config.evaluation.start_samples or config.evaluation.every_samples
            self.mllog.event(constants.TRAIN_SAMPLES, len(self.store))
            self.mllog.event(
                constants.EVAL_SAMPLES, min(len(self.eval_store), config.evaluation.num_samples or len(self.eval_store))
            )
            self.mllog.event("train_dataset_sha256", self.store.manifest["sha256"])
            self.mllog.event("eval_dataset_sha256", self.eval_store.manifest["sha256"])
            self.mllog.event("eval_samples_of_training_text", [self.shared.found, self.shared.compared])

    def _make_batches(self, step: int) -> tuple[Plan, list[Batch], int, int, int]:
        """This rank's batches of a step, with the global counts that normalise the loss (background thread)."""
        plan = self.planner.plan(step)
        _ = plan.checksum  # is kept in it: computed here, no step waits for it
        rank = self.environment.rank
        try:
            batches = planned_batches(
                self.store, plan, rank, self.config.balance.strategy, self.config.data.max_seq_len,
                functools.partial(self._redraw, step=step) if self._redraw else None,
            )  # fmt: skip
        except (ValueError, IndexError) as error:
            raise explain(error, plan, rank, [], self._blocks) from error
        lengths = self.store.lengths[plan.ids].astype(np.int64)
        masked = int(self.store.num_masked[plan.ids].sum(dtype=np.int64))
        return plan, batches, masked, int(lengths.sum()), int((lengths**2).sum())

    def _steps(self, prefetcher: Prefetcher[tuple[Plan, list[Batch], int, int, int]]) -> Outcome:
        config, progress = self.config, self.progress
        train = config.train
        self.profile = StepProfile(config.run, self.environment, self.folder, self.machinery.step, progress.step)
        # A closed run evaluates at its interval alone
        self._may_evaluate_last = config.evaluation.target_accuracy is not None and (
            config.mlperf.division == "open" or not config.mlperf.enabled
        )
        self.interval = IntervalMetrics(
            self.environment, self.machinery, self.clock, progress, self.cost, config.batch.global_batch_size
        )
        self._block_start()
        if config.evaluation.at_start and progress.step == 0 and self._evaluate():
            return Outcome("success", True)
        while progress.step < train.max_steps:
            trace = self.profile.before(progress.step)
            waited = time.perf_counter()
            self.heartbeat.at(progress.step, DATA)
            with span_or_nothing(trace, "data", "wait"):
                plan, batches, masked, tokens, tokens_squared = prefetcher.next()
            inputs = StepInput(
                [to_device(b, self.environment.device, config.batch.shape_multiple) for b in batches],
                masked,
                config.batch.global_batch_size,
            )
            data_s = time.perf_counter() - waited
            lr = learning_rate(progress.step, config.optimizer.lr, config.schedule)
            if progress.step == self.first_step:
                check_state({"the plan of the first step": [plan.checksum, masked]}, self.environment)
            self.heartbeat.at(progress.step, COMPUTE)
            try:
                result = self.machinery.step(inputs, lr)
            except (RuntimeError, IndexError) as error:
                raise explain(error, plan, self.environment.rank, tokens_of(batches), self._blocks) from error
            self._say_trace(self.profile.after(progress.step))
            if progress.first_step_s is None:
                progress.first_step_s = self.clock.elapsed
            progress.step += 1
            progress.samples += config.batch.global_batch_size
            progress.tokens += tokens
            progress.tokens_squared += tokens_squared
            progress.masked += masked
            self._finite.add(plan.step, result)
            self.interval.add(plan, result, masked, data_s, lr)
            if self.environment.device.type == "cpu" and not bool(result.is_finite):  # on a GPU the next log line looks
                self._check_finite()
            last = progress.step == train.max_steps
            evaluate = progress.samples >= progress.next_evaluation or (last and self._may_evaluate_last)
            every = config.checkpoint.every_steps
            checkpoint = every > 0 and progress.step % every == 0 and not last
            boundary = progress.step % train.log_every_steps == 0 or evaluate or checkpoint or last
            stop = self._log_interval() if boundary else 0
            if evaluate and self._evaluate():
                return Outcome("success", True)
            if stop:
                self._checkpoint(wait=True)
                self.mllog.event("interrupted", progress.step, signal=signal.Signals(stop).name)
                return Outcome("stopped", False, signal.Signals(stop).name)
            if checkpoint:
                self._checkpoint()
        return Outcome("aborted" if config.evaluation.target_accuracy is not None else "success", False)

    def _before_update(self) -> None:
        """Between backward and the wait for the gradients."""
        self.heartbeat.at(self.progress.step, EXCHANGE)
        self.saver.before_update()

    def _say_trace(self, path: Path | None) -> None:
        if path:
            self.line.say(f"trace of steps: {path} (open in ui.perfetto.dev or chrome://tracing)")

    # ---- figures and alarms -----------------------------------------------------------------------------------------

    def _check_finite(self) -> None:
        """Say that a step was skipped; stop after too many. A collective where one was."""
        skipped = self._finite.check(self.progress.step - 1, self.heartbeat.hosts, self.planner)
        if skipped is None:
            return
        if self.environment.is_main:
            self.line.say(f"warning: {skipped.text}; step skipped ({skipped.in_a_row} in a row)")
            self.metrics.write("skipped", self.progress.step, {"bad_step": skipped.step, "ranks": skipped.ranks})
        if skipped.fatal:
            raise TrainingError(skipped.fatal)

    def _log_interval(self) -> int:
        """Exchange figures and flags between ranks, write a line. Returns the signal at which all ranks shall stop, or 0."""
        progress, train = self.progress, self.config.train
        if not self.interval.steps:
            return 0
        self.heartbeat.at(progress.step, FIGURES)
        if self.environment.device.type == "cuda":
            self._check_finite()
        self._finite.forget_blame()
        found = self.interval.exchange(self.stop.number, self._alarm() is not None)
        self.heartbeat.at(progress.step, LOGGING)
        if found.strayed is not None:
            host = self.heartbeat.hosts[found.strayed]
            raise UserError(
                f"rank {found.strayed} ({host}) planned other samples than rank 0 in the {found.steps} steps before step "
                f"{progress.step}, so these steps are wrong and are not saved; look at the data and memory of that node, then "
                "--resume"
            )
        self.energy.tick()
        if self.environment.is_main:
            clip = self.machinery.engine.clip_statistics.read()
            self.metrics.write("step", progress.step, {**found.values, "clip": clip})
            accuracy = progress.evaluations[-1]["accuracy"] if progress.evaluations else None
            remaining = (train.max_steps - progress.step) * found.seconds / found.steps
            rate, loss = found.values["samples_per_s"], found.values["loss"]
            self.line.update(
                progress.step, progress.samples, rate, loss, accuracy, self.config.evaluation.target_accuracy, remaining
            )
        if found.alarmed is not None:
            self._stop_for(found.alarmed)
        return found.signal

    def _alarm(self) -> str | None:
        """What this rank's background threads have found wrong."""
        if self.saver.failed is not None:
            return self.saver.failed
        found = self._blocks.alarm
        return f"rank {self.environment.rank} on {socket.gethostname()}: {found}" if found else None

    def _stop_for(self, rank: int) -> None:
        """All ranks stop for what `rank` has found, and say the same. What is sound is saved first. A collective."""
        text, sound = broadcast_value((self._alarm(), self._blocks.vanished and self.saver.failed is None), rank)
        if sound and self._checkpoint(wait=True):  # a name has gone, and no wrong byte was read
            text = f"{text}, then --resume: step {self.progress.step:,} is saved"
        raise UserError(str(text))

    # ---- evaluation, checkpoints, ends ------------------------------------------------------------------------------

    def _block_start(self) -> None:
        self.mllog.start(
            constants.BLOCK_START, first_epoch_num=self.progress.samples,
            epoch_count=self.progress.next_evaluation - self.progress.samples,
        )  # fmt: skip

    def _evaluate(self) -> bool:
        """Evaluate on the clock. Returns whether the target is reached."""
        progress, train = self.progress, self.config.train
        samples = progress.samples
        self.heartbeat.at(progress.step, EVALUATION)
        self.mllog.end(constants.BLOCK_STOP, first_epoch_num=samples)
        with (
            self.clock.pause("evaluation"),
            self.mllog.interval(constants.EVAL_START, constants.EVAL_STOP, epoch_num=samples),
        ):
            if self._evaluator is None:
                self._evaluator = Evaluator(
                    self.eval_store, self.config.evaluation, self.config.batch.shape_multiple,
                    self.cost, self.environment,
                )  # fmt: skip
            result: Evaluation = self._evaluator(
                self.machinery.model,
                lambda: self.heartbeat.at(progress.step, EVALUATION),
                lambda: self.heartbeat.at(progress.step, FIGURES),
            )
            self.mllog.event(constants.EVAL_ACCURACY, result.mlm_accuracy, epoch_num=samples)
        self.mllog.throughput(samples / self.clock.training, progress.step)
        while progress.next_evaluation <= samples:
            progress.next_evaluation += self.config.evaluation.every_samples
        record = {
            "samples": samples, "time_s": self.clock.elapsed, "accuracy": result.mlm_accuracy, "mlm_loss": result.mlm_loss,
            "nsp_accuracy": result.nsp_accuracy, "nsp_loss": result.nsp_loss,
        }  # fmt: skip
        progress.evaluations.append({"step": progress.step, **record})
        self.metrics.write("eval", progress.step, record)
        self.line.say(
            f"evaluation at {samples:,} samples, {self.clock.elapsed:.1f} s: masked-LM accuracy {result.mlm_accuracy:.4f}, "
            f"loss {result.mlm_loss + result.nsp_loss:.4f}"
        )
        reached = (
            self.config.evaluation.target_accuracy is not None
            and result.mlm_accuracy >= self.config.evaluation.target_accuracy
        )
        if not reached and progress.step < train.max_steps:
            self._block_start()
        return reached

    def _checkpoint(self, wait: bool = False) -> bool:
        """Begin to write a checkpoint of the last step; with `wait`, until it is on disk. Whether there was one to write."""
        if self._finite.skips_now:  # some rank's weights may not be finite
            self.saver.wait()
            self.line.say("warning: the last step was skipped: nothing is saved now, the checkpoint before counts")
            return False
        machinery, began = self.machinery, time.perf_counter()
        self.heartbeat.at(self.progress.step, CHECKPOINT)
        with self.clock.pause("checkpoint"):
            self._add_energy()
            state = {
                "progress": self.progress.state_dict(),
                "clock": self.clock.state_dict(),
                "loss_scale": machinery.loss_scale.state_dict() if machinery.loss_scale else None,
                "optimizer": optimizer_counts(machinery),
                "cost": [self.cost.linear, self.cost.quadratic],
            }
            description = {
                "step": self.progress.step, "world_size": self.environment.world_size, "key": self._key,
                "state": json.loads(json.dumps(state, default=float)),
            }  # fmt: skip
            own = rank_state(machinery, self.environment)
            self.saver.start(captured(machinery, self.environment), own, description, began)
            if wait or not self.config.checkpoint.async_save:
                self.saver.wait()
        return True

    def _restore(self) -> None:
        path = latest_valid_checkpoint(self.folder / "checkpoints", self.environment, self.line.say)
        state = load_checkpoint(path, self._key, self.config, self.machinery, self.environment, self.line.say)
        self.progress.load_state_dict(state["progress"])
        self.progress.sessions += 1
        self.clock.load_state_dict(state["clock"])
        if CostModel(*state["cost"]) != self.cost:  # a fit cannot be repeated, and another one would plan other steps
            self.cost, self.cost_source = CostModel(*state["cost"]), "the resumed run"
        self.mllog.event("resumed", self.progress.step, checkpoint=path.name)
        self.line.say(f"resumed from {path} at step {self.progress.step:,}, {self.progress.samples:,} samples")

    def _finish_logs(self, outcome: Outcome) -> None:
        self.time_to_train = self.clock.elapsed
        if not self.progress.evaluations or self.progress.evaluations[-1]["step"] != self.progress.step:
            self.mllog.end(constants.BLOCK_STOP, first_epoch_num=self.progress.samples)
        status = constants.SUCCESS if outcome.status == "success" else constants.ABORTED
        self.mllog.end(constants.RUN_STOP, status=status, resumed=self.progress.sessions > 1)
        self.mllog.close()
        self._add_energy(last=True)
        if self.config.checkpoint.save_final_model and self.environment.is_main:
            model, folder = self.machinery.model, self.folder / "model"
            export_model(model, self.config, self.store.manifest, folder, self.line.say)

    def _add_energy(self, last: bool = False) -> None:
        """Add what all nodes took since the last call. A collective."""
        news = gather_floats(self.energy.news(last=last), self.environment)
        self.progress.joules = summed(self.progress.joules, news)

    def peak_memory(self) -> dict[str, float]:
        """Largest over ranks: host MiB (resident), device MiB (allocated)."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        cuda = self.environment.device.type == "cuda"
        device = torch.cuda.max_memory_allocated() / 2**20 if cuda else 0.0
        table = gather_floats([host, device], self.environment)
        return {"host_mib": float(table[:, 0].max()), "device_mib": float(table[:, 1].max())}

    def environment_record(self) -> dict[str, Any]:
        """Versions, hardware and choices, for the record."""
        return {**describe(self.environment), "attention_backend": self.machinery.model.backend}
