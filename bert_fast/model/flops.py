"""Model FLOPs: what the mathematics needs, without recomputation or padding. A multiply-add counts as two.

Model FLOPs, of which MFU is a share, are those of all layers for all tokens, as everyone counts them. A run with
`model.last_layer: predicted` computes fewer, and its MFU may be higher for that; the cost of a sample, by which batches are
balanced, is of what is computed.
"""

from __future__ import annotations

from bert_fast.config import ModelConfig


def forward_flops_per_token(config: ModelConfig) -> float:
    """Forward FLOPs of the encoder's dense layers per token: the linear term of a sample's cost, without the heads."""
    width, inner = config.hidden_size, config.intermediate_size
    return config.num_layers * (2 * 4 * width * width + 2 * 2 * width * inner)


def forward_flops_per_token_squared(config: ModelConfig) -> float:
    """Forward FLOPs of attention scores and their weighted sum per pair of tokens."""
    return config.num_layers * 2 * 2 * config.hidden_size


def forward_flops_per_masked_token(config: ModelConfig) -> float:
    """Forward FLOPs of the masked-LM transform and vocabulary projection per masked position."""
    return 2 * config.hidden_size * (config.hidden_size + config.vocab_size)


def train_flops(config: ModelConfig, tokens: float, tokens_squared: float, masked: float) -> float:
    """FLOPs of forward and backward (3x forward) of samples with these sums of L, L^2 and masked positions."""
    return 3 * (
        forward_flops_per_token(config) * tokens
        + forward_flops_per_token_squared(config) * tokens_squared
        + forward_flops_per_masked_token(config) * masked
    )


def forward_flops_saved_per_token(config: ModelConfig) -> float:
    """Forward FLOPs that the last layer does not spend on a token whose final state is not read (`model.last_layer`)."""
    if config.last_layer == "all":
        return 0
    width, inner = config.hidden_size, config.intermediate_size
    return 2 * width * width + 2 * 2 * width * inner


def cost_coefficients(config: ModelConfig, mask_share: float = 0.15) -> tuple[float, float]:
    """(a, b) of cost(L) = a L + b L^2 in training FLOPs, with the heads spread over all tokens."""
    linear = forward_flops_per_token(config) + mask_share * forward_flops_per_masked_token(config)
    linear -= (1 - mask_share) * forward_flops_saved_per_token(config)
    return 3 * linear, 3 * forward_flops_per_token_squared(config)
