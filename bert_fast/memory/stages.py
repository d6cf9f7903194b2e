"""The chain of BERT from its shape alone: what each stage keeps, takes and costs, without a model or a device.

Stages are those of `BertForPretraining.stages` and the heads with their losses. On CPUs the fused parts (`model/fused.py`) keep
the attention's probabilities and no masks; a CUDA device keeps dropout's masks, the norms' inputs in fp32 and no probabilities,
unless `model.attention_backend` computes them by plain products: their softmax is in fp32 there. Under bf16 or fp16 each
product also keeps its weight in that format. tests/unit/memory/test_stages.py measures the CPU's parts, and plain ones that
compute as CUDA does.

Letters: T tokens, D hidden width, F feed-forward width, H heads, V vocabulary, M masked positions, B samples, R tokens whose
final states are read, e bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bert_fast.config import Config, ModelConfig
from bert_fast.config.choices import ATTENTION_BACKENDS
from bert_fast.integers import round_up
from bert_fast.memory.remat import Chain, Stage
from bert_fast.memory.state import parameter_groups

_STATISTICS = 8  # bytes of a row's mean and standard deviation


@dataclass(frozen=True)
class MicroBatch:
    """The sums that a micro-batch's memory follows from: tokens, squared lengths, masked positions, samples."""

    tokens: int
    tokens_squared: int
    masked: int
    samples: int


def longest_lengths(config: Config) -> list[int]:
    """Of the samples of the longest micro-batch that a config allows: full ones, up to the token cap if there is one."""
    longest = config.data.max_seq_len
    tokens, most = config.batch.micro_batch_size * config.longest_sample, config.balance.max_tokens
    if most is not None:
        tokens = min(tokens, most)
    whole, rest = divmod(tokens, longest)
    return [longest] * whole + ([rest] if rest else [])


def longest_micro_batch(config: Config) -> MicroBatch:
    """The sums of the longest micro-batch that a config allows."""
    lengths = longest_lengths(config)
    tokens = sum(lengths)
    rounded = round_up(tokens, config.batch.shape_multiple)
    masked = max(1, int(config.data.mask_share * tokens))
    return MicroBatch(rounded, sum(length**2 for length in lengths), masked, config.batch.micro_batch_size)


@dataclass(frozen=True)
class Hardware:
    """How a model is computed.

    element_bytes: of activations: 2 under bf16 or fp16 autocast, 4 in fp32
    on_cpu:        by the CPU's fused parts
    logits_rows:   rows of logits in memory at a time (all masked positions if None)
    flops_per_s:   of matrix products, for the seconds of stages
    """

    element_bytes: int
    on_cpu: bool
    logits_rows: int | None = None
    flops_per_s: float = 1e12


def encoder_chain(
    config: ModelConfig,
    batch: MicroBatch,
    hardware: Hardware,
    attention_again: bool = False,
    gradients_grow: bool = False,
) -> Chain:
    """The chain of a micro-batch.

    Args:
        attention_again: the probabilities of attention are computed again (`memory.recompute: attention`).
        gradients_grow: those of weights are made in backward, and do not stay from step to step.
    """
    parts = _Parts(config, batch, hardware, attention_again)
    stages = [parts.embeddings()]
    for number in range(config.num_layers):
        is_last = number == config.num_layers - 1
        rows = parts.rows_read if is_last else batch.tokens
        stages += [parts.attention(f"layers.{number}", rows), parts.feed_forward(f"layers.{number}", rows)]
    stages.append(parts.heads())
    if gradients_grow:
        stages = [replace(each, gradient_bytes=4 * num_weights(config, each.name)) for each in stages]
        return grown_by_layer(Chain(tuple(stages)))
    return Chain(tuple(stages))


def grown_by_layer(chain: Chain) -> Chain:
    """The chain with all of a layer's gradients there as soon as backward reaches its second half, as buckets have them."""
    stages = list(chain.stages)
    for number, stage in enumerate(stages):
        if stage.name.endswith(".attention"):
            after = stages[number + 1]
            stages[number + 1] = replace(after, gradient_bytes=after.gradient_bytes + stage.gradient_bytes)
            stages[number] = replace(stage, gradient_bytes=0)
    return replace(chain, stages=tuple(stages))


def num_weights(config: ModelConfig, stage: str) -> int:
    """Parameters of a stage; the tied table is the embeddings', where its gradient is complete."""
    width, inner = config.hidden_size, config.intermediate_size
    if stage.endswith(".attention"):
        return 4 * width * width + 6 * width
    if stage.endswith(".feed_forward"):
        return 2 * width * inner + inner + 3 * width
    return next(group.numel for group in parameter_groups(config) if group.name == stage)


class _Parts:
    """Bytes at the peak of each stage are written as the tensors that are live at that point, one term each."""

    def __init__(self, config: ModelConfig, batch: MicroBatch, hardware: Hardware, attention_again: bool) -> None:
        self._config, self._batch, self._hardware = config, batch, hardware
        self._e = hardware.element_bytes
        self._casts = self._e < 4  # weights are cast, and the casts kept
        self._table = config.vocab_size * config.hidden_size
        self._attention_again = attention_again
        backend = ATTENTION_BACKENDS.get(config.attention_backend)  # `auto` picks none that keeps them on CUDA
        self._keeps_probabilities = backend is not None and backend.keeps_probabilities
        self.rows_read = batch.tokens
        if config.last_layer == "predicted":
            self.rows_read = batch.masked + (batch.samples if config.next_sentence else 0)

    def _stage(self, name: str, rows: int, saved: int, peak: int, flops: float) -> Stage:
        """`peak`: what is live at most, the stage's input aside; the tied table's gradient waits beside it."""
        output = rows * self._config.hidden_size * self._e
        temporary = max(0, peak - saved - output) + 4 * self._table
        return Stage(name, output, saved, flops / self._hardware.flops_per_s, temporary)

    def embeddings(self) -> Stage:
        tokens, width = self._batch.tokens, self._config.hidden_size
        wide, drops = 4 * tokens * width, self._config.hidden_dropout > 0
        masks = tokens * width if drops and not self._hardware.on_cpu else 0
        saved = wide + _STATISTICS * tokens + masks
        at_table = 4 * self._table + wide
        at_norm = saved + wide + (3 if drops and self._hardware.on_cpu else 2) * wide
        return self._stage("embeddings", tokens, saved, max(at_table, at_norm), 20.0 * tokens * width)

    def attention(self, layer: str, rows: int) -> Stage:
        config, e = self._config, self._e
        tokens, width = self._batch.tokens, config.hidden_size
        whole, read = tokens * width * e, rows * width * e
        scores = config.num_heads * self._batch.tokens_squared
        if self._hardware.on_cpu:
            kept = scores * e
            saved = 3 * whole + kept + 2 * read + _STATISTICS * rows
            # The probabilities' gradient: qkv and its gradient, five rows of tokens, and dropout's factor, probabilities,
            # their gradient and the scores'
            drops = config.attention_dropout > 0
            peak = 11 * whole + (4 if drops else 3) * scores * e
        else:
            masks = rows * width if config.hidden_dropout else 0
            saved = 3 * whole + read + 4 * rows * width + masks + _STATISTICS * rows
            at_kernel = saved - 4 * rows * width + 2 * read + 3 * whole
            if self._keeps_probabilities:
                drops = config.attention_dropout > 0
                kept = self._bytes_of_probability(drops) * scores
                # Forward has the scores, what softmax and dropout return, the mask, and a cast for the product. Backward of
                # the product has its gradient beside what is kept; that of softmax three in fp32, and less of the tokens
                at_softmax = at_kernel - 3 * whole - 2 * read + 12 * scores
                at_kernel = max(at_kernel + (13 * scores if drops else kept + e * scores), at_softmax)
            else:
                kept = 4 * config.num_heads * tokens  # sums of the rows' exponentials
                at_kernel += kept + 4 * tokens * width
            saved += kept
            at_norm = saved + self._norms(rows)
            peak = max(at_norm, at_kernel)
        if self._casts:
            saved += 4 * width * width * e
            peak += 3 * width * width * e
        if self._attention_again:
            saved -= kept
        flops = 2 * (3 * tokens + rows) * width * width + 4 * self._batch.tokens_squared * width
        return self._stage(f"{layer}.attention", rows, saved, peak, flops)

    def _norms(self, rows: int) -> int:
        """What a CUDA device has at a norm beside what is kept: its output and gradient in fp32, and its terms as they came.

        So it is where a run of stages has been computed again up to here: backward asked for it with the gradient cast.
        """
        return rows * self._config.hidden_size * (8 + self._e * (2 if self._casts else 1))

    def _bytes_of_probability(self, drops: bool) -> int:
        """What a CUDA device keeps of one: as softmax returns it, in fp32; dropout's mask; and as the product reads it."""
        of_product = self._e if self._casts or drops else 0  # else it reads what softmax returned
        return 4 + (1 if drops else 0) + of_product

    def feed_forward(self, layer: str, rows: int) -> Stage:
        config, e = self._config, self._e
        width, inner = config.hidden_size, config.intermediate_size
        out, middle, weight = rows * width * e, rows * inner * e, width * inner
        drops = config.hidden_dropout > 0
        if self._hardware.on_cpu:
            saved = middle + out + _STATISTICS * rows
            peak = 3 * middle + (2 if drops else 1) * out + weight * e
        else:
            masks = rows * width if drops else 0
            saved = 2 * middle + 4 * rows * width + masks + _STATISTICS * rows
            at_norm = saved + self._norms(rows)
            at_product = 3 * middle + 2 * out + weight * e
            peak = max(at_norm, at_product)
        if self._casts:
            saved += 2 * weight * e
            peak += 2 * weight * e
        return self._stage(f"{layer}.feed_forward", rows, saved, peak, 4.0 * rows * width * inner)

    def heads(self) -> Stage:
        config, e, masked = self._config, self._e, self._batch.masked
        width, vocabulary, table = config.hidden_size, config.vocab_size, self._table
        rows = masked if self._hardware.logits_rows is None else min(masked, self._hardware.logits_rows)
        samples = self._batch.samples if config.next_sentence else 0
        in_chunks = rows < masked
        table_gradient = table * (4 if in_chunks or not self._casts else e)
        states = 4 * masked * width * e + _STATISTICS * masked + 3 * samples * width * e
        if config.last_layer == "predicted":  # the heads read slices of the encoder's output
            states -= (masked + samples) * width * e
        if not self._hardware.on_cpu:
            states += (4 - e) * masked * width  # the norm's input, in fp32
        if self._casts:
            states += (2 if samples else 1) * width * width * e
        saved = states + table_gradient + 4 * vocabulary
        narrow = table * e if self._casts else 0
        logits = (
            rows * vocabulary * (8 + 2 * e if self._casts else 8)
        )  # logits, in fp32, their gradient in fp32, and cast
        beside = 2 * masked * width * e + states + 4 * vocabulary + narrow
        of_products = table * 4 + (rows * vocabulary * (2 * e) if self._casts else logits)
        forward = beside + max(logits + (table_gradient if in_chunks else 0), of_products)
        backward = saved + 4 * table
        flops = 2.0 * (masked + samples) * width * width + 6.0 * masked * table
        return Stage("heads", 0, saved, flops / self._hardware.flops_per_s, max(forward, backward) - saved)
