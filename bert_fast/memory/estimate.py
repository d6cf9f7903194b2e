"""Memory of one rank before it runs, for any number of ranks, computed from shapes and settings."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from bert_fast.config import AveragingConfig, Config, ModelConfig, OptimizerConfig
from bert_fast.config.choices import AVERAGES, ENGINES, RECOMPUTE, WIRE_FORMATS
from bert_fast.integers import ceil_div
from bert_fast.memory.remat import Chain, Plan
from bert_fast.memory.stages import Hardware, MicroBatch, encoder_chain, longest_micro_batch
from bert_fast.memory.state import num_parameters, num_shards, optimizer_state, parameter_groups, residual_bytes

_ASSUMED_VALUES = 2.0  # fp32 numbers for each parameter, of an optimizer whose state depends on its arguments
_ROUNDING = 256  # bytes that an allocation of CUDA's allocator is too large on average: sizes are multiples of 512
_CAST_BYTES = {"fp32": 0, "bf16": 2, "fp16": 2}  # of a gradient's copy on the wire


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by purpose.

    weights:       in fp32
    gradients:     in fp32, of all buckets
    optimizer:     its state, of this rank
    averages:      of the weights
    residuals:     what the wire format keeps of gradients that it has not sent
    communication: copies of gradients on the wire, of all buckets at once
    inputs:        tokens and what goes with them, of a step; on a CPU also of those that are read ahead
    activations:   what forward keeps, and most that there is beside it at a time, by the plan of recomputation
    rounding:      of the allocator
    """

    weights: int
    gradients: int
    optimizer: int
    averages: int = 0
    residuals: int = 0
    communication: int = 0
    inputs: int = 0
    activations: int = 0
    rounding: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def fixed(self) -> int:
        """Without activations."""
        return self.total - self.activations

    def parts(self) -> dict[str, int]:
        """Bytes by name, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def optimizer_bytes(
    config: ModelConfig, optimizer: OptimizerConfig, unknown: float = _ASSUMED_VALUES, shards: int = 1
) -> int:
    """Bytes of an optimizer's state on a rank.

    Args:
        unknown: fp32 numbers for each parameter where the table cannot say how many there are.
        shards: ranks over which it is divided.
    """
    parts = optimizer_state(config, optimizer, shards)
    return ceil_div(int(4 * unknown * num_parameters(config)), shards) if parts is None else sum(parts.values())


def estimate(config: Config, chain: Chain, plan: Plan, *, on_cpu: bool) -> MemoryEstimate:
    """Memory of a rank that runs its largest micro-batch by a plan.

    Args:
        chain: of that micro-batch (`chain_of`).
        plan: one of the chain.
        on_cpu: whose allocator does not round.
    """
    held = kept_from_step_to_step(config)
    num_tensors = 16 * config.model.num_layers + 12
    # Weight, gradient and two moments of each tensor, and some ten tensors that each stage keeps
    allocations = 4 * num_tensors + 10 * len(chain.stages)
    activations = plan.peak_bytes
    if config.memory.offload_activations:  # what is kept is on the host, and comes back stage by stage
        activations = max(s.output_bytes + s.saved_bytes + s.temporary_bytes for s in chain.stages)
    return replace(
        held,
        inputs=input_bytes(config, on_cpu),
        activations=activations,
        rounding=0 if on_cpu else _ROUNDING * allocations,
    )


def input_bytes(config: Config, on_cpu: bool) -> int:
    """Of a step's batches: ids, types and positions of tokens, positions and labels of masks, as int64."""
    batch = longest_micro_batch(config)
    step = (3 * 8 * batch.tokens + 2 * 8 * batch.masked) * config.batch.micro_batches_per_step
    return step * (1 + config.balance.prefetch if on_cpu else 1)


def with_buckets(chain: Chain, config: Config) -> Chain:
    """A chain whose gradients grow, with what buckets larger than a layer have before their gradients are there."""
    sizes = config.communication.bucket_mb
    assert sizes != "auto", "the config has been checked"
    largest = int(2**20 * max(sizes if isinstance(sizes, list) else [sizes]))
    layer = max(4 * group.numel for group in parameter_groups(config.model))
    early = max(0, min(largest, 4 * num_parameters(config.model)) - layer)
    return replace(
        chain, stages=tuple(replace(each, temporary_bytes=each.temporary_bytes + early) for each in chain.stages)
    )


def chain_of(config: Config, batch: MicroBatch, hardware: Hardware) -> Chain:
    """The chain of a micro-batch of this config."""
    how = config.memory.recompute
    again = how in RECOMPUTE and RECOMPUTE[how].of_attention
    grow = config.memory.release_gradients
    chain = encoder_chain(config.model, batch, hardware, attention_again=again, gradients_grow=grow)
    return with_buckets(chain, config) if grow else chain


def kept_from_step_to_step(config: Config) -> MemoryEstimate:
    """What a rank holds whatever its batch is. Where the table does not know the optimizer's state, two moments are assumed."""
    parameters, communication = num_parameters(config.model), config.communication
    shards, on_wire = num_shards(config), 0
    if config.system.world_size > 1:
        # Other formats decode into a gradient of a bucket's size while its message is still there
        on_wire = _CAST_BYTES.get(communication.reduce_dtype, 4)
    held = MemoryEstimate(
        weights=4 * parameters,
        gradients=4 * parameters,
        optimizer=optimizer_bytes(config.model, config.optimizer, shards=shards),
        averages=ceil_div(4 * average_copies(config.averaging) * parameters, shards),
        residuals=residual_bytes(config),
        communication=on_wire * parameters,
    )
    if config.memory.release_gradients:  # they are a part of the chain's peak
        return replace(held, gradients=0)
    if ENGINES[communication.engine].shards:
        return _in_parts(config, held, shards)
    if config.batch.virtual_ranks > 1 and WIRE_FORMATS[communication.reduce_dtype].is_cast:
        # The sum over virtual ranks lies beside the gradients, in the format that is sent
        return replace(held, gradients=held.gradients + (_CAST_BYTES[communication.reduce_dtype] or 4) * parameters)
    return held


def _in_parts(config: Config, held: MemoryEstimate, shards: int) -> MemoryEstimate:
    """Where weights and gradients are in parts, and a unit's whole ones are there while it runs (`communication.fsdp`)."""
    parameters, groups = num_parameters(config.model), list(parameter_groups(config.model))
    tied = sum(group.numel for group in groups if not group.name.startswith("layers"))
    layer = max(group.numel for group in groups if group.name.startswith("layers"))
    unit = max(2 * layer // 3, 1)  # the feed-forward half, nearly
    # The tied ends from the first stage to the last, two units on the way; or, if they are kept, all
    gathered = tied + 2 * unit if config.communication.reshard_after_forward else parameters
    # Gradients of the ends until they are reduced, of a unit with a copy in the order of ranks; or all, between micro-batches
    whole_gradients = tied + 2 * unit if config.batch.gradient_accumulation_steps == 1 else parameters
    if config.memory.offload_weights:
        return replace(held, weights=0, gradients=0, optimizer=0, communication=4 * (gathered + whole_gradients))
    return replace(
        held,
        weights=ceil_div(held.weights, shards),
        gradients=ceil_div(held.gradients, shards),
        communication=4 * (gathered + whole_gradients),
    )


def average_copies(config: AveragingConfig) -> int:
    """Copies of the weights that the config's average keeps."""
    choice = AVERAGES.get(config.method)
    if choice is None:
        return 0
    return int(getattr(config, choice.copies_setting)) if choice.copies_setting else 1


def least_bytes(config: Config, element_bytes: int = 2) -> int:
    """A lower bound of a rank's bytes: weights, gradients, what is kept beside them, and each layer's input of one batch.

    It is below `estimate` on purpose: a model with a lower bound above a machine's memory cannot run there.
    """
    shards = num_shards(config)
    tokens = config.batch.micro_batch_size * config.longest_sample
    tokens += -tokens % config.batch.shape_multiple
    inputs = 3 * 8 * tokens * config.batch.micro_batches_per_step  # tokens, types, positions of the synthetic step
    # Where layers run again, or what they keep is elsewhere, one boundary is there at least
    boundaries = (
        1 if config.memory.recompute != "none" or config.memory.offload_activations else config.model.num_layers
    )
    kept = tokens * config.model.hidden_size * boundaries * element_bytes
    state = optimizer_bytes(config.model, config.optimizer, unknown=0.0, shards=shards)
    averages = 4 * average_copies(config.averaging) * num_parameters(config.model) // shards
    held = 8 * num_parameters(config.model)
    if ENGINES[config.communication.engine].shards:
        held = 0 if config.memory.offload_weights else held // shards
    elif config.memory.release_gradients:
        held //= 2
    return held + state + averages + residual_bytes(config) + inputs + kept
