"""A run as one object: all sections, and what they must have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import Field, model_validator

from bert_fast.config.averaging import AveragingConfig
from bert_fast.config.balance import BalanceConfig
from bert_fast.config.batch import BatchConfig
from bert_fast.config.checkpoint import CheckpointConfig
from bert_fast.config.choices import (
    ATTENTION_BACKENDS,
    CLIP_MODES,
    DECAYS,
    ENGINES,
    OBJECTIVES,
    OPTIMIZERS,
    SHARDED_ENGINES,
    STRATEGIES,
    WIRE_FORMATS,
)
from bert_fast.config.communication import CommunicationConfig
from bert_fast.config.contrastive import ContrastiveConfig
from bert_fast.config.data import DataConfig
from bert_fast.config.effects import idle_settings
from bert_fast.config.evaluation import EvaluationConfig
from bert_fast.config.memory import MemoryConfig
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
    """All settings of a run. `bert_fast.config.load.load_config` reads one; every part gets its own section of it."""

    run: RunConfig = Field(default_factory=RunConfig, description="name, folder and extra output of the run")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the shape of BERT")
    data: DataConfig = Field(default_factory=DataConfig, description="the training store and how it is read")
    batch: BatchConfig = Field(description="how many samples a step, a rank and a forward pass take")
    balance: BalanceConfig = Field(default_factory=BalanceConfig, description="which rank gets which sample")
    communication: CommunicationConfig = Field(
        default_factory=CommunicationConfig, description="buckets, clipping and collectives"
    )
    memory: MemoryConfig = Field(
        default_factory=MemoryConfig, description="what a rank keeps in memory, and what it computes again"
    )
    contrastive: ContrastiveConfig = Field(
        default_factory=ContrastiveConfig, description="the contrastive objective: what is compared with what"
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="the update rule")
    schedule: ScheduleConfig = Field(description="the learning rate over steps")
    averaging: AveragingConfig = Field(
        default_factory=AveragingConfig, description="averages of the weights, to be evaluated in their place"
    )
    train: TrainConfig = Field(description="the loop: seeds, precision and number of steps")
    evaluation: EvaluationConfig = Field(description="the held-out store, when it is evaluated, and the target")
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="starting weights, checkpoints and the final model"
    )
    system: SystemConfig = Field(default_factory=SystemConfig, description="ranks, devices and threads")
    recovery: RecoveryConfig = Field(
        default_factory=RecoveryConfig, description="restarts after a failure, and spare nodes"
    )
    mlperf: MlperfConfig = Field(default_factory=MlperfConfig, description="the MLPerf log")

    @property
    def texts_per_sample(self) -> int:
        """Sequences that a sample is: 1, or those of a pair with its hard negatives."""
        return 2 + self.contrastive.negatives if OBJECTIVES[self.train.objective].on_pairs else 1

    @property
    def longest_sample(self) -> int:
        """Tokens of the longest sample that is allowed, all of its sequences together."""
        return self.texts_per_sample * self.data.max_seq_len

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> Config:
        _raise_if_any(idle_settings(self))
        return self

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        _raise_if_any(text for check in CROSS_CHECKS if (text := check(self)) is not None)
        return self


def sections() -> dict[str, type[Section]]:
    """Name of every section of `Config` and its model, in order."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def as_plain(config: Config) -> dict[str, Any]:
    """The config as plain YAML/JSON values, defaults included."""
    return config.model_dump(mode="json")


def _raise_if_any(problems: Iterable[str]) -> None:
    text = "; ".join(problems)
    if text:
        raise ValueError(text)


# ---- what no section can check by itself: each function returns what is wrong and how to fix it, or None ------------------


def _global_batch_is_the_product(config: Config) -> str | None:
    batch, world = config.batch, config.system.world_size
    factors = {
        "micro_batch_size": batch.micro_batch_size,
        "world_size": world,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
    }
    if batch.virtual_ranks > 1:
        factors["virtual_ranks"] = batch.virtual_ranks
    product = math.prod(factors.values())
    if batch.global_batch_size == product:
        return None
    return (
        f"batch.global_batch_size={batch.global_batch_size} is not {' x '.join(factors)} = "
        f"{' x '.join(map(str, factors.values()))} = {product}; set batch.global_batch_size={product} or change a factor"
    )


def _samples_per_rank_can_be_planned(config: Config) -> str | None:
    if config.batch.samples_per_rank <= MOST_SAMPLES_PER_RANK:
        return None
    return (
        f"batch.micro_batch_size x batch.gradient_accumulation_steps = {config.batch.samples_per_rank:,} samples per rank and "
        f"step are too many; set them to a product of at most {MOST_SAMPLES_PER_RANK:,}"
    )


def _samples_fit_the_position_table(config: Config) -> str | None:
    if config.data.max_seq_len <= config.model.max_positions:
        return None
    return (
        f"data.max_seq_len={config.data.max_seq_len} does not fit the position table of "
        f"model.max_positions={config.model.max_positions}; raise model.max_positions or lower data.max_seq_len"
    )


def _strata_counts_add_up(config: Config) -> str | None:
    counts, wanted = config.balance.strata_counts, config.batch.samples_per_rank
    if counts is None or sum(counts) == wanted:
        return None
    return (
        f"balance.strata_counts={counts} add up to {sum(counts)}, and a rank takes micro_batch_size x "
        f"gradient_accumulation_steps = {wanted} samples per step; make them add up to {wanted}"
    )


def _strata_reach_the_longest_sample(config: Config) -> str | None:
    strata, longest = config.balance.strata, config.longest_sample
    if not strata or strata[-1] == longest:
        return None
    return f"balance.strata={strata} must end with data.max_seq_len={longest}, so that every sample is in a stratum"


def _longest_sample_fits_a_micro_batch(config: Config) -> str | None:
    most, longest = config.balance.max_tokens, config.longest_sample
    if most is None or most >= longest:
        return None
    return (
        f"balance.max_tokens={most} is less than one sample of data.max_seq_len={longest} tokens; "
        f"set it to at least {longest}"
    )


def _packs_are_not_empty(config: Config) -> str | None:
    packs, samples = config.balance.num_packs, config.batch.micro_batch_size
    if packs is None or packs <= samples:
        return None
    return (
        f"balance.num_packs={packs} is more than the batch.micro_batch_size={samples} samples that are packed; "
        f"set it to at most {samples}"
    )


def _nodes_are_full(config: Config) -> str | None:
    world, node = config.system.world_size, config.system.node_size
    if world % node == 0:
        return None
    return (
        f"system.ranks_per_node={node} does not divide system.world_size={world}; set ranks_per_node to a divisor such as "
        f"{math.gcd(world, node)}"
    )


def _attention_backend_has_the_dropout(config: Config) -> str | None:
    backend = config.model.attention_backend
    choice = ATTENTION_BACKENDS.get(backend)
    if config.model.attention_dropout == 0 or choice is None or choice.has_dropout:
        return None
    return f"model.attention_backend={backend} has no dropout; set model.attention_dropout=0 or use flash or padded"


def _fp8_has_all_rows(config: Config) -> str | None:
    if config.train.precision != "fp8" or config.model.last_layer == "all":
        return None
    return (
        f"model.last_layer={config.model.last_layer} with train.precision=fp8: Transformer Engine needs numbers of rows that "
        "are multiples of 16, and the masked and [CLS] tokens of a batch are any number; set model.last_layer=all"
    )


def _engine_can_step_per_bucket(config: Config) -> str | None:
    engine = config.communication.engine
    if not config.optimizer.step_per_bucket or ENGINES[engine].steps_per_bucket:
        return None
    able = " or ".join(name for name, choice in ENGINES.items() if choice.steps_per_bucket)
    return (
        f"optimizer.step_per_bucket=true needs communication.engine={able} and it is {engine}; set "
        f"communication.engine={able} or optimizer.step_per_bucket=false"
    )


def _clipping_can_step_per_bucket(config: Config) -> str | None:
    clip = config.communication.clip
    if not config.optimizer.step_per_bucket or CLIP_MODES[clip].updates_by_bucket:
        return None
    able = " or ".join(name for name, mode in CLIP_MODES.items() if mode.updates_by_bucket)
    return (
        f"optimizer.step_per_bucket=true needs communication.clip={able}: with {clip} no update is "
        "known before the last bucket is reduced; set optimizer.step_per_bucket=false or another communication.clip"
    )


def _optimizer_can_step_per_bucket(config: Config) -> str | None:
    name = config.optimizer.name
    reason = OPTIMIZERS[name].not_per_bucket or _needs_all_of_a_group(config)
    if not config.optimizer.step_per_bucket or not reason:
        return None
    return f"optimizer.step_per_bucket=true with optimizer.name={name}: {reason}; set optimizer.step_per_bucket=false"


def _needs_all_of_a_group(config: Config) -> str:
    if config.optimizer.name != "lamb" or config.optimizer.trust == "tensor":
        return ""
    return f"optimizer.trust={config.optimizer.trust} needs norms over several tensors, which lie in several buckets"


def _apex_cannot_step_per_bucket(config: Config) -> str | None:
    if not (config.optimizer.step_per_bucket and config.optimizer.use_apex):
        return None
    return (
        "optimizer.step_per_bucket=true updates some tensors at a time, and apex's optimizers count their steps for all of "
        "them; set optimizer.step_per_bucket=false or optimizer.use_apex=false"
    )


def _engine_can_shard(config: Config) -> str | None:
    engine = config.communication.engine
    if not config.communication.shard_optimizer or engine in SHARDED_ENGINES:
        return None
    able = " or ".join(SHARDED_ENGINES)
    return (
        f"communication.shard_optimizer=true needs communication.engine={able} and it is {engine}; set "
        f"communication.engine={able} or communication.shard_optimizer=false"
    )


def _optimizer_can_shard(config: Config) -> str | None:
    name, engine = config.optimizer.name, config.communication.engine
    reason = OPTIMIZERS[name].not_sharded
    if not reason:
        return None
    if ENGINES[engine].shards:
        return f"communication.engine={engine} with optimizer.name={name}: {reason}; set communication.engine=bucketed"
    if not config.communication.shard_optimizer:
        return None
    return f"communication.shard_optimizer=true with optimizer.name={name}: {reason}; set communication.shard_optimizer=false"


def _engine_can_clip(config: Config) -> str | None:
    engine, clip = config.communication.engine, config.communication.clip
    mode, reason = CLIP_MODES[clip], ENGINES[engine].not_clipped
    if not reason or not mode.bounds_sums:
        return None
    able = " or ".join(name for name, each in CLIP_MODES.items() if not each.bounds_sums)
    return (
        f"communication.clip={clip} with communication.engine={engine}: {reason}; set communication.clip={able}, or "
        "communication.engine=bucketed with shard_optimizer=true"
    )


def _sharded_weights_have_their_settings(config: Config) -> str | None:
    """What torch's hooks, which gather and reduce by themselves, leave room for."""
    communication = config.communication
    if not ENGINES[communication.engine].shards:
        return None
    engine = f"communication.engine={communication.engine}"
    if communication.reduce_dtype == "fp16":
        return (
            f"communication.reduce_dtype=fp16 with {engine}, which does not scale sums into its range; set bf16 or fp32"
        )
    if config.train.compile:
        return f"train.compile=true with {engine}: compiled halves of a layer do not run its hooks; set train.compile=false"
    if config.optimizer.use_apex:
        return (
            f"optimizer.use_apex=true with {engine}: apex's optimizers need whole tensors; set optimizer.use_apex=false"
        )
    if config.balance.cost == "measure":
        return f"balance.cost=measure with {engine}, whose passes wait for other ranks' weights; set balance.cost=flops"
    if config.memory.offload_weights and communication.backend not in ("auto", "gloo"):
        return (
            f"communication.backend={communication.backend} with memory.offload_weights=true, whose parts are reduced on the "
            "host as well; set communication.backend=auto"
        )
    if config.train.precision == "fp8":
        return f"train.precision=fp8 with {engine}: Transformer Engine's layers need whole weights; set train.precision=bf16"
    return None


def _optimizer_can_be_captured(config: Config) -> str | None:
    name = config.optimizer.name
    if not config.train.cuda_graphs or OPTIMIZERS[name].capturable:
        return None
    able = " or ".join(each for each, choice in OPTIMIZERS.items() if choice.capturable)
    return (
        f"train.cuda_graphs=true: a graph cannot hold a step of optimizer.name={name}; set train.cuda_graphs=false or "
        f"optimizer.name={able}"
    )


def _package_optimizer_is_named(config: Config) -> str | None:
    example = {"pytorch_optimizer": "SOAP", "torchao": "AdamW8bit"}.get(config.optimizer.name)
    if example is None or config.optimizer.class_name:
        return None
    return f"optimizer.name={config.optimizer.name} needs a class; set optimizer.class_name, to {example} for example"


def _schedule_free_is_an_average(config: Config) -> str | None:
    if config.optimizer.name != "schedule_free" or config.averaging.method == "none":
        return None
    return (
        f"averaging.method={config.averaging.method} with optimizer.name=schedule_free, which averages its weights itself; "
        "set averaging.method=none"
    )


def _averages_are_of_the_same_weights(config: Config) -> str | None:
    if config.communication.reduce_dtype != "zero_one" or config.averaging.method == "none":
        return None
    return (
        f"averaging.method={config.averaging.method} with communication.reduce_dtype=zero_one, between whose exchanges ranks "
        "have different weights; set averaging.method=none"
    )


def _exact_steps_end(config: Config) -> str | None:
    steps, wire = config.communication.exact_steps, config.communication.reduce_dtype
    if "exact_steps" not in WIRE_FORMATS[wire].settings or steps < config.train.max_steps:
        return None
    return (
        f"communication.exact_steps={steps} with train.max_steps={config.train.max_steps}: reduce_dtype={wire} would never "
        "compress; set exact_steps to less, to a fifth of the run for example"
    )


def _virtual_ranks_have_an_engine(config: Config) -> str | None:
    if config.batch.virtual_ranks == 1 or config.communication.engine == "bucketed":
        return None
    return (
        f"batch.virtual_ranks={config.batch.virtual_ranks} needs communication.engine=bucketed, which clips between virtual "
        f"ranks, and it is {config.communication.engine}; set one of them"
    )


def _wire_format_has_an_engine(config: Config) -> str | None:
    """What is lossy has collectives, a residual and equal parts of its own."""
    communication = config.communication
    name = communication.reduce_dtype
    if WIRE_FORMATS[name].is_cast:
        return None
    casts = " or ".join(each for each, choice in WIRE_FORMATS.items() if choice.is_cast)
    what = f"communication.reduce_dtype={name}"
    if communication.engine != "bucketed":
        return (
            f"{what} needs communication.engine=bucketed and it is {communication.engine}, which sends casts alone; set one of "
            f"them, reduce_dtype to {casts}"
        )
    if communication.shard_optimizer and WIRE_FORMATS[name].not_sharded:
        return f"{what} with communication.shard_optimizer=true: {WIRE_FORMATS[name].not_sharded}; set shard_optimizer=false"
    if config.batch.virtual_ranks > 1:
        return (
            f"{what} keeps what it has not sent of one rank's gradient, and batch.virtual_ranks={config.batch.virtual_ranks} "
            f"has several on a rank; set virtual_ranks=1 or reduce_dtype to {casts}"
        )
    if config.train.precision == "fp16":
        return (
            f"{what} keeps what it has not sent for the next step, whose loss scale may be another with train.precision=fp16; "
            f"set train.precision=bf16 or reduce_dtype to {casts}"
        )
    if config.train.cuda_graphs:
        return (
            f"{what} with train.cuda_graphs=true: a graph cannot hold its exchanges; set train.cuda_graphs=false or "
            f"reduce_dtype to {casts}"
        )
    return None


def _optimizer_has_its_wire_format(config: Config) -> str | None:
    """Some optimizers and wire formats are made for each other."""
    name, wire = config.optimizer.name, config.communication.reduce_dtype
    pairs: dict[str, list[str]] = {}
    for each, choice in OPTIMIZERS.items():
        if choice.wire:
            pairs.setdefault(choice.wire, []).append(each)
    if OPTIMIZERS[name].wire != (wire if wire in pairs else ""):
        if OPTIMIZERS[name].wire:
            return f"optimizer.name={name} goes with communication.reduce_dtype={OPTIMIZERS[name].wire}, not {wire}; set it"
        return (
            f"communication.reduce_dtype={wire} goes with optimizer.name={' or '.join(pairs[wire])} and it is {name}; set "
            "one of them"
        )
    if wire in pairs and config.communication.exact_steps == 0:
        return (
            f"communication.exact_steps=0 with reduce_dtype={wire}: the second moment that is frozen comes from exact steps; "
            "set communication.exact_steps, to a fifth of the run for example"
        )
    if wire in pairs and CLIP_MODES[config.communication.clip].after_reduce:
        return (
            f"communication.clip={config.communication.clip} clips the averaged gradient, and what is averaged with "
            f"reduce_dtype={wire} is the momentum; set clip=bucket_before_reduce or none"
        )
    return None


def _decay_ends_after_it_begins(config: Config) -> str | None:
    schedule = config.schedule
    if schedule.decay_from == "warmup_end" and schedule.full_rate_until >= schedule.total_steps:
        return (
            f"schedule.total_steps={schedule.total_steps} ends the decay before it begins at step "
            f"{schedule.full_rate_until}, the end of the warm-up (schedule.decay_from=warmup_end); raise total_steps"
        )
    if schedule.decay == "steps" and not schedule.milestones:
        return "schedule.decay=steps needs schedule.milestones; list the steps at which the rate falls"
    if schedule.decay_steps is not None and schedule.decay_steps > schedule.total_steps:
        return f"schedule.decay_steps={schedule.decay_steps} is more than schedule.total_steps={schedule.total_steps}; lower it"
    warmup_end = schedule.warmup_steps + schedule.start_warmup_step
    if schedule.decay == "warmup_stable_decay" and warmup_end + schedule.last_decay_steps > schedule.total_steps:
        return (
            f"the last {schedule.last_decay_steps} steps before schedule.total_steps={schedule.total_steps} begin within the "
            f"warm-up, which ends at step {warmup_end}; lower schedule.decay_steps or raise total_steps"
        )
    if "end_lr" in DECAYS[schedule.decay].settings and schedule.end_lr > config.optimizer.lr:
        return f"schedule.end_lr={schedule.end_lr} is above optimizer.lr={config.optimizer.lr}: the rate would rise; lower it"
    return None


def _apex_cannot_shard(config: Config) -> str | None:
    if not (config.communication.shard_optimizer and config.optimizer.use_apex):
        return None
    return (
        "communication.shard_optimizer=true updates pieces of tensors, which apex's optimizers do not support; set "
        "communication.shard_optimizer=false or optimizer.use_apex=false"
    )


def _closed_division_uses_lamb(config: Config) -> str | None:
    if config.mlperf.division != "closed" or config.optimizer.name == "lamb":
        return None
    return (
        f"mlperf.division=closed allows LAMB only and optimizer.name={config.optimizer.name}; set optimizer.name=lamb or "
        "mlperf.division=open"
    )


def _precision_has_its_device(config: Config) -> str | None:
    precision = config.train.precision
    if precision not in ("fp16", "fp8") or config.system.device != "cpu":
        return None
    return f"train.precision={precision} needs CUDA; on CPU set train.precision=bf16 or fp32"


def _moments_have_one_form(config: Config) -> str | None:
    optimizer = config.optimizer
    if optimizer.state_dtype == "fp32" and not optimizer.state_on_host:
        return None
    what = (
        "optimizer.state_on_host=true" if optimizer.state_on_host else f"optimizer.state_dtype={optimizer.state_dtype}"
    )
    if optimizer.use_apex:
        return f"{what} with optimizer.use_apex=true, whose moments are in fp32 on the device; set one of them"
    if config.train.cuda_graphs:
        return f"{what} with train.cuda_graphs=true: a graph cannot hold its step; set train.cuda_graphs=false"
    if optimizer.state_on_host and config.memory.offload_weights:
        return f"{what} with memory.offload_weights=true, which keeps all of them on the host already; set one of them"
    return None


def _gradients_can_be_released(config: Config) -> str | None:
    if not config.memory.release_gradients:
        return None
    communication, what = config.communication, "memory.release_gradients=true"
    if communication.engine != "bucketed":
        return (
            f"{what} with communication.engine={communication.engine}, which keeps its own gradients; set one of them"
        )
    if communication.shard_optimizer:
        return f"{what} with communication.shard_optimizer=true, whose parts lie in one buffer; set one of them"
    if CLIP_MODES[communication.clip].delays_communication:
        return (
            f"{what} with communication.clip={communication.clip}, which needs all gradients in one; set communication.clip="
            "bucket_before_reduce or global_after_reduce"
        )
    if not WIRE_FORMATS[communication.reduce_dtype].is_cast:
        return f"{what} with communication.reduce_dtype={communication.reduce_dtype}, which keeps what it did not send; set one"
    if config.batch.virtual_ranks > 1:
        return (
            f"{what} with batch.virtual_ranks={config.batch.virtual_ranks}, whose sum is kept beside; set one of them"
        )
    if config.batch.gradient_accumulation_steps > 1:
        return (
            f"{what} with batch.gradient_accumulation_steps={config.batch.gradient_accumulation_steps}, between which all "
            "gradients stay; set one of them"
        )
    if communication.bucket_mb == "auto":
        return f"{what} with communication.bucket_mb=auto, whose buckets are planned later; set a size in MiB"
    if config.train.cuda_graphs:
        return f"{what} with train.cuda_graphs=true, in which memory stays where it is; set one of them"
    return None


def _offloading_has_a_device(config: Config) -> str | None:
    """Where the device is named; one that is found (`auto`) is checked when it is."""
    return offloads_nothing(config, config.system.device)


def offloads_nothing(config: Config, device: str) -> str | None:
    """What would be offloaded on this type of device, where all is in the host's memory already."""
    settings = {
        "memory.offload_activations": config.memory.offload_activations,
        "memory.offload_weights": config.memory.offload_weights,
        "optimizer.state_on_host": config.optimizer.state_on_host,
    }
    on = [name for name, value in settings.items() if value]
    if device != "cpu" or not on:
        return None
    return f"{on[0]}=true on a CPU, where everything is in the host's memory already; set {on[0]}=false"


def _activations_can_be_offloaded(config: Config) -> str | None:
    if not config.memory.offload_activations:
        return None
    if config.memory.recompute != "none":
        return (
            f"memory.offload_activations=true with memory.recompute={config.memory.recompute}: what runs again is on the "
            "device all the same; set one of them"
        )
    if config.train.cuda_graphs:
        return "memory.offload_activations=true with train.cuda_graphs=true: a graph cannot wait for the host; set one of them"
    return None


def _budget_is_given(config: Config) -> str | None:
    if config.memory.recompute != "budget" or config.memory.budget_gib is not None:
        return None
    return "memory.recompute=budget needs a budget; set memory.budget_gib to the GiB that a rank may take"


def _recomputed_stages_run_twice(config: Config) -> str | None:
    how, dropout = config.memory.recompute, max(config.model.hidden_dropout, config.model.attention_dropout)
    if how == "none":
        return None
    if config.train.precision == "fp8":
        return (
            f"memory.recompute={how} with train.precision=fp8: Transformer Engine updates its scales in each forward pass, "
            "and a layer that runs twice would not compute the same; set memory.recompute=none or train.precision=bf16"
        )
    if config.train.cuda_graphs and dropout > 0:
        return (
            f"memory.recompute={how} with train.cuda_graphs=true and dropout: a graph cannot put random generators back; set "
            "memory.recompute=none, train.cuda_graphs=false, or model.hidden_dropout=0 and model.attention_dropout=0"
        )
    return None


def _pairs_have_their_settings(config: Config) -> str | None:
    """What the contrastive objective cannot be combined with."""
    if not OBJECTIVES[config.train.objective].on_pairs:
        return None
    objective, strategy = f"train.objective={config.train.objective}", config.balance.strategy
    if config.batch.virtual_ranks > 1:
        return f"batch.virtual_ranks={config.batch.virtual_ranks} with {objective}, which compares pairs of all ranks; set 1"
    if config.train.cuda_graphs:
        return (
            f"train.cuda_graphs=true with {objective}, whose ranks exchange embeddings inside a step; set it to false"
        )
    if strategy not in _FLAT:
        return f"balance.strategy={strategy} with {objective}, whose texts lie end to end; set {' or '.join(_FLAT)}"
    if ENGINES[config.communication.engine].shards:
        return f"communication.engine={config.communication.engine} with {objective} is not tried; set bucketed or ddp"
    if config.mlperf.enabled and config.mlperf.division == "closed":
        return f"mlperf.division=closed with {objective}: MLPerf's BERT is masked-LM; set mlperf.division=open"
    if config.batch.global_batch_size < 2:
        return f"batch.global_batch_size=1 with {objective}: the other pairs are a pair's negatives; set at least 2"
    if config.memory.recompute in ("optimal", "budget") or config.memory.budget_gib is not None:
        how = config.memory.recompute
        return f"memory.recompute={how} with {objective} has no plan; set none, attention, layer or half_layer and no budget"
    if config.balance.cost == "measure":
        return f"balance.cost=measure with {objective}: one pass is not a step's cost; set balance.cost=flops"
    widths, weights = config.contrastive.widths, config.contrastive.width_weights
    if list(widths) != sorted(set(widths)) or (widths and widths[-1] > config.model.hidden_size):
        return f"contrastive.widths={list(widths)} must ascend to at most model.hidden_size={config.model.hidden_size}"
    if weights and len(weights) != len(widths):
        return f"contrastive.width_weights={list(weights)} needs one for each of the {len(widths)} contrastive.widths"
    if config.contrastive.learn_scale and config.contrastive.scale > config.contrastive.max_scale:
        return f"contrastive.scale={config.contrastive.scale:g} is above contrastive.max_scale={config.contrastive.max_scale:g}"
    return None


_FLAT = tuple(name for name, choice in STRATEGIES.items() if not (choice.draws_by_rank or choice.pads))

CROSS_CHECKS: tuple[Callable[[Config], str | None], ...] = (
    _global_batch_is_the_product,
    _samples_per_rank_can_be_planned,
    _samples_fit_the_position_table,
    _strata_counts_add_up,
    _strata_reach_the_longest_sample,
    _longest_sample_fits_a_micro_batch,
    _packs_are_not_empty,
    _nodes_are_full,
    _attention_backend_has_the_dropout,
    _fp8_has_all_rows,
    _engine_can_step_per_bucket,
    _clipping_can_step_per_bucket,
    _optimizer_can_step_per_bucket,
    _apex_cannot_step_per_bucket,
    _engine_can_shard,
    _engine_can_clip,
    _sharded_weights_have_their_settings,
    _optimizer_can_shard,
    _optimizer_can_be_captured,
    _package_optimizer_is_named,
    _schedule_free_is_an_average,
    _averages_are_of_the_same_weights,
    _exact_steps_end,
    _virtual_ranks_have_an_engine,
    _wire_format_has_an_engine,
    _optimizer_has_its_wire_format,
    _decay_ends_after_it_begins,
    _apex_cannot_shard,
    _closed_division_uses_lamb,
    _precision_has_its_device,
    _moments_have_one_form,
    _gradients_can_be_released,
    _offloading_has_a_device,
    _activations_can_be_offloaded,
    _budget_is_given,
    _recomputed_stages_run_twice,
    _pairs_have_their_settings,
)
