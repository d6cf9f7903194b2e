"""Shape of BERT."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bert_fast.config.choices import ATTENTION_BACKENDS, one_of
from bert_fast.config.section import Count, PositiveFloat, Probability, Section, Tokens, Width


class ModelConfig(Section):
    """The shape of BERT. Read by `bert_fast.model`, and by all that count parameters, FLOPs or bytes."""

    vocab_size: Annotated[int, Field(gt=0, le=2**20)] = Field(
        30522, description="number of rows of the word embedding (MLPerf pads 30522 to 30528)"
    )
    hidden_size: Width = Field(768, description="width of the encoder")
    num_layers: Annotated[int, Field(gt=0, le=1024)] = Field(12, description="number of encoder layers")
    num_heads: Width = Field(12, description="number of attention heads; it must divide hidden_size")
    intermediate_size: Annotated[int, Field(gt=0, le=2**18)] = Field(
        3072, description="width of the feed-forward layer"
    )
    max_positions: Tokens = Field(
        512, description="number of rows of the position table: the longest sample that the model takes, in tokens"
    )
    type_vocab_size: Count = Field(2, description="number of segment types")
    hidden_dropout: Probability = Field(
        0.1, description="probability of dropout after the embeddings and the dense layers"
    )
    attention_dropout: Probability = Field(0.1, description="probability of dropout on the attention probabilities")
    layer_norm_eps: PositiveFloat = Field(1e-12, description="epsilon of every LayerNorm")
    initializer_range: PositiveFloat = Field(
        0.02, description="standard deviation of the truncated normal distribution that starting weights are drawn from"
    )
    activation: Literal["gelu", "gelu_tanh"] = Field(
        "gelu", description="gelu: by the error function, as in BERT; gelu_tanh: its approximation by tanh"
    )
    next_sentence: bool = Field(
        True,
        description="predict whether segment B follows segment A; false: the model has neither that head nor its pooler, and "
        "masked tokens alone are learned",
    )
    last_layer: Literal["all", "predicted"] = Field(
        "all",
        description="tokens for which the last encoder layer computes what follows attention. predicted: only those that the "
        "heads read, masked ones and [CLS]; the mathematics is the same, but dropout draws other random numbers",
    )
    attention_backend: Annotated[
        str, one_of(ATTENTION_BACKENDS, also={"auto": "picked by what the device and the packages can; logged"})
    ] = Field("auto", description="how variable-length attention is computed")

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            near = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            best = min(near, key=lambda n: abs(n - self.num_heads))
            raise ValueError(
                f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}; "
                f"set model.num_heads={best}, the nearest number that does"
            )
        return self
