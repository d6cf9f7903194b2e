"""A run as one object: all sections, and what they must have in common."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from bert_fast.config.balance import BalanceConfig
from bert_fast.config.batch import BatchConfig
from bert_fast.config.checkpoint import CheckpointConfig
from bert_fast.config.choices import ATTENTION_BACKENDS, CLIP_MODES, SHARDED_ENGINES
from bert_fast.config.communication import CommunicationConfig
from bert_fast.config.data import DataConfig
from bert_fast.config.evaluation import EvaluationConfig
from bert_fast.config.mlperf import MlperfConfig
from bert_fast.config.model import ModelConfig
from bert_fast.config.optimizer import OptimizerConfig
from bert_fast.config.recovery import RecoveryConfig
from bert_fast.config.run import RunConfig
from bert_fast.config.schedule import ScheduleConfig
from bert_fast.config.section import MOST_SAMPLES_PER_RANK, Section
from bert_fast.config.system import SystemConfig
from bert_fast.config.train import TrainConfig


class Config(Section):
    run: RunConfig = Field(default_factory=RunConfig, description="name and output of the run")
    model: ModelConfig = Field(default_factory=ModelConfig, description="shape of BERT")
    data: DataConfig = Field(default_factory=DataConfig, description="stores of samples")
    batch: BatchConfig = Field(description="batch arithmetic")
    balance: BalanceConfig = Field(default_factory=BalanceConfig, description="which rank gets which sample")
    communication: CommunicationConfig = Field(
        default_factory=CommunicationConfig, description="buckets, clipping, collectives"
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="the update rule")
    schedule: ScheduleConfig = Field(description="the learning rate over steps")
    train: TrainConfig = Field(description="the loop: seeds, precision, steps")
    evaluation: EvaluationConfig = Field(description="the held-out store, when it is evaluated, and the target")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="starting weights, checkpoints, the final model"
    )
    system: SystemConfig = Field(default_factory=SystemConfig, description="ranks, device, threads")
    recovery: RecoveryConfig = Field(
        default_factory=RecoveryConfig, description="restarts after a failure, spare nodes"
    )
    mlperf: MlperfConfig = Field(default_factory=MlperfConfig, description="the MLPerf log")

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        batch, world = self.batch, self.system.world_size
        product = batch.micro_batch_size * world * batch.gradient_accumulation_steps
        if batch.global_batch_size != product:
            raise ValueError(
                f"batch.global_batch_size={batch.global_batch_size} is not micro_batch_size x world_size x gradient_accumulation_steps = "
                f"{batch.micro_batch_size} x {world} x {batch.gradient_accumulation_steps} = {product}; set batch.global_batch_size={product} "
                "or change a factor"
            )
        if self.data.max_seq_len > self.model.max_positions:
            raise ValueError(
                f"data.max_seq_len={self.data.max_seq_len} does not fit the position table of "
                f"model.max_positions={self.model.max_positions}; raise model.max_positions or shorten the samples"
            )
        per_rank = batch.micro_batch_size * batch.gradient_accumulation_steps
        if per_rank > MOST_SAMPLES_PER_RANK:
            raise ValueError(
                f"batch.micro_batch_size x batch.gradient_accumulation_steps = {per_rank:,} samples of a rank in a step; "
                f"at most {MOST_SAMPLES_PER_RANK:,}"
            )
        balance = self.balance
        if balance.strata_counts is not None and sum(balance.strata_counts) != per_rank:
            raise ValueError(
                f"balance.strata_counts={balance.strata_counts} add up to {sum(balance.strata_counts)} and a rank takes "
                f"micro_batch_size x gradient_accumulation_steps = {per_rank} samples a step; make them add up to {per_rank}"
            )
        if balance.strata and balance.strata[-1] != self.data.max_seq_len:
            raise ValueError(
                f"balance.strata={balance.strata} must end with data.max_seq_len={self.data.max_seq_len}, so that every "
                "sample is in a stratum"
            )
        if balance.max_tokens is not None and balance.max_tokens < self.data.max_seq_len:
            raise ValueError(
                f"balance.max_tokens={balance.max_tokens} is less than one sample of data.max_seq_len="
                f"{self.data.max_seq_len} tokens; raise it"
            )
        if balance.num_packs is not None and balance.num_packs > batch.micro_batch_size:
            raise ValueError(
                f"balance.num_packs={balance.num_packs} is more than the batch.micro_batch_size={batch.micro_batch_size} samples that "
                "are packed; at most one row a sample"
            )
        if world % self.system.node_size:
            raise ValueError(
                f"system.ranks_per_node={self.system.node_size} does not divide system.world_size={world}; "
                f"set ranks_per_node to a divisor such as {math.gcd(world, self.system.node_size)}"
            )
        backend = ATTENTION_BACKENDS.get(self.model.attention_backend)
        if self.model.attention_dropout > 0 and backend is not None and not backend.has_dropout:
            raise ValueError(
                f"model.attention_backend={self.model.attention_backend} has no dropout; set model.attention_dropout=0 or use "
                "flash or padded"
            )
        communication = self.communication
        if self.optimizer.step_per_bucket:
            if communication.engine != "bucketed":
                raise ValueError(
                    f"optimizer.step_per_bucket=true needs communication.engine=bucketed and it is {communication.engine}; change one"
                )
            if not CLIP_MODES[communication.clip].updates_by_bucket:
                fitting = " or ".join(name for name, mode in CLIP_MODES.items() if mode.updates_by_bucket)
                raise ValueError(
                    f"optimizer.step_per_bucket=true needs communication.clip={fitting}: with {communication.clip} "
                    "no update is known before the last bucket; set optimizer.step_per_bucket=false"
                )
        if self.optimizer.step_per_bucket and self.optimizer.use_apex:
            raise ValueError(
                "optimizer.step_per_bucket=true steps over some tensors at a time, and apex's optimizers count their steps as a whole; "
                "set optimizer.step_per_bucket=false or optimizer.use_apex=false"
            )
        if communication.shard_optimizer and communication.engine not in SHARDED_ENGINES:
            raise ValueError(
                f"communication.shard_optimizer needs communication.engine={' or '.join(SHARDED_ENGINES)}, not "
                f"{communication.engine}; change one"
            )
        if communication.shard_optimizer and self.optimizer.use_apex:
            raise ValueError(
                "communication.shard_optimizer updates pieces of tensors, which apex's optimizers do not know; "
                "set optimizer.use_apex=false"
            )
        if self.mlperf.division == "closed" and self.optimizer.name != "lamb":
            raise ValueError(
                f"mlperf.division=closed allows LAMB only and optimizer.name={self.optimizer.name}; "
                "set optimizer.name=lamb or mlperf.division=open"
            )
        if self.train.precision in ("fp16", "fp8") and self.system.device == "cpu":
            raise ValueError(
                f"train.precision={self.train.precision} needs CUDA; on CPU set train.precision=bf16 or fp32"
            )
        return self


def sections() -> dict[str, type[Section]]:
    """Name of every section of `Config` and its model, in order."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def as_plain(config: Config) -> dict[str, Any]:
    """The config as plain YAML/JSON values, defaults included."""
    return config.model_dump(mode="json")
