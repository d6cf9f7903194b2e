"""Memory of one rank before it runs, from the shapes alone. An estimate: allocator slack and workspaces are not in it."""

from __future__ import annotations

from dataclasses import dataclass

from bert_fast.config import ModelConfig


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def num_parameters(config: ModelConfig) -> int:
    """Trainable parameters, the tied decoder counted once."""
    width, inner = config.hidden_size, config.intermediate_size
    embeddings = (config.vocab_size + config.max_positions + config.type_vocab_size + 2) * width
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    heads = 2 * (width * width + width) + 2 * width + config.vocab_size + 2 * width + 2
    return embeddings + config.num_layers * layer + heads


def activation_bytes_per_token(config: ModelConfig, element_bytes: int) -> int:
    """What backward keeps of one token in the encoder, outside of attention scores.

    A layer keeps its input, q, k, v, the context, two LayerNorm inputs and outputs, and the feed-forward's two inner
    activations; dropout keeps a byte mask where it is on.
    """
    width, inner = config.hidden_size, config.intermediate_size
    kept = (1 + 3 + 1 + 4) * width + 2 * inner
    masks = 2 * width if config.hidden_dropout else 0
    return config.num_layers * (kept * element_bytes + masks)


def estimate(
    config: ModelConfig,
    *,
    tokens: int,
    tokens_squared: int,
    masked: int,
    element_bytes: int,
    keeps_scores: bool,
    shards: int = 1,
) -> MemoryEstimate:
    """Memory of a rank whose largest micro-batch has these sums of L, L^2 and masked positions.

    Args:
        element_bytes: of activations (2 under bf16 or fp16 autocast, 4 in fp32).
        shards: ranks over which optimizer state is divided.
        keeps_scores: whether the attention backend keeps its probabilities for backward (fused kernels do not).
    """
    parameters = num_parameters(config)
    activations = tokens * activation_bytes_per_token(config, element_bytes)
    if keeps_scores:
        activations += config.num_layers * config.num_heads * tokens_squared * element_bytes * 2
    activations += masked * (config.vocab_size * (4 + element_bytes) + 4 * config.hidden_size * element_bytes)
    return MemoryEstimate(4 * parameters, 4 * parameters, -(-8 * parameters // shards), activations)
