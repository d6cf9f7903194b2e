"""What a step is made of, built and warmed up before the clock (setup/build.py)."""

from __future__ import annotations

from dataclasses import dataclass

from bert_fast.communication.bucket_record import BucketRecord
from bert_fast.communication.engine import Engine
from bert_fast.model.bert import BertForPretraining
from bert_fast.train.loss_scale import LossScale
from bert_fast.train.rank_optimizer import RankOptimizer
from bert_fast.train.step import Step


@dataclass(frozen=True)
class TrainComponents:
    """The parts of a step of this rank, with the weights a run starts from.

    bucket_record: what `communication.bucket_mb: auto` measured and chose; None where the config gives the sizes
    """

    model: BertForPretraining
    engine: Engine
    optimizer: RankOptimizer
    loss_scale: LossScale | None
    step: Step
    bucket_record: BucketRecord | None = None
