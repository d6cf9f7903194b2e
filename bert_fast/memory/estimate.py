"""Memory of one rank before it runs, computed from shapes. Allocator slack and workspaces are not included."""

from __future__ import annotations

from dataclasses import dataclass

from bert_fast.config import AveragingConfig, Config, ModelConfig, OptimizerConfig
from bert_fast.config.choices import AVERAGES
from bert_fast.integers import ceil_div
from bert_fast.memory.state import num_parameters, optimizer_state, residual_bytes

_ASSUMED_VALUES = 2.0  # fp32 numbers for each parameter, of an optimizer whose state depends on its arguments


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    averages: int = 0
    residuals: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.averages + self.residuals


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


def activation_bytes_per_token(config: ModelConfig, element_bytes: int, fused: bool = False) -> int:
    """Bytes that the encoder keeps for backward per token, without attention scores.

    A layer keeps its input, q, k, v, the context, the first norm's output and the feed-forward's two inner activations; the
    inputs of both norms in fp32, as CUDA's autocast computes them; two numbers for each norm and one for each head; and a
    byte for each element of a dropout's mask. With `fused` (the CPU's fused parts) dropout and GELU keep nothing, and the
    projections' outputs go into sums that are kept once: 8 widths and one inner activation, with two fp32 numbers for each
    norm.
    """
    before = (4 if fused else 5) * config.hidden_size * element_bytes + (0 if fused else 4 * config.num_heads)
    return config.num_layers * (before + _bytes_after_attention(config, element_bytes, fused))


def _bytes_after_attention(config: ModelConfig, element_bytes: int, fused: bool) -> int:
    """The part of a layer's bytes per token that is of what follows attention.

    Attention's output belongs to it where fused pieces are used; a device's kernel keeps that itself.
    """
    width, inner = config.hidden_size, config.intermediate_size
    if fused:
        return (4 * width + inner) * element_bytes + 16
    masks = 2 * width if config.hidden_dropout else 0
    return (width + 2 * inner) * element_bytes + 2 * width * 4 + masks + 16


def estimate(
    config: ModelConfig,
    *,
    tokens: int,
    tokens_squared: int,
    masked: int,
    element_bytes: int,
    keeps_scores: bool,
    optimizer: OptimizerConfig | None = None,
    shards: int = 1,
    logits_rows: int | None = None,
    average_copies: int = 0,
    kept_bytes: int = 0,
    residuals: int = 0,
) -> MemoryEstimate:
    """Memory of a rank whose largest micro-batch has these sums of L, L^2 and masked positions.

    Args:
        element_bytes: of activations (2 under bf16 or fp16 autocast, 4 in fp32).
        optimizer: AdamW if None; where the table does not know its state, two moments are assumed.
        shards: ranks over which optimizer state is divided.
        keeps_scores: as on CPUs, attention probabilities are kept for backward, and the fused layers keep less; otherwise
            the device's kernels keep no probabilities, and dropout keeps its masks.
        logits_rows: rows of logits in memory at a time (all masked positions if unset).
        average_copies: of the weights that an average of them keeps, divided like the optimizer's state.
        kept_bytes: of a number of the sum over virtual ranks, which lies beside the gradients; 0: there is no such sum.
        residuals: bytes of what the wire format keeps (`memory.state.residual_bytes`).
    """
    parameters = num_parameters(config)
    width, table = config.hidden_size, config.vocab_size * config.hidden_size
    activations = tokens * activation_bytes_per_token(config, element_bytes, fused=keeps_scores)
    if config.last_layer == "predicted":  # the few [CLS] tokens aside
        activations -= (tokens - masked) * _bytes_after_attention(config, element_bytes, fused=keeps_scores)
    rows = masked if logits_rows is None else min(masked, logits_rows)
    if keeps_scores:
        activations += config.num_layers * config.num_heads * tokens_squared * element_bytes
        activations += rows * config.vocab_size * (8 + element_bytes)  # logits, their fp32 form, its gradient
        activations += masked * 5 * width * element_bytes + table * element_bytes
    else:
        # The embeddings' norm, in fp32, and its dropout
        activations += tokens * width * (5 if config.hidden_dropout else 4)
        activations += masked * width * (4 * element_bytes + 4)
        # The gradient of the decoder's weight, which is computed with the loss
        activations += table * (4 if rows < masked else element_bytes)
        if element_bytes < 4:  # autocast's copies of the matrices, which backward needs
            matrices = parameters - table - width * (config.max_positions + config.type_vocab_size)
            activations += element_bytes * matrices
        # Temporary: logits, their fp32 form, its gradient and that gradient in the logits' dtype; or, in a layer's backward,
        # the gradients of its inner activations
        logits = rows * config.vocab_size * (8 + 2 * element_bytes if element_bytes < 4 else 8) + table * element_bytes
        activations += max(logits, tokens * (2 * config.intermediate_size + 4 * width) * element_bytes)
    state = optimizer_bytes(config, optimizer or OptimizerConfig(), shards=shards)
    averages = ceil_div(4 * average_copies * parameters, shards)
    return MemoryEstimate(4 * parameters, (4 + kept_bytes) * parameters, state, activations, averages, residuals)


def kept_from_step_to_step(config: Config) -> MemoryEstimate:
    """What a rank holds whatever its batch is: weights, gradients, optimizer, averages, and what was not sent yet.

    Args:
        config: where the table does not know the optimizer's state, two moments are assumed.
    """
    parameters = num_parameters(config.model)
    shards = config.system.world_size if config.communication.shard_optimizer else 1
    of_virtual_ranks = 0
    if config.batch.virtual_ranks > 1:  # the sum over them lies beside the gradients, in the format that is sent
        of_virtual_ranks = {"fp32": 4, "bf16": 2, "fp16": 2}[config.communication.reduce_dtype]
    return MemoryEstimate(
        weights=4 * parameters,
        gradients=(4 + of_virtual_ranks) * parameters,
        optimizer=optimizer_bytes(config.model, config.optimizer, shards=shards),
        activations=0,
        averages=ceil_div(4 * average_copies(config.averaging) * parameters, shards),
        residuals=residual_bytes(config),
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
    shards = config.system.world_size if config.communication.shard_optimizer else 1
    tokens = config.batch.micro_batch_size * config.data.max_seq_len
    tokens += -tokens % config.batch.shape_multiple
    inputs = 3 * 8 * tokens * config.batch.micro_batches_per_step  # tokens, types, positions of the synthetic step
    kept = tokens * config.model.hidden_size * config.model.num_layers * element_bytes
    state = optimizer_bytes(config.model, config.optimizer, unknown=0.0, shards=shards)
    averages = 4 * average_copies(config.averaging) * num_parameters(config.model) // shards
    return 8 * num_parameters(config.model) + state + averages + residual_bytes(config) + inputs + kept
