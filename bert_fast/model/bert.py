"""BERT for pretraining on unpadded tokens (Devlin et al., arXiv 1810.04805; post-LayerNorm).

Shapes: T tokens of the batch end to end, D hidden width, F feed-forward width, H heads, K head width, V vocabulary,
M masked positions of the batch, B samples, R tokens whose final states are read. Only masked positions reach the
vocabulary projection and only [CLS] rows the next-sentence head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bert_fast.config import ModelConfig
from bert_fast.model import fused
from bert_fast.model.attention import Attention, SequenceLayout, find_backend
from bert_fast.model.fp8 import fp8_context
from bert_fast.model.loss import LossSums, loss_sums
from bert_fast.parts import declare_parts


class BertInput(NamedTuple):
    """The fields of a batch that the model reads; `data.batch.Batch` has these and more.

    input_ids, token_type_ids, position_ids: [T] int64; masked_positions, masked_labels: [M] int64;
    next_sentence_labels: [B] int64 (1: B is from another document); layout: lengths of the B samples. A masked label
    below 0 does not count, and a sequence after the first B (padding to a common token count) has no next-sentence label.
    """

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    position_ids: torch.Tensor
    masked_positions: torch.Tensor
    masked_labels: torch.Tensor
    next_sentence_labels: torch.Tensor
    layout: SequenceLayout


class Embeddings(nn.Module):
    """Word + position + segment embeddings, LayerNorm, dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, width)
        self.position = nn.Embedding(config.max_positions, width)
        self.token_type = nn.Embedding(config.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = config.hidden_dropout

    def forward(self, batch: BertInput) -> torch.Tensor:
        """[T, D]."""
        hidden_TD = self.word(batch.input_ids) + self.position(batch.position_ids)
        hidden_TD = self.norm(hidden_TD + self.token_type(batch.token_type_ids))
        return _dropout(hidden_TD, self.dropout if self.training else 0.0)


class ResidualNorm(nn.LayerNorm):
    """LayerNorm(residual + dropout(x)). One module, as sharding waits for weights before a module runs."""

    # More arguments than nn.LayerNorm's, as the residual is added here
    def forward(self, x_TD: torch.Tensor, residual_TD: torch.Tensor, dropout: float) -> torch.Tensor:  # type: ignore[override]
        if fused.fuses(x_TD):
            return fused.dropout_add_norm(x_TD, residual_TD, self, dropout)
        # CUDA's autocast normalizes in fp32; the residual stream keeps its own dtype (on CPUs nothing changes)
        return super().forward(residual_TD + _dropout(x_TD, dropout)).to(residual_TD.dtype)


class GeluLinear(nn.Linear):
    """linear(gelu(x)), [T, F] to [T, D]; `form` is the `approximate` of `F.gelu`."""

    # One argument more than nn.Linear's
    def forward(self, x_TF: torch.Tensor, form: str) -> torch.Tensor:  # type: ignore[override]
        if fused.fuses(x_TF):
            return fused.gelu_linear(x_TF, self, form)
        return super().forward(F.gelu(x_TF, approximate=form))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width)
        for parameter in self.qkv.parameters():  # query, key and value of the published model in one
            declare_parts(parameter, (width,) * 3)
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = ResidualNorm(width, eps=config.layer_norm_eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = GeluLinear(config.intermediate_size, width)
        self.output_norm = ResidualNorm(width, eps=config.layer_norm_eps)
        self.hidden_dropout = config.hidden_dropout
        self.attention_dropout = config.attention_dropout
        self.gelu_form = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(
        self, hidden_TD: torch.Tensor, layout: SequenceLayout, attend: Attention, rows_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, D]; with `rows_R` (int64 [R]) the output of these tokens alone, [R, D]."""
        return self.feed_forward(self.attention(hidden_TD, layout, attend, rows_R))

    def attention(
        self, hidden_TD: torch.Tensor, layout: SequenceLayout, attend: Attention, rows_R: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer's first half: self-attention, dropout, residual, LayerNorm. [T, D], or [R, D] with `rows_R`."""
        qkv_T3HK = self.qkv(hidden_TD).unflatten(-1, (3, self.num_heads, -1))
        context_TD = attend(qkv_T3HK, layout, self.attention_dropout if self.training else 0.0)
        if rows_R is not None:  # what follows works on each token by itself
            context_TD, hidden_TD = context_TD.index_select(0, rows_R), hidden_TD.index_select(0, rows_R)
        return self.attention_norm(self.attention_out(context_TD), hidden_TD, self._dropout)

    def feed_forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """The layer's second half: feed-forward, dropout, residual, LayerNorm. Same shape."""
        return self.output_norm(self.down(self.up(hidden_TD), self.gelu_form), hidden_TD, self._dropout)

    @property
    def _dropout(self) -> float:
        return self.hidden_dropout if self.training else 0.0

    def compile_halves(self) -> None:
        """Compile each half by itself with `torch.compile`."""
        for name in ("attention", "feed_forward"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=True))


class PretrainingHeads(nn.Module):
    """Masked-LM head (its decoder is the word embedding) and, with `model.next_sentence`, next-sentence head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if config.next_sentence:
            self.pooler = nn.Linear(width, width)
            self.next_sentence = nn.Linear(width, 2)
        self.gelu_form = "tanh" if config.activation == "gelu_tanh" else "none"

    def forward(
        self, masked_MD: torch.Tensor, first_BD: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The input of the vocabulary projection [M, D], and next-sentence logits [B, 2], None without that head."""
        masked_MD = self.transform_norm(F.gelu(self.transform(masked_MD), approximate=self.gelu_form))
        return masked_MD, None if first_BD is None else self.next_sentence(torch.tanh(self.pooler(first_BD)))


class EncoderStage(NamedTuple):
    """A part of the encoder from one tensor to the next: `run` takes what the stage before it returned.

    The first one, the embeddings, takes a tensor that it does not read.
    """

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]


# Computes stages one after the other, from the tensor that the first one takes
StageRunner = Callable[[Sequence[EncoderStage], torch.Tensor], torch.Tensor]


def run_in_order(stages: Sequence[EncoderStage], first: torch.Tensor) -> torch.Tensor:
    """Each stage once; autograd keeps what backward needs."""
    hidden = first
    for stage in stages:
        hidden = stage.run(hidden)
    return hidden


class BertForPretraining(nn.Module):
    """Embeddings, encoder, heads. `forward` returns sums of losses and counts, which the caller normalizes.

    run_stages: computes the encoder from its stages; another one keeps less for backward (memory/segments.py)
    attend:     computes attention

    Args:
        config: the shape of the model.
        backend: a key of `attention.BACKENDS`.
    """

    def __init__(self, config: ModelConfig, backend: str = "loop") -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.attend: Attention = find_backend(backend).compute
        self.run_stages: StageRunner = run_in_order
        self.fp8 = False  # set by fp8.use_fp8
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.heads = PretrainingHeads(config)
        self.apply(self._initialize)

    def _initialize(self, module: nn.Module) -> None:
        """BERT's initialization: truncated normal weights, zero biases, unit LayerNorm."""
        if isinstance(module, nn.Linear | nn.Embedding):
            std = self.config.initializer_range
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode(self, batch: BertInput, rows_R: torch.Tensor | None = None) -> torch.Tensor:
        """Final hidden states, [T, D]. Under autocast the residual stream has the autocast dtype.

        Args:
            rows_R: int64 [R], the tokens whose final states are wanted; the outcome is then [R, D].
        """
        stages = self.stages(batch, rows_R)
        with fp8_context(self.fp8):
            return self.run_stages(stages, batch.input_ids)

    def stages(self, batch: BertInput, rows_R: torch.Tensor | None = None) -> list[EncoderStage]:
        """The encoder cut wherever one tensor [T, D] holds all that follows: the embeddings, then each layer's two halves.

        Args:
            rows_R: as `encode` has it.
        """
        stages = [EncoderStage("embeddings", lambda _: self._embed(batch))]
        for number, layer in enumerate(self.encoder_layers):
            rows = rows_R if number == len(self.layers) - 1 else None
            attention = partial(layer.attention, layout=batch.layout, attend=self.attend, rows_R=rows)
            stages.append(EncoderStage(f"layers.{number}.attention", attention))
            stages.append(EncoderStage(f"layers.{number}.feed_forward", layer.feed_forward))
        return stages

    @property
    def encoder_layers(self) -> list[EncoderLayer]:
        """The layers, from first to last."""
        return [layer for layer in self.layers if isinstance(layer, EncoderLayer)]

    def sharding_units(self) -> list[list[nn.Module]]:
        """Modules whose weights are needed together, in the order of forward: each half of a layer. Not the tied ends."""
        units: list[list[nn.Module]] = []
        for layer in self.encoder_layers:
            units += [[layer.qkv, layer.attention_out, layer.attention_norm], [layer.up, layer.down, layer.output_norm]]
        return units

    def _embed(self, batch: BertInput) -> torch.Tensor:
        hidden_TD = self.embeddings(batch)
        device = hidden_TD.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(device))
        return hidden_TD

    def read_rows(self, batch: BertInput) -> torch.Tensor | None:
        """The tokens whose final states are computed, int64 [R]; None: all of them."""
        if self.config.last_layer != "predicted":
            return None
        if not self.config.next_sentence:
            return batch.masked_positions
        return torch.cat([batch.masked_positions, self._starts(batch)])

    def _head_inputs(self, hidden_RD: torch.Tensor, batch: BertInput) -> tuple[torch.Tensor, torch.Tensor | None]:
        """From the states of `read_rows` (of all tokens if None) to the heads' outputs."""
        next_sentence = self.config.next_sentence
        if self.config.last_layer == "predicted":
            num_masked = len(batch.masked_positions)
            return self.heads(hidden_RD[:num_masked], hidden_RD[num_masked:] if next_sentence else None)
        masked_MD = hidden_RD.index_select(0, batch.masked_positions)
        return self.heads(masked_MD, hidden_RD.index_select(0, self._starts(batch)) if next_sentence else None)

    def _starts(self, batch: BertInput) -> torch.Tensor:
        """Where each sample's [CLS] lies, int64 [B]."""
        starts_B = batch.layout.cu_seqlens[: len(batch.next_sentence_labels)].long()
        # Empty sequences after the last (train/cuda_graphs.py) begin where the tokens end; they have no label
        return starts_B.clamp_max(len(batch.input_ids) - 1)

    def logits(self, batch: BertInput) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Masked-LM logits [M, V] of the masked positions and next-sentence logits [B, 2], None without that head."""
        masked_MD, nsp_logits_B2 = self._head_inputs(self.encode(batch, self.read_rows(batch)), batch)
        return F.linear(masked_MD, self.embeddings.word.weight, self.heads.decoder_bias), nsp_logits_B2

    def forward(self, batch: BertInput, with_accuracy: bool = False) -> LossSums:
        return self.losses(self.encode(batch, self.read_rows(batch)), batch, with_accuracy)

    def losses(self, hidden_RD: torch.Tensor, batch: BertInput, with_accuracy: bool = False) -> LossSums:
        """What follows the encoder: heads and losses, from its output."""
        masked_MD, nsp_logits_B2 = self._head_inputs(hidden_RD, batch)
        return loss_sums(
            masked_MD,
            self.embeddings.word.weight,
            self.heads.decoder_bias,
            batch.masked_labels,
            nsp_logits_B2,
            batch.next_sentence_labels,
            with_accuracy,
        )


def _dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    if p == 0:
        return x
    return fused.dropout(x, p) if fused.fuses(x) else F.dropout(x, p)


def expected_ready_order(model: BertForPretraining) -> list[int]:
    """Indices of the parameters in the order in which backward is expected to finish their gradients.

    Heads first, then layers from last to first, embeddings last. A run measures the actual order.
    """
    names = [name for name, _ in model.named_parameters()]

    def depth(name: str) -> tuple[int, int]:
        part = name.split(".")
        if part[0] == "heads":
            return (0, 0)
        return (1, -int(part[1])) if part[0] == "layers" else (2, int(part[1] == "word"))

    return sorted(range(len(names)), key=lambda i: (depth(names[i]), -i))
