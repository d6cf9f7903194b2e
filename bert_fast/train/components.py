"""What a step is made of, built and warmed up before the clock (setup/build.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bert_fast.communication.bucket_record import BucketRecord
from bert_fast.communication.engine import Engine
from bert_fast.memory.recomputation import Recomputation
from bert_fast.model.bert import BertForPretraining
from bert_fast.optim.averaging import WeightAverage
from bert_fast.optim.build import RunOptimizer
from bert_fast.train.loss_scale import LossScale
from bert_fast.train.rank_optimizer import RankOptimizer
from bert_fast.train.step import Step


@dataclass(frozen=True)
class TrainComponents:
    """The parts of a step of this rank, with the weights a run starts from.

    bucket_record: what `communication.bucket_mb: auto` measured and chose; None where the config gives the sizes
    average:       of the weights, to be evaluated in their place; None where nothing is averaged
    recomputation: what backward computes again; None: nothing
    """

    model: BertForPretraining
    engine: Engine
    optimizer: RankOptimizer
    loss_scale: LossScale | None
    step: Step
    bucket_record: BucketRecord | None = None
    average: WeightAverage | None = None
    recomputation: Recomputation | None = None

    def whole_model(self) -> BertForPretraining:
        """The model with all weights: itself, or where they are in parts a copy on the host. A collective then."""
        if self.engine.holds_all_weights:
            return self.model
        weights = self.engine.whole_weights()
        device = next(iter(weights.values())).device
        with torch.device("meta"):
            model = BertForPretraining(self.model.config, self.model.backend)
        model.to_empty(device=device).load_state_dict(weights)
        return model

    @contextmanager
    def evaluated_weights(self) -> Iterator[None]:
        """Inside, the model has the weights that are evaluated and exported; afterwards the trained ones, bit for bit.

        They are an average's or the optimizer's, where either has others than the trained ones. Those are kept meanwhile, whole
        on every rank or in parts as they are, so that putting them back takes no collective. Entering it is one.
        """
        self.engine.wait_pending()
        source: WeightAverage | RunOptimizer = self.average or self.optimizer.optimizer
        if not source.evaluates_other_weights:
            yield
            return
        whole = self.engine.holds_all_weights
        held = self.model.parameters() if whole else (each.parameter for each in self.optimizer.slices)
        parameters = [parameter.detach() for parameter in held]
        trained = [parameter.clone() for parameter in parameters]
        try:
            source.write_evaluated_weights()
            self.engine.forget_gathered_weights()
            self.engine.gather_weights()
            self.engine.wait_pending()
            yield
        finally:
            torch._foreach_copy_(parameters, trained)
            self.engine.forget_gathered_weights()
