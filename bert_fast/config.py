"""Every setting of a run: typed, validated, frozen. Imports nothing of ours but the error type.

A run is one `Config`, read from YAML with dotted overrides (`bert_fast.cli`). Field descriptions are the
documentation: `run_pretraining.py --help` prints them with their defaults.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Every number has an upper bound, far above what anyone uses: a slip of the keyboard is refused here by its name, and does not
# hang a search or end in an allocator. What is within the bounds and still does not fit is found by `memory.estimate`.
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
Count = Annotated[int, Field(gt=0, le=65_536)]  # of what there are some: layers, strata, micro-batches
Width = Annotated[int, Field(gt=0, le=65_536)]
Tokens = Annotated[int, Field(gt=0, le=65_535)]  # of one sample: the store's lengths have 16 bits
Samples = Annotated[int, Field(gt=0, le=10**12)]
BatchSize = Annotated[int, Field(gt=0, le=2**18)]
Ranks = Annotated[int, Field(gt=0, le=2**17)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # of torch's generators; a clock in nanoseconds fits
PositiveFloat = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]
Cost = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False)]  # in any unit
Seconds = Annotated[float, Field(gt=0, le=1e7, allow_inf_nan=False)]
Mebibytes = Annotated[float, Field(gt=0, le=2**20, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
_MOST_PER_RANK = 2**15  # samples of a rank in a step: planning more takes minutes
_LONGEST_TEXT = 4096  # characters, as a path may have


class Section(BaseModel):
    """A frozen group of settings; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)

    @field_validator("*", mode="after")
    @classmethod
    def _text_is_text(cls, value: Any) -> Any:
        """Refuse text that no path, log or terminal can hold: null bytes, halves of surrogate pairs, megabytes."""
        texts = value if isinstance(value, (list, tuple)) else value.items() if isinstance(value, dict) else (value,)
        for text in (part for each in texts for part in (each if isinstance(each, tuple) else (each,))):
            if not isinstance(text, str):
                continue
            if len(text) > _LONGEST_TEXT:
                raise ValueError(f"a text of {len(text):,} characters is longer than {_LONGEST_TEXT:,}")
            odd = [c for c in text if (ord(c) < 32 and c not in "\n\t") or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF]
            if odd:
                raise ValueError(f"a text holds the character {odd[0]!a}, which cannot be used here")
        return value


class ModelConfig(Section):
    vocab_size: Annotated[int, Field(gt=0, le=2**20)] = Field(
        30522, description="rows of the word embedding (MLPerf pads 30522 to 30528)"
    )
    hidden_size: Width = Field(768, description="width of the encoder")
    num_layers: Annotated[int, Field(gt=0, le=1024)] = Field(12, description="encoder layers")
    num_heads: Width = Field(12, description="attention heads; must divide hidden_size")
    intermediate_size: Annotated[int, Field(gt=0, le=2**18)] = Field(
        3072, description="width of the feed-forward layer"
    )
    max_positions: Tokens = Field(512, description="rows of the position table; longest sample that fits")
    type_vocab_size: Count = Field(2, description="number of segment types")
    hidden_dropout: Probability = Field(0.1, description="dropout after embeddings and dense layers")
    attention_dropout: Probability = Field(0.1, description="dropout on attention probabilities")
    layer_norm_eps: PositiveFloat = Field(1e-12, description="epsilon of every LayerNorm")
    initializer_range: PositiveFloat = Field(
        0.02, description="standard deviation of the truncated normal that fills weights"
    )
    activation: Literal["gelu", "gelu_tanh"] = Field("gelu", description="gelu by erf (BERT) or by tanh")
    attention_backend: Literal[
        "auto",
        "loop",
        "grouped",
        "matmul",
        "padded",
        "block_diagonal",
        "nested",
        "varlen",
        "torch_flash",
        "flex",
        "flash",
    ] = Field("auto", description="how variable-length attention is computed; auto picks by capability and logs it")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            near = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            best = min(near, key=lambda n: abs(n - self.num_heads))
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}; "
                f"the nearest number of heads that does is {best}"
            )
        return self


class DataConfig(Section):
    train: str = Field("data/pydocs-mini/train", description="folder of the training store (scripts/prepare_data.py)")
    eval: str = Field("data/pydocs-mini/eval", description="folder of the held-out store; shares no document with it")
    max_seq_len: Tokens = Field(512, description="longest sample in tokens; a longer one in a store is refused")
    vocab_sha256: str | None = Field(None, description="if set, the stores must have been made with this vocabulary")
    eval_sha256: str | None = Field(None, description="if set, the evaluation store must have this hash")
    dynamic_masking: bool = Field(
        False,
        description="predict other tokens of a sample each time it is used, not those chosen offline (open division)",
    )
    allow_shared_text: bool = Field(
        False,
        description="evaluate although the evaluation store is of text that the training store has, and name it in the log and "
        "the report; else such a run is refused before it starts",
    )
    verify_mb_s: NonNegativeFloat = Field(
        8.0,
        description="MB a second that every rank reads of the training store in the background, to notice that it has "
        "changed; 0: never",
    )
    eval_samples: Samples | None = Field(
        None, description="use the first n evaluation samples (MLPerf: 10000); all of them if unset"
    )


class BatchConfig(Section):
    global_batch: BatchSize = Field(description="samples in one optimizer step over all ranks")
    local_batch: Annotated[int, Field(gt=0, le=_MOST_PER_RANK)] = Field(
        description="samples of one rank in one forward pass"
    )
    accumulation: Annotated[int, Field(gt=0, le=4096)] = Field(
        1, description="micro-batches a rank runs before one optimizer step"
    )
    shape_multiple: Count = Field(
        64,
        description="pad a micro-batch's tokens to a multiple of this with a dummy sequence, and its masked positions to a "
        "quarter of it: kernels are prepared once a shape (1: never pad)",
    )
    eval_batch: BatchSize = Field(64, description="samples of one rank in one evaluation forward")


EQUAL_COUNT_STRATEGIES = ("random", "pad_to_longest", "exchange", "exchange_snake", "stratified_presort", "balanced")


class BalanceConfig(Section):
    strategy: Literal[
        "random",
        "pad_to_longest",
        "exchange",
        "exchange_snake",
        "stratified_presort",
        "balanced",
        "balanced_free",
        "packed",
    ] = Field(
        "balanced",
        description="who gets which sample of the step (docs/balance.md): as drawn; as drawn and padded; sorted and dealt in "
        "rounds; the same in a snake; the paper's strata + node-local presort; Karmarkar-Karp with equal counts; any count "
        "a rank; packed into rows of max_seq_len",
    )
    num_strata: Count = Field(4, description="strata of equal width in tokens of stratified_presort")
    strata: list[Tokens] | None = Field(
        None,
        max_length=65_536,
        description="upper length bounds of the strata, ascending, the last data.max_seq_len; instead of num_strata",
    )
    strata_counts: list[NonNegativeInt] | None = Field(
        None,
        max_length=65_536,
        description="samples a rank takes from each stratum in a step; largest remainders of the true shares if unset",
    )
    cost_linear: Cost | None = Field(None, description="cost per token in any unit; from the model's FLOPs if unset")
    cost_quadratic: Cost | None = Field(
        None, description="cost per squared token in the same unit; from the model's FLOPs if unset"
    )
    cost_file: str | None = Field(
        None, description="cost.json of an earlier run (or of scripts/fit_cost.py): take the cost model fitted there"
    )
    fit_cost: bool = Field(
        False,
        description="measure forward and backward for several lengths before the clock and fit the cost model to it",
    )
    refine_ms: NonNegativeFloat = Field(
        20.0,
        description="balanced and balanced_free: planning time of one core, in ms for each 16,384 samples of a step, after "
        "which a plan is no longer refined; most end earlier. Counted in steps of known cost, so that all ranks agree "
        "(0: never)",
    )
    max_tokens: PositiveInt | None = Field(
        None,
        description="balanced_free: most tokens of a rank's micro-batch, so that it fits in memory; local_batch x "
        "max_seq_len if unset",
    )
    pack_rows: BatchSize | None = Field(
        None,
        description="packed: rows of a micro-batch, the same in every step; as many as the first steps need if unset",
    )
    pack_depth: Count = Field(12, description="packed: most samples in one row")
    pack_first: Literal["longest", "shortest"] = Field(
        "longest", description="packed: which of the open rows that a sample fits in gets it"
    )
    prefetch: Annotated[int, Field(gt=0, le=1024)] = Field(
        2, description="steps whose plan and batch are prepared in the background"
    )

    @model_validator(mode="after")
    def _one_cost(self) -> BalanceConfig:
        if (self.cost_linear is None) != (self.cost_quadratic is None):
            raise ValueError("balance.cost_linear and balance.cost_quadratic go together: set both or neither")
        if self.cost_linear == 0 and self.cost_quadratic == 0:
            raise ValueError("balance.cost_linear and balance.cost_quadratic are both 0; at least one must be positive")
        given = {
            "cost_linear": self.cost_linear is not None,
            "cost_file": self.cost_file is not None,
            "fit_cost": self.fit_cost,
        }
        if sum(given.values()) > 1:
            names = " and ".join(f"balance.{name}" for name, is_set in given.items() if is_set)
            raise ValueError(f"{names} each give the cost model; set only one of them")
        return self

    @model_validator(mode="after")
    def _settings_of_the_strategy(self) -> BalanceConfig:
        """A setting that the strategy would ignore is an error."""
        owners = {
            "strata": "stratified_presort", "strata_counts": "stratified_presort", "max_tokens": "balanced_free",
            "pack_rows": "packed",
        }  # fmt: skip
        for name, owner in owners.items():
            if getattr(self, name) is not None and self.strategy != owner:
                raise ValueError(
                    f"balance.{name} is a setting of strategy {owner} and balance.strategy={self.strategy}; "
                    f"remove it or set balance.strategy={owner}"
                )
        if self.strata and any(a >= b for a, b in pairwise(self.strata)):
            raise ValueError(f"balance.strata={self.strata} must ascend")
        if self.strata_counts is not None:
            count = len(self.strata) if self.strata else self.num_strata
            if len(self.strata_counts) != count:
                raise ValueError(
                    f"balance.strata_counts has {len(self.strata_counts)} numbers for {count} strata; give one a stratum"
                )
        return self


class CommunicationConfig(Section):
    engine: Literal["bucketed", "ddp"] = Field(
        "bucketed", description="our overlapped reducer, or torch DistributedDataParallel with the same clipping"
    )
    bucket_mb: Literal["auto"] | Mebibytes | list[Mebibytes] = Field(
        25.0,
        description="bucket size in MiB of gradients; a list in ready order whose last entry repeats; or auto: measure "
        "backward and link before the clock and plan exactly",
    )
    min_bucket_mb: Annotated[float, Field(ge=0, le=2**20, allow_inf_nan=False)] = Field(
        0.0, description="auto: no bucket but the last is smaller"
    )
    max_bucket_mb: Mebibytes = Field(4096.0, description="auto: no bucket of several clip groups is larger")
    clip: Literal["none", "global_before_reduce", "bucket_before_reduce", "global_after_reduce"] = Field(
        "bucket_before_reduce",
        description="which norm is clipped: none; each rank's whole gradient; each clip group of a rank (the paper's, "
        "overlaps); the averaged gradient (the textbook's)",
    )
    max_norm: PositiveFloat = Field(1.0, description="clipping threshold c; a group gets c / sqrt(number of groups)")
    clip_groups: Literal["layer", "tensor", "model"] | dict[str, str] = Field(
        "layer",
        description="parameters that share one clipping norm: one per encoder layer plus embeddings and heads; one per "
        "tensor; a single one; or {group: regular expression over parameter names}",
    )
    shard_optimizer: bool = Field(
        False,
        description="reduce-scatter gradients, update a part of the weights on each rank, gather weights during the next "
        "forward pass; optimizer state is divided by the number of ranks",
    )
    reduce_dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="number format on the wire")
    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto",
        description="auto: nccl on CUDA, gloo on CPU. Named, it is used by a run of one rank too: every collective is called",
    )
    timeout_s: Seconds = Field(300.0, description="seconds after which a silent rank counts as lost")

    @model_validator(mode="after")
    def _patterns_compile(self) -> CommunicationConfig:
        for group, pattern in self.clip_groups.items() if isinstance(self.clip_groups, dict) else ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"communication.clip_groups: pattern '{pattern}' of group {group} is no regular expression: {error}"
                ) from None
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "lamb"] = Field("adamw", description="adamw (torch fused) or lamb (MLPerf reference)")
    lr: PositiveFloat = Field(1e-4, description="base learning rate")
    beta1: Probability = Field(0.9, description="decay of the first moment")
    beta2: Probability = Field(0.999, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-6, description="epsilon in the denominator")
    weight_decay: NonNegativeFloat = Field(0.01, description="decoupled decay; never on biases and LayerNorm")
    when: Literal["bucket", "end"] = Field(
        "end",
        description="when weights are updated: each bucket as soon as it is reduced, while later ones are on the wire, or "
        "all at the end; the same weights. bucket needs engine bucketed and clip none or bucket_before_reduce",
    )
    use_apex: bool = Field(False, description="adamw: use apex's fused form; stops if apex is not installed")

    @model_validator(mode="after")
    def _apex_has_no_reference_lamb(self) -> OptimizerConfig:
        if self.use_apex and self.name == "lamb":
            raise ValueError(
                "optimizer.use_apex=true with optimizer.name=lamb: apex's LAMB takes one trust ratio for query, key and value "
                "together, and none where weight_decay is 0; MLPerf's reference has one each, always. Set "
                "optimizer.use_apex=false"
            )
        return self


class ScheduleConfig(Section):
    """MLPerf's schedule: linear warm-up with an offset, then polynomial decay over absolute steps."""

    warmup_steps: NonNegativeInt = Field(0, description="steps of linear warm-up")
    start_warmup_step: Annotated[int, Field(ge=-(10**9), le=10**9)] = Field(
        0, description="step at which warm-up starts; negative starts it part-way up"
    )
    counting: Literal["nvidia", "reference"] = Field(
        "nvidia",
        description="number of the first update. nvidia: 0, but 1 where start_warmup_step is not 0, as in NVIDIA's submissions "
        "and those made from them; reference: always 0, as in MLPerf's TensorFlow reference",
    )
    total_steps: PositiveInt = Field(description="step at which the decay ends (opt_learning_rate_training_steps)")
    end_lr: NonNegativeFloat = Field(0.0, description="learning rate at and after total_steps")
    power: PositiveFloat = Field(1.0, description="power of the polynomial decay")


class TrainConfig(Section):
    seed: Seed = Field(0, description="seeds weights, dropout and the order of samples")
    init_checkpoint: str | None = Field(
        None,
        description="folder with config.json + model.safetensors (Hugging Face form), or prefix of a TensorFlow checkpoint "
        "(model.ckpt-28252), to start from",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = Field(
        "auto",
        description="autocast format; auto: bf16 where the hardware has it, else fp32; fp8: bf16 with the encoder's matmuls in "
        "FP8 (Transformer Engine)",
    )
    compile: bool = Field(False, description="torch.compile each encoder layer in warm-up, before the clock")
    cuda_graphs: bool = Field(
        False,
        description="CUDA: capture the whole step, one graph a batch shape (use packed rows or a large shape_multiple)",
    )
    max_steps: PositiveInt = Field(description="stop after so many steps even if the target was not reached")
    target_accuracy: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        None, description="masked-LM accuracy at which the run is done; none: run to max_steps"
    )
    eval_every_samples: Samples = Field(description="samples between evaluations")
    eval_start_samples: Samples | None = Field(
        None, description="samples before the first evaluation; eval_every_samples if unset"
    )
    eval_at_start: bool = Field(False, description="evaluate the starting weights on the clock, before the first step")
    warmup_batches: Annotated[int, Field(ge=0, le=10_000)] = Field(
        3, description="synthetic steps before the clock (communicator, kernels, compile); weights are restored"
    )
    checkpoint_every_steps: NonNegativeInt = Field(0, description="steps between checkpoints; 0: only when stopped")
    async_checkpoints: bool = Field(
        True, description="go on training while a checkpoint is written (off: wait for it, as at the end of a run)"
    )
    checkpoint_timeout_s: Seconds = Field(
        600.0,
        description="seconds that a rank may take to write its part of a checkpoint, or to hash it; then it is lost",
    )
    keep_checkpoints: PositiveInt = Field(2, description="how many checkpoints stay on disk")
    save_final_model: bool = Field(
        False, description="write the final weights and the store's tokenizer as a Hugging Face folder"
    )
    log_every_steps: PositiveInt = Field(10, description="steps between log lines, and between checks for signals")
    max_skipped_steps: NonNegativeInt = Field(
        3, description="consecutive non-finite steps that are skipped before the run stops"
    )
    loss_scale: Annotated[float, Field(gt=0, le=2**40, allow_inf_nan=False)] = Field(
        65536.0, description="first loss scale of fp16"
    )
    deterministic: bool = Field(False, description="torch.use_deterministic_algorithms")


class SystemConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one, else CPU")
    world_size: Ranks = Field(1, description="number of ranks of the whole run")
    ranks_per_node: Ranks | None = Field(None, description="ranks on one node; world_size if unset")
    threads_per_rank: Annotated[int, Field(gt=0, le=4096)] | None = Field(
        None, description="CPU threads of a rank; unset: cores of the node / ranks of the node on CPU, 4 on CUDA"
    )
    bind_cores: bool = Field(
        True,
        description="pin every local rank to cores of its own: near its GPU, or an equal share of the node's on CPU",
    )
    master_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="rendezvous port for locally started ranks; 0 picks a free one"
    )

    settings: str | None = Field(
        None,
        description="file of the machine's environment and binding (configs/systems/): NCCL variables as data. A variable "
        "that is set already stays as it is",
    )
    preflight: bool = Field(
        False, description="check devices, data, clocks and the network of all ranks before the clock (docs/cluster.md)"
    )

    @property
    def node_size(self) -> int:
        return self.ranks_per_node or self.world_size


class RecoveryConfig(Section):
    """What happens after a failure: docs/cluster.md."""

    max_restarts: NonNegativeInt = Field(
        0, description="how often a run that lost a rank is started again from its last checkpoint by its launcher"
    )
    spare_nodes: NonNegativeInt = Field(
        0,
        description="Slurm: nodes of the allocation kept back to take the place of failed ones (sbatch --nodes=MIN-MAX)",
    )
    min_nodes: PositiveInt | None = Field(
        None,
        description="Slurm: go on with fewer nodes, down to this many, where no spare is left; the global batch stays. Unset: "
        "never fewer",
    )


class MlperfConfig(Section):
    enabled: bool = Field(True, description="write an MLPerf log and check it")
    division: Literal["open", "closed"] = Field("open", description="closed: LAMB only, and every closed rule")
    ruleset: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")] = Field(
        "5.0.0", description="mlperf-logging ruleset; 5.0.0 is BERT's last"
    )
    organization: str = Field("bert_fast", description="submission_org")
    platform: str = Field("unnamed", description="submission_platform")
    status: Literal["onprem", "cloud", "research", "preview"] = Field("research", description="submission_status")
    poc_name: str = Field("nobody", description="submission_poc_name")
    poc_email: str = Field("nobody@example.org", description="submission_poc_email")
    clear_caches: bool = Field(
        False,
        description="drop the operating system's caches first (needs root); else only cache_clear is logged false",
    )


class RunConfig(Section):
    name: str = Field("run", description="name of the run; its folder is results_dir/name-seedN", min_length=1)
    results_dir: str = Field("runs", description="where run folders go")
    folder: str | None = Field(None, description="the run's folder itself, instead of results_dir/name-seedN")
    tensorboard: bool = Field(True, description="write TensorBoard events beside metrics.jsonl")
    matmul_ceiling: bool = Field(True, description="measure the matmul ceiling before the clock (for the MFU)")
    price_per_kwh: NonNegativeFloat | None = Field(None, description="money a kWh costs, for the report; any currency")
    gco2_per_kwh: NonNegativeFloat | None = Field(
        None, description="grams of CO2 equivalent a kWh stands for, for the report"
    )
    profile: bool = Field(
        False,
        description="write trace.json (Chrome, Perfetto): buckets, clips, collectives, updates of some steps as tracks",
    )
    profile_after: NonNegativeInt = Field(5, description="steps before the first that is traced")
    profile_steps: Annotated[int, Field(gt=0, le=1000)] = Field(3, description="how many steps are traced")


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
    train: TrainConfig = Field(description="the loop: precision, evaluation, target, checkpoints")
    system: SystemConfig = Field(default_factory=SystemConfig, description="ranks, device, threads")
    recovery: RecoveryConfig = Field(
        default_factory=RecoveryConfig, description="restarts after a failure, spare nodes"
    )
    mlperf: MlperfConfig = Field(default_factory=MlperfConfig, description="the MLPerf log")

    @model_validator(mode="after")
    def _cross_checks(self) -> Config:
        batch, world = self.batch, self.system.world_size
        product = batch.local_batch * world * batch.accumulation
        if batch.global_batch != product:
            raise ValueError(
                f"batch.global_batch={batch.global_batch} is not local_batch x world_size x accumulation = "
                f"{batch.local_batch} x {world} x {batch.accumulation} = {product}; set batch.global_batch={product} "
                "or change a factor"
            )
        if self.data.max_seq_len > self.model.max_positions:
            raise ValueError(
                f"data.max_seq_len={self.data.max_seq_len} does not fit the position table of "
                f"model.max_positions={self.model.max_positions}; raise model.max_positions or shorten the samples"
            )
        per_rank = batch.local_batch * batch.accumulation
        if per_rank > _MOST_PER_RANK:
            raise ValueError(
                f"batch.local_batch x batch.accumulation = {per_rank:,} samples of a rank in a step; "
                f"at most {_MOST_PER_RANK:,}"
            )
        balance = self.balance
        if balance.strata_counts is not None and sum(balance.strata_counts) != per_rank:
            raise ValueError(
                f"balance.strata_counts={balance.strata_counts} add up to {sum(balance.strata_counts)} and a rank takes "
                f"local_batch x accumulation = {per_rank} samples a step; make them add up to {per_rank}"
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
        if balance.pack_rows is not None and balance.pack_rows > batch.local_batch:
            raise ValueError(
                f"balance.pack_rows={balance.pack_rows} is more than the batch.local_batch={batch.local_batch} samples that "
                "are packed; at most one row a sample"
            )
        if world % self.system.node_size:
            raise ValueError(
                f"system.ranks_per_node={self.system.node_size} does not divide system.world_size={world}; "
                f"set ranks_per_node to a divisor such as {math.gcd(world, self.system.node_size)}"
            )
        if self.model.attention_dropout > 0 and self.model.attention_backend in ("varlen", "flex"):
            raise ValueError(
                f"model.attention_backend={self.model.attention_backend} has no dropout; set model.attention_dropout=0 or use "
                "flash or padded"
            )
        communication = self.communication
        if self.optimizer.when == "bucket":
            if communication.engine != "bucketed":
                raise ValueError(
                    f"optimizer.when=bucket needs communication.engine=bucketed and it is {communication.engine}; change one"
                )
            if communication.clip not in ("none", "bucket_before_reduce"):
                raise ValueError(
                    f"optimizer.when=bucket needs communication.clip=none or bucket_before_reduce: with {communication.clip} "
                    "no update is known before the last bucket; set optimizer.when=end"
                )
        if self.optimizer.when == "bucket" and self.optimizer.use_apex:
            raise ValueError(
                "optimizer.when=bucket steps over some tensors at a time, and apex's optimizers count their steps as a whole; "
                "set optimizer.when=end or optimizer.use_apex=false"
            )
        if communication.shard_optimizer and communication.engine != "bucketed":
            raise ValueError(
                f"communication.shard_optimizer needs communication.engine=bucketed, not {communication.engine}; change one"
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


def run_folder(config: Config) -> Path:
    """Where a run writes."""
    run = config.run
    return Path(run.folder) if run.folder else Path(run.results_dir) / f"{run.name}-seed{config.train.seed}"


def sections() -> dict[str, type[Section]]:
    """Name of every section of `Config` and its model, in order."""
    return {name: field.annotation for name, field in Config.model_fields.items()}  # type: ignore[misc]


def as_plain(config: Config) -> dict[str, Any]:
    """The config as plain YAML/JSON values, defaults included."""
    return config.model_dump(mode="json")
