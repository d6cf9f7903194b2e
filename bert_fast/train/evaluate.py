"""Masked-LM accuracy on the held-out store, sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
import torch.distributed as dist
from mlperf_logging.mllog import constants

from bert_fast.balance.assign import karmarkar_karp
from bert_fast.balance.cost import CostModel
from bert_fast.config import Config, EvaluationConfig
from bert_fast.config.choices import OBJECTIVES, attribute
from bert_fast.data.store import Store
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.report.schema import EvaluationLine
from bert_fast.train.batches import to_device
from bert_fast.train.checkpoint.train_state import TrainState
from bert_fast.train.collectives import broadcast_value, max_over_ranks
from bert_fast.train.context import RunContext
from bert_fast.train.environment import Environment
from bert_fast.train.health.phases import EVALUATION, METRICS_SYNC
from bert_fast.train.step import do_nothing


@dataclass(frozen=True)
class Evaluation:
    """Over the whole held-out set. None of next sentences: the model does not predict them.

    With the contrastive objective the accuracy is that of finding a query's positive, the loss that of choosing it, and there
    are the four numbers of `EvaluationLine`; else None.
    """

    mlm_accuracy: float
    mlm_loss: float
    nsp_accuracy: float | None
    nsp_loss: float | None
    at_10: float | None = None
    mrr: float | None = None
    alignment: float | None = None
    uniformity: float | None = None


class Evaluator:
    """Reads its shard once, keeps it on the device, evaluates it as often as asked.

    batches: this rank's samples, like lengths together
    """

    def __init__(
        self,
        store: Store,
        config: EvaluationConfig,
        shape_multiple: int,
        cost: CostModel,
        environment: Environment,
    ) -> None:
        self._environment = environment
        self._passes = 0
        total = min(len(store), config.num_samples or len(store))
        lengths = np.asarray(store.lengths[:total])
        self._num_samples = total
        self._num_masked = int(np.asarray(store.num_masked[:total]).sum(dtype=np.int64))
        mine = shard_samples(cost(lengths), environment.world_size)[environment.rank]
        mine = mine[np.argsort(-lengths[mine], kind="stable")]  # like lengths together
        self.batches: list[BertInput] = [
            to_device(store.batch(mine[start : start + config.batch_size]), environment.device, shape_multiple)
            for start in range(0, len(mine), config.batch_size)
        ]
        # Of one sample: what a rank without a further batch runs where the others' forward passes need it
        self._uncounted = to_device(store.batch(np.zeros(1, np.int64)), environment.device, shape_multiple)

    def meet_in_every_batch(self) -> None:
        """From now on all ranks run as many forward passes, as each one needs all of them. A collective."""
        most = max_over_ranks(np.array([len(self.batches)]), self._environment.device)
        self._passes = int(most[0])

    @torch.no_grad()
    def __call__(
        self,
        model: BertForPretraining,
        on_batch: Callable[[], None] = do_nothing,
        on_sync: Callable[[], None] = do_nothing,
    ) -> Evaluation:
        """Evaluate. A collective: all ranks call it together.

        Args:
            on_batch: called before every batch.
            on_sync: called before the wait for the other ranks.
        """
        environment = self._environment
        sums = torch.zeros(4, dtype=torch.float64, device=environment.device)
        nothing = torch.zeros((), device=environment.device)
        was_training = model.training
        model.eval()
        with torch.autocast(environment.device.type, environment.dtype, enabled=environment.autocast):
            for batch in self.batches:
                on_batch()
                losses = model(batch, with_accuracy=True)
                sums += torch.stack([(nothing if x is None else x).double() for x in losses])
            for _ in range(len(self.batches), self._passes):
                on_batch()
                model(self._uncounted, with_accuracy=True)
        model.train(was_training)
        on_sync()
        if dist.is_initialized():
            dist.all_reduce(sums)
        mlm_loss, nsp_loss, mlm_correct, nsp_correct = sums.tolist()
        return Evaluation(
            mlm_correct / self._num_masked,
            mlm_loss / self._num_masked,
            nsp_correct / self._num_samples if model.config.next_sentence else None,
            nsp_loss / self._num_samples if model.config.next_sentence else None,
        )


def make_evaluator(store: Store, config: Config, cost: CostModel, environment: Environment) -> Evaluator:
    """Of masked-LM accuracy, for a run."""
    return Evaluator(store, config.evaluation, config.batch.shape_multiple, cost, environment)


class Decision(Enum):
    """What follows from an evaluation."""

    GO_ON = "go on"
    REACHED = "the target is reached"
    STOP = "whoever follows the run wants no more of it"


class EvaluationRunner:
    """Evaluates on the clock when it is time, logs it, and says what follows."""

    def __init__(self, context: RunContext, state: TrainState, store: Store) -> None:
        self._context, self._state, self._store = context, state, store
        self._config = context.config.evaluation
        self._evaluator: Evaluator | None = None  # reads its samples at the first evaluation
        # A closed run evaluates at its interval alone
        self._may_evaluate_last = self._config.target_accuracy is not None and (
            context.config.mlperf.division == "open" or not context.config.mlperf.enabled
        )

    @property
    def is_due_at_start(self) -> bool:
        """Whether the starting weights are evaluated."""
        return self._config.at_start and self._state.progress.step == 0

    def is_due(self, is_last: bool) -> bool:
        """Whether the step just finished is followed by an evaluation; `is_last`: it is the run's last."""
        progress = self._state.progress
        return progress.samples >= progress.next_evaluation or (is_last and self._may_evaluate_last)

    def begin_block(self) -> None:
        """MLPerf's block of training up to the next evaluation begins."""
        progress = self._state.progress
        self._context.mllog.start(
            constants.BLOCK_START,
            first_epoch_num=progress.samples,
            epoch_count=progress.next_evaluation - progress.samples,
        )

    def run(self) -> Decision:
        """Evaluate. A collective."""
        context, progress, config = self._context, self._state.progress, self._config
        samples, heartbeat = progress.samples, context.heartbeat
        heartbeat.at(progress.step, EVALUATION)
        context.mllog.end(constants.BLOCK_STOP, first_epoch_num=samples)
        with (
            context.clock.pause("evaluation"),
            context.mllog.interval(constants.EVAL_START, constants.EVAL_STOP, epoch_num=samples),
        ):
            if self._evaluator is None:
                make = attribute(OBJECTIVES[context.config.train.objective].evaluator)
                evaluator: Evaluator = make(self._store, context.config, self._state.cost, context.environment)
                self._evaluator = evaluator
                if not self._state.components.engine.holds_all_weights:
                    self._evaluator.meet_in_every_batch()
            with self._state.components.evaluated_weights():
                result = self._evaluator(
                    self._state.components.model,
                    lambda: heartbeat.at(progress.step, EVALUATION),
                    lambda: heartbeat.at(progress.step, METRICS_SYNC),
                )
            context.mllog.event(constants.EVAL_ACCURACY, result.mlm_accuracy, epoch_num=samples)
        context.mllog.throughput(samples / context.clock.training, progress.step)
        while progress.next_evaluation <= samples:
            progress.next_evaluation += config.every_samples
        line = self._record(result)
        if config.target_accuracy is not None and result.mlm_accuracy >= config.target_accuracy:
            return Decision.REACHED
        if context.on_evaluation is not None and broadcast_value(context.on_evaluation(line)):
            return Decision.STOP
        if progress.step < context.config.train.max_steps:
            self.begin_block()
        return Decision.GO_ON

    def _record(self, result: Evaluation) -> EvaluationLine:
        context, progress = self._context, self._state.progress
        line = EvaluationLine(
            step=progress.step,
            samples=progress.samples,
            time_s=context.clock.elapsed,
            accuracy=result.mlm_accuracy,
            mlm_loss=result.mlm_loss,
            nsp_accuracy=result.nsp_accuracy,
            nsp_loss=result.nsp_loss,
            at_10=result.at_10,
            mrr=result.mrr,
            alignment=result.alignment,
            uniformity=result.uniformity,
        )
        progress.evaluations.append(line)
        context.metrics.write(line)
        what = "masked-LM accuracy" if result.mrr is None else "retrieval accuracy@1"
        rest = "" if result.mrr is None else f", @10 {result.at_10:.4f}, MRR {result.mrr:.4f}"
        context.log(
            f"evaluation at {progress.samples:,} samples, {context.clock.elapsed:.1f} s: {what} "
            f"{result.mlm_accuracy:.4f}{rest}, loss {line.loss:.4f}"
        )
        return line


def shard_samples(costs: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Samples of each rank, int64, every sample on exactly one: the balanced assignment for whole rows, the rest one each."""
    whole = len(costs) // num_ranks * num_ranks
    rest = np.arange(whole, len(costs))
    rows = karmarkar_karp(costs[:whole], num_ranks) if whole else np.zeros((num_ranks, 0), np.int64)
    return [np.concatenate([rows[rank], rest[rank : rank + 1]]).astype(np.int64) for rank in range(num_ranks)]
