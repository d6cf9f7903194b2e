"""The model against transformers' BertForPreTraining and against formulas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining
from transformers.utils import logging as transformers_logging

from bert_fast.config import ModelConfig
from bert_fast.data.batch import Batch
from bert_fast.errors import UserError
from bert_fast.memory.state import num_parameters
from bert_fast.model import flops
from bert_fast.model.attention import SequenceLayout
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.model.checkpoints import load_pretrained, read_config, save_pretrained, to_huggingface
from bert_fast.model.loss import LossSums, ProjectedCrossEntropy, SummedCrossEntropy, chunk_rows, loss_sums
from bert_fast.model.objective import MlmNsp
from bert_fast.train.batches import to_device

CPU_BACKENDS = ("loop", "grouped", "matmul", "padded")
EVEN = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": 32,
}
ODD = {
    "vocab_size": 37,
    "hidden_size": 15,
    "num_layers": 3,
    "num_heads": 3,
    "intermediate_size": 7,
    "max_positions": 23,
}
ONE = {"vocab_size": 11, "hidden_size": 3, "num_layers": 1, "num_heads": 1, "intermediate_size": 5, "max_positions": 9}


@pytest.fixture(autouse=True)
def _no_progress_bars() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def small(**changes: object) -> ModelConfig:
    values = {**EVEN, "hidden_dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.2, **changes}
    return ModelConfig.model_validate(values)


def random_model(config: ModelConfig, backend: str = "loop", dtype: torch.dtype = torch.float64) -> BertForPretraining:
    """All parameters random, biases and LayerNorm too, so that none drops out of a comparison."""
    torch.manual_seed(1)
    model = BertForPretraining(config, backend).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)) if "norm.weight" in name else parameter.copy_(
                0.3 * torch.randn_like(parameter)
            )
    return model


def random_input(config: ModelConfig, lengths: list[int], seed: int = 0) -> BertInput:
    """Tokens without id 0: transformers' embedding takes it for padding and gives it no gradient."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    position = np.concatenate([np.arange(n) for n in lengths])
    segment = np.concatenate([(np.arange(n) >= (n + 1) // 2).astype(np.int64) for n in lengths])
    masked = np.sort(rng.permutation(total)[: max(1, total // 5)])
    as_tensor = torch.from_numpy
    return BertInput(
        as_tensor(rng.integers(1, config.vocab_size, total)),
        as_tensor(segment),
        as_tensor(position),
        as_tensor(masked),
        as_tensor(rng.integers(1, config.vocab_size, len(masked))),
        as_tensor(rng.integers(0, 2, len(lengths))),
        SequenceLayout(lengths, as_tensor(starts.astype(np.int32))),
    )


def as_batch(inputs: BertInput) -> Batch:
    tensors = [t.numpy() for t in inputs[:3]]
    return Batch(
        *tensors, inputs.layout.cu_seqlens.numpy(), *[t.numpy() for t in inputs[3:6]], inputs.layout.lengths,
        np.arange(len(inputs.layout.lengths)),
    )  # fmt: skip


def huggingface_of(model: BertForPretraining, config: ModelConfig, attention: str = "sdpa") -> BertForPreTraining:
    """transformers' model with the same weights and dtype."""
    description = BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions, type_vocab_size=config.type_vocab_size,
        hidden_act={"gelu": "gelu", "gelu_tanh": "gelu_new"}[config.activation], hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, layer_norm_eps=config.layer_norm_eps, attn_implementation=attention,
    )  # fmt: skip
    other = BertForPreTraining(description).to(next(model.parameters()).dtype)
    result = other.load_state_dict(to_huggingface(model.state_dict(), config), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}, "tied"
    return other


def padded(batch: BertInput) -> dict[str, torch.Tensor]:
    """The same batch as transformers takes it: rectangles, -100 where nothing is predicted."""
    lengths = batch.layout.lengths
    rows, longest = len(lengths), max(lengths)
    ids, types = torch.zeros(rows, longest, dtype=torch.long), torch.zeros(rows, longest, dtype=torch.long)
    mask, labels = torch.zeros(rows, longest, dtype=torch.long), torch.full((rows, longest), -100)
    flat_labels = torch.full((sum(lengths),), -100)
    flat_labels[batch.masked_positions] = batch.masked_labels
    start = 0
    for row, length in enumerate(lengths):
        here = slice(start, start + length)
        ids[row, :length], types[row, :length] = batch.input_ids[here], batch.token_type_ids[here]
        mask[row, :length], labels[row, :length] = 1, flat_labels[here]
        start += length
    return {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": mask,
        "labels": labels,
        "next_sentence_label": batch.next_sentence_labels,
    }


def mean_loss(model: BertForPretraining, batch: BertInput) -> torch.Tensor:
    sums = model(batch)
    return sums.mlm_sum / len(batch.masked_labels) + sums.nsp_sum / len(batch.layout.lengths)


def assert_close(
    found: torch.Tensor, expected: torch.Tensor, what: str = "", rtol: float = 1e-10, floor: float = 0.0
) -> None:
    """Relative to the largest entry: single entries may vanish by cancellation."""
    scale = max(expected.abs().max().item(), floor) or 1.0
    error = (found - expected).abs().max().item() / scale
    assert error < rtol, f"{what}: {error:.1e}"


# ---- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        (EVEN, [32, 20, 20, 19, 7, 5]),
        (EVEN, [5]),
        (EVEN, [3, 31, 1, 8, 8]),  # not sorted, one token
        (ODD, [23, 22, 22, 21, 9, 1]),
        (ONE, [9, 1, 1]),
        (ONE, [1]),
    ],
    ids=["even", "single", "unsorted", "odd", "tiny", "one token"],
)
def test_loss_and_all_gradients_equal_transformers(backend: str, shape: dict[str, int], lengths: list[int]) -> None:
    config = small(**shape)
    model, batch = random_model(config, backend), random_input(config, lengths)
    other = huggingface_of(model, config)
    loss = mean_loss(model, batch)
    loss.backward()
    expected = other(**padded(batch)).loss
    expected.backward()
    assert_close(loss, expected, "loss")
    gradients = to_huggingface({name: p.grad for name, p in model.named_parameters()}, config)
    theirs = dict(other.named_parameters())
    assert set(gradients) == set(theirs) - {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    # Key biases have no gradient but rounding noise: no entry is asked for more than a thousandth of the largest of all.
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert_close(gradient, theirs[name].grad, name, floor=floor)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_logits_equal_transformers(activation: str) -> None:
    config = small(activation=activation, layer_norm_eps=1e-5, **ODD)
    model, batch = random_model(config), random_input(config, [17, 9, 4])
    inputs = padded(batch)
    found_mlm, found_nsp = model.logits(batch)
    outputs = huggingface_of(model, config, "eager")(**inputs)
    expected = outputs.prediction_logits[inputs["attention_mask"].bool()][batch.masked_positions]
    assert_close(found_mlm, expected)
    assert_close(found_nsp, outputs.seq_relationship_logits)


def test_initial_weights_give_the_same_loss_in_fp32() -> None:
    config = small(initializer_range=0.02)
    torch.manual_seed(5)
    model, batch = BertForPretraining(config, "matmul"), random_input(config, [32, 30, 12, 12])
    assert mean_loss(model, batch).item() == pytest.approx(
        huggingface_of(model, config)(**padded(batch)).loss.item(), rel=1e-6
    )


# ---- against itself -------------------------------------------------------------------------------------------------


def test_a_batch_is_the_sum_of_its_samples() -> None:
    """Sequences do not see each other, and losses are sums: any split of a batch adds up to the same."""
    config = small()
    model = random_model(config, "matmul")
    lengths = [30, 12, 12, 5, 2]
    batch = random_input(config, lengths)
    whole = model(batch, with_accuracy=True)
    start = 0
    totals = torch.zeros(4, dtype=torch.float64)
    for row, length in enumerate(lengths):
        chosen = (batch.masked_positions >= start) & (batch.masked_positions < start + length)
        here = slice(start, start + length)
        single = BertInput(
            batch.input_ids[here], batch.token_type_ids[here], batch.position_ids[here],
            batch.masked_positions[chosen] - start, batch.masked_labels[chosen], batch.next_sentence_labels[row : row + 1],
            SequenceLayout([length], torch.tensor([0, length], dtype=torch.int32)),
        )  # fmt: skip
        totals += torch.stack([x.double() for x in model(single, with_accuracy=True)])
        start += length
    assert_close(torch.stack([x.double() for x in whole]).detach(), totals.detach(), rtol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_padded_and_unpadded_losses_agree(backend: str) -> None:
    config = small(**ODD)
    batch = random_input(config, [23, 14, 13, 3])
    losses = [model(batch) for model in (random_model(config, backend), random_model(config, "padded"))]
    assert_close(losses[0].mlm_sum, losses[1].mlm_sum, rtol=1e-12)
    assert_close(losses[0].nsp_sum, losses[1].nsp_sum, rtol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_a_dummy_sequence_and_dummy_masks_change_nothing(backend: str, multiple: int) -> None:
    """`batch.shape_multiple`: token and mask counts are rounded up, losses, counts and gradients stay as they are."""
    config = small()
    batch = as_batch(random_input(config, [32, 30, 7, 6]))
    inputs = [to_device(batch, torch.device("cpu"), m) for m in (1, multiple)]
    assert len(inputs[1].input_ids) % multiple == 0
    assert len(inputs[1].masked_labels) % max(1, multiple // 4) == 0
    assert (len(inputs[1].input_ids) > 75) == (multiple > 1)
    results = []
    for item in inputs:
        model = random_model(config, backend)
        sums = model(item, with_accuracy=True)
        (sums.mlm_sum + sums.nsp_sum).backward()
        results.append((sums, [p.grad for p in model.parameters()]))
    (a, gradients_a), (b, gradients_b) = results
    assert_close(b.mlm_sum, a.mlm_sum, rtol=1e-12)
    assert_close(b.nsp_sum, a.nsp_sum, rtol=1e-12)
    assert (a.mlm_correct, a.nsp_correct) == (b.mlm_correct, b.nsp_correct)
    floor = 1e-3 * max(g.abs().max().item() for g in gradients_a)
    for found, expected in zip(gradients_b, gradients_a, strict=True):
        assert_close(found, expected, rtol=1e-11, floor=floor)


def test_accuracy_counts() -> None:
    config = small()
    model, batch = random_model(config), random_input(config, [30, 20, 9])
    mlm, nsp = model.logits(batch)
    labels = torch.where(torch.arange(len(mlm)) % 2 == 0, mlm.argmax(-1), (mlm.argmax(-1) + 1) % config.vocab_size)
    sums = model(batch._replace(masked_labels=labels, next_sentence_labels=nsp.argmax(-1)), with_accuracy=True)
    assert sums.mlm_correct.item() == (len(mlm) + 1) // 2
    assert sums.nsp_correct.item() == 3
    plain = model(batch)
    assert plain.mlm_correct is None
    assert plain.nsp_correct is None


def test_dropout_only_in_training() -> None:
    config = small(hidden_dropout=0.5, attention_dropout=0.5)
    batch = random_input(config, [20, 10])
    for backend in CPU_BACKENDS:
        model = random_model(config, backend)
        reference = random_model(small(), "loop")(batch).mlm_sum.item()
        values = {
            mode: [model.train(mode == "train")(batch).mlm_sum.item() for _ in range(2)] for mode in ("train", "eval")
        }
        assert values["eval"][0] == values["eval"][1] == pytest.approx(reference, rel=1e-10)
        assert values["train"][0] != values["train"][1]


@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout"])
def test_each_dropout_has_an_effect(field: str) -> None:
    batch = random_input(small(), [20, 10])
    for backend in CPU_BACKENDS:
        model = random_model(small(**{field: 0.5}), backend).train()
        assert model(batch).mlm_sum.item() != random_model(small(), backend)(batch).mlm_sum.item(), backend


def test_autocast_keeps_the_residual_stream_in_its_format_and_stays_near() -> None:
    config = small()
    model, batch = random_model(config, "matmul", torch.float32), random_input(config, [30, 30, 11])
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(batch).dtype == torch.bfloat16
        sums = model(batch)
    assert sums.mlm_sum.dtype == torch.float32
    assert sums.mlm_sum.item() == pytest.approx(model(batch).mlm_sum.item(), rel=0.02)
    assert model.encode(batch).dtype == torch.float32


# ---- without next-sentence prediction -------------------------------------------------------------------------------


@pytest.mark.parametrize("last_layer", ["all", "predicted"])
def test_without_next_sentence_the_masked_loss_and_its_gradients_are_the_same(last_layer: str) -> None:
    """The plain version is the whole model, of whose losses the one of masked tokens is taken."""
    whole, alone = random_model(small()), random_model(small(next_sentence=False, last_layer=last_layer))
    missing = whole.load_state_dict(alone.state_dict(), strict=False).missing_keys
    assert missing == [f"heads.{name}.{kind}" for name in ("pooler", "next_sentence") for kind in ("weight", "bias")]
    batch = random_input(small(), [32, 20, 7])
    expected, found = whole(batch, with_accuracy=True), alone(batch, with_accuracy=True)
    expected.mlm_sum.backward()
    found.total.backward()
    assert_close(found.mlm_sum, expected.mlm_sum, rtol=1e-12)
    assert found.mlm_correct == expected.mlm_correct
    assert found.nsp_sum is found.nsp_correct is alone.logits(batch)[1] is None
    theirs = dict(whole.named_parameters())
    floor = 1e-3 * max(p.grad.abs().max().item() for p in alone.parameters())
    for name, parameter in alone.named_parameters():
        assert_close(parameter.grad, theirs[name].grad, name, rtol=1e-12, floor=floor)


def test_the_whole_loss_is_the_sum_of_what_is_there() -> None:
    mlm, nsp = torch.tensor(3.0), torch.tensor(0.5)
    assert LossSums(mlm, nsp).total == 3.5
    assert LossSums(mlm, None).total == 3.0
    objective = MlmNsp()
    assert objective.loss(LossSums(mlm, nsp), 6, 2) == 0.75
    assert objective.loss(LossSums(mlm, None), 6, 2) == 0.5


# ---- the last layer for predicted tokens alone ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("shape", "lengths", "multiple"),
    [(EVEN, [32, 20, 20, 7, 5], 1), (EVEN, [3, 31, 1, 8], 64), (ODD, [23, 22, 9, 1], 4), (ONE, [1], 1)],
    ids=["even", "dummy sequence and masks", "odd", "one token"],
)
def test_the_last_layer_of_predicted_tokens_is_that_of_all(
    backend: str, shape: dict[str, int], lengths: list[int], multiple: int
) -> None:
    """The plain version computes all tokens: same losses, counts and gradients to rounding."""
    batch = to_device(as_batch(random_input(small(**shape), lengths)), torch.device("cpu"), multiple)
    results = []
    for last_layer in ("all", "predicted"):
        model = random_model(small(last_layer=last_layer, **shape), backend)
        sums = model(batch, with_accuracy=True)
        sums.total.backward()
        logits = model.logits(batch)
        results.append(([*sums, *logits], {name: p.grad for name, p in model.named_parameters()}))
    (expected, gradients), (found, found_gradients) = results
    for a, b in zip(found, expected, strict=True):
        assert_close(a.double(), b.double(), rtol=1e-12)
    floor = 1e-3 * max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert_close(found_gradients[name], gradient, name, rtol=1e-12, floor=floor)


@pytest.mark.parametrize("next_sentence", [True, False])
def test_the_last_layer_computes_no_more_than_the_heads_read(next_sentence: bool) -> None:
    config = small(last_layer="predicted", next_sentence=next_sentence)
    model, batch = random_model(config), random_input(config, [20, 12, 7])
    rows: dict[str, list[int]] = {}
    for number, layer in enumerate(model.layers):
        for name, module in layer.named_children():
            module.register_forward_hook(
                lambda *args, key=f"{number}.{name}": rows.setdefault(key, []).append(len(args[-1]))
            )
    model(batch)
    read = len(batch.masked_positions) + (3 if next_sentence else 0)
    after = {"attention_out", "attention_norm", "up", "down", "output_norm"}
    assert rows == {
        **{f"0.{name}": [39] for name in {"qkv", *after}}, "1.qkv": [39], **{f"1.{name}": [read] for name in after},
    }  # fmt: skip


def test_the_last_layer_of_predicted_tokens_has_dropout_in_training_alone() -> None:
    batch = random_input(small(), [20, 10])
    reference = random_model(small(), "loop")(batch).total.item()
    model = random_model(small(last_layer="predicted", hidden_dropout=0.3, attention_dropout=0.3), "matmul")
    assert model.eval()(batch).total.item() == pytest.approx(reference, rel=1e-10)
    values = [model.train()(batch).total.item() for _ in range(2)]
    assert values[0] != values[1]


def test_the_last_layer_of_predicted_tokens_under_autocast() -> None:
    batch = random_input(small(), [30, 30, 11])
    losses = []
    for last_layer in ("all", "predicted"):
        model = random_model(small(last_layer=last_layer), "matmul", torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            sums = model(batch)
        sums.total.backward()
        losses.append(sums.total.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_summed_cross_entropy_equals_torch() -> None:
    logits = (3 * torch.randn(17, 29, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 29, (17,))
    found, expected = SummedCrossEntropy.apply(logits, labels), F.cross_entropy(logits, labels, reduction="sum")
    assert_close(found, expected, rtol=1e-13)
    for factor in (1.0, -2.5):
        a, b = (torch.autograd.grad(factor * loss, logits, retain_graph=True)[0] for loss in (found, expected))
        assert_close(a, b, rtol=1e-12)
    assert torch.autograd.gradcheck(SummedCrossEntropy.apply, (logits, labels))


def test_rows_with_a_negative_label_do_not_count() -> None:
    logits = (3 * torch.randn(17, 29, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 29, (17,))
    labels[[0, 5, 16]] = -1
    found, expected = (
        SummedCrossEntropy.apply(logits, labels),
        F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1),
    )
    assert_close(found, expected, rtol=1e-13)
    a, b = (torch.autograd.grad(loss, logits)[0] for loss in (found, expected))
    assert_close(a, b, rtol=1e-12)
    assert (a[[0, 5, 16]] == 0).all()


def test_summed_cross_entropy_survives_large_logits() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-3e38, 3e38, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    loss = SummedCrossEntropy.apply(logits, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_summed_cross_entropy_of_half_logits_is_computed_in_fp32(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(50, 200)).to(dtype).requires_grad_()
    labels = torch.randint(0, 200, (50,))
    loss = SummedCrossEntropy.apply(logits, labels)
    wide = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (loss * 0.125).backward()
    (expected * 0.125).backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.float(), wide.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_no_masked_position_is_a_loss_of_zero() -> None:
    hidden = torch.zeros(0, 3, requires_grad=True)
    sums = loss_sums(
        hidden,
        torch.ones(7, 3, requires_grad=True),
        torch.zeros(7, requires_grad=True),
        torch.zeros(0, dtype=torch.long),
        torch.zeros(1, 2, requires_grad=True),
        torch.zeros(1, dtype=torch.long),
        True,
    )
    assert sums.mlm_sum.item() == 0.0
    assert sums.mlm_correct.item() == 0
    sums.mlm_sum.backward()
    assert hidden.grad.shape == (0, 3)


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_projected_loss_in_chunks_equals_the_plain_one(rows: int, dtype: torch.dtype) -> None:
    """Loss, accuracy and the gradients of hidden states, projection and bias; rows without a label do not count."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(10, 6), torch.randn(17, 6), torch.randn(17)
    labels = torch.tensor([3, -1, 5, 16, 0, 0, 2, -1, 9, 9])

    def leaves() -> list[torch.Tensor]:
        return [
            x.double().requires_grad_() if dtype == torch.float64 else x.clone().requires_grad_()
            for x in (hidden, weight, bias)
        ]

    ours, plain = leaves(), leaves()
    total, correct = ProjectedCrossEntropy.apply(ours[0].to(dtype), ours[1], ours[2], labels, rows, True)
    (total * 0.5).backward()
    logits = F.linear(plain[0], plain[1], plain[2])
    expected = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    (expected * 0.5).backward()
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    assert total.item() == pytest.approx(expected.item(), rel=tolerance)
    if dtype == torch.float64:
        assert correct.item() == (logits.argmax(-1) == labels).sum().item()
    for a, b in zip(ours, plain, strict=True):
        assert a.grad is not None
        assert_close(a.grad, b.grad, rtol=tolerance)


def test_the_logits_of_a_large_batch_are_never_all_alive() -> None:
    """Largest tensor that forward and backward make: a chunk of logits, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    hidden, weight = torch.randn(400, 8, requires_grad=True), torch.randn(2000, 8, requires_grad=True)
    with Largest():
        total, _ = ProjectedCrossEntropy.apply(
            hidden, weight, torch.zeros(2000), torch.randint(0, 2000, (400,)), 50, False
        )
        total.backward()
    assert largest[0] == 50 * 2000
    assert chunk_rows(30_528, "cpu") * 30_528 * 4 <= 64 << 20


# ---- initialisation, counts, FLOPs ----------------------------------------------------------------------------------


def test_initialisation_is_berts() -> None:
    """Truncated normal at two standard deviations (its own is 0.8796 of the parameter), zero biases, unit LayerNorm."""
    config = small(hidden_size=128, intermediate_size=512, vocab_size=2000, initializer_range=0.02, num_layers=2)
    for name, parameter in BertForPretraining(config).named_parameters():
        if "norm.weight" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.abs().max() <= 0.04, name
            tolerance = 5 / parameter.numel() ** 0.5
            assert parameter.std().item() == pytest.approx(0.02 * 0.8796, rel=max(0.01, tolerance)), name
            assert abs(parameter.mean().item()) < 0.02 * tolerance, name
            assert parameter.abs().max() > 0.03, name


def test_seed_decides_the_weights() -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(BertForPretraining(small()).layers[1].up.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("next_sentence", [True, False])
@pytest.mark.parametrize("shape", [EVEN, ODD, ONE])
def test_number_of_parameters(shape: dict[str, int], next_sentence: bool) -> None:
    config = small(next_sentence=next_sentence, **shape)
    with torch.device("meta"):
        assert num_parameters(config) == sum(p.numel() for p in BertForPretraining(config).parameters())


def test_number_of_parameters_of_bert_large() -> None:
    """336,226,108 of BertForPreTraining, with its pooler, next-sentence head and tied decoder."""
    config = ModelConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)
    assert num_parameters(config) == 336_226_108


@pytest.mark.parametrize("shape", [EVEN, ODD])
@pytest.mark.parametrize("backend", ["loop", "matmul"])
def test_flops_formula_equals_torchs_counter(shape: dict[str, int], backend: str) -> None:
    """One sequence, of a length that no backend pads. On the CPU the counter knows no fused attention, so `loop` shows
    the dense layers alone."""
    config = small(**shape)
    model, batch = random_model(config, backend, torch.float32), random_input(config, [16])
    masked = len(batch.masked_labels)
    next_sentence = (
        2 * config.hidden_size**2 + 2 * 2 * config.hidden_size
    )  # pooler and classifier: left out of the formula
    with FlopCounterMode(display=False) as counter:
        sums = model(batch)
        forward = counter.get_total_flops()
        (sums.mlm_sum + sums.nsp_sum).backward()
        everything = counter.get_total_flops()
    squared = 16**2 if backend == "matmul" else 0
    expected = flops.forward_flops_per_token(config) * 16 + flops.forward_flops_per_token_squared(config) * squared
    expected += flops.forward_flops_per_masked_token(config) * masked
    # the gradient of the vocabulary projection is computed with its loss
    assert forward == expected + next_sentence + 2 * 2 * config.hidden_size * config.vocab_size * masked
    assert everything == flops.train_flops(config, 16, squared, masked) + 3 * next_sentence


def test_cost_coefficients_are_the_flops_of_a_sample() -> None:
    config = small(**ODD)
    linear, quadratic = flops.cost_coefficients(config, mask_share=0.25)
    assert linear * 20 + quadratic * 400 == pytest.approx(flops.train_flops(config, 20, 400, 5))


@pytest.mark.parametrize("shape", [EVEN, ODD])
def test_flops_of_the_last_layer_of_predicted_tokens(shape: dict[str, int]) -> None:
    """What torch counts less than for all tokens is what the cost of a sample leaves out; model FLOPs stay as they are."""
    counts = {}
    for last_layer in ("all", "predicted"):
        config = small(last_layer=last_layer, next_sentence=False, **shape)
        model, batch = random_model(config, "matmul", torch.float32), random_input(config, [16])
        with FlopCounterMode(display=False) as counter:
            model(batch).total.backward()
        counts[last_layer] = counter.get_total_flops()
    left_out = 16 - len(batch.masked_labels)
    assert counts["all"] - counts["predicted"] == 3 * left_out * flops.forward_flops_saved_per_token(config)
    assert counts["all"] == flops.train_flops(config, 16, 16**2, len(batch.masked_labels))
    linear, quadratic = flops.cost_coefficients(config, mask_share=len(batch.masked_labels) / 16)
    assert linear * 16 + quadratic * 16**2 == pytest.approx(counts["predicted"])


# ---- weights in and out ---------------------------------------------------------------------------------------------


def test_round_trip_through_transformers(tmp_path: Path) -> None:
    config = small(activation="gelu_tanh", **ODD)
    model, batch = random_model(config, "loop", torch.float32), random_input(config, [20, 7])
    save_pretrained(model, config, tmp_path / "ours")
    other = BertForPreTraining.from_pretrained(tmp_path / "ours").eval()
    outputs = other(**padded(batch))
    assert outputs.loss.item() == pytest.approx(mean_loss(model, batch).item(), rel=1e-5)
    assert other.config.hidden_act == "gelu_new"
    assert other.config.num_attention_heads == 3
    other.save_pretrained(tmp_path / "theirs")
    back = BertForPretraining(config)
    load_pretrained(back, config, tmp_path / "theirs")
    for (name, a), b in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_model_without_next_sentence_is_transformers_masked_lm(tmp_path: Path) -> None:
    config = small(next_sentence=False)
    model, batch = random_model(config, "loop", torch.float32), random_input(config, [20, 7])
    save_pretrained(model, config, tmp_path / "ours")
    assert read_config(tmp_path / "ours")["architectures"] == ["BertForMaskedLM"]
    other, said = BertForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = {name: value for name, value in padded(batch).items() if name != "next_sentence_label"}
    loss = other.eval()(**inputs).loss
    assert loss.item() == pytest.approx(model(batch).mlm_sum.item() / len(batch.masked_labels), rel=1e-5)
    other.save_pretrained(tmp_path / "theirs")
    back = BertForPretraining(config)
    load_pretrained(back, config, tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_save_and_load_keep_every_bit(tmp_path: Path) -> None:
    config = small()
    model = random_model(config, "loop", torch.float32)
    save_pretrained(model, config, tmp_path)
    back = BertForPretraining(config)
    load_pretrained(back, config, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    description = read_config(tmp_path)
    assert description["vocab_size"] == 40
    assert description["model_type"] == "bert"


def test_a_shorter_vocabulary_is_filled_with_zeros(tmp_path: Path) -> None:
    """MLPerf pads 30,522 rows to 30,528."""
    model = random_model(small(), "loop", torch.float32)
    save_pretrained(model, small(), tmp_path)
    config = small(vocab_size=48)
    wide = BertForPretraining(config)
    load_pretrained(wide, config, tmp_path)
    assert torch.equal(wide.embeddings.word.weight[:40], model.embeddings.word.weight)
    assert (wide.embeddings.word.weight[40:] == 0).all()
    assert torch.equal(wide.heads.decoder_bias[:40], model.heads.decoder_bias)
    assert (wide.heads.decoder_bias[40:] == 0).all()


def saved(tmp_path: Path, **shape: int) -> Path:
    config = small(**shape)
    save_pretrained(random_model(config, "loop", torch.float32), config, tmp_path)
    return tmp_path


def load_into(folder: Path, **shape: int) -> str:
    config = small(**shape)
    with pytest.raises(UserError) as caught:
        load_pretrained(BertForPretraining(config), config, folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_folder_without_weights(tmp_path: Path) -> None:
    assert "has no model.safetensors; point checkpoint.init_from at such a folder" in load_into(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"garbage" * 10, lambda data: b""])
def test_damaged_weights(tmp_path: Path, damage) -> None:
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "is damaged" in load_into(tmp_path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    weights = load_file(path)
    del weights["bert.encoder.layer.1.attention.self.key.weight"]
    save_file(weights, path)
    assert "has no tensor bert.encoder.layer.1.attention.self.key.weight" in load_into(tmp_path)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"intermediate_size": 48}, ["another model", "layers.0.up.weight", "[32, 16]", "[48, 16]"]),
        ({"hidden_size": 32}, ["another model", "embeddings.word.weight", "[40, 16]", "[40, 32]"]),
        ({"vocab_size": 39}, ["another model", "embeddings.word.weight", "[40, 16]", "[39, 16]"]),
        ({"max_positions": 64}, ["another model", "embeddings.position.weight"]),
        ({"num_layers": 3}, ["has 2 layers, model.num_layers=3"]),
        ({"num_layers": 1}, ["has 2 layers, model.num_layers=1"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_of_another_model_name_the_tensor(tmp_path: Path, change: dict[str, int], parts: list[str]) -> None:
    text = load_into(saved(tmp_path), **change)
    for part in parts:
        assert part in text


@pytest.mark.parametrize("change", [{"num_heads": 4}, {"activation": "gelu_tanh"}])
def test_weights_of_another_model_with_the_same_shapes(tmp_path: Path, change: dict[str, object]) -> None:
    assert json.loads((saved(tmp_path) / "config.json").read_text())["num_attention_heads"] == 2
    load_into(tmp_path, **change)  # type: ignore[arg-type]


def test_damaged_description_of_a_checkpoint(tmp_path: Path) -> None:
    (saved(tmp_path) / "config.json").write_text('{"num_attention_heads":')
    load_into(tmp_path)
