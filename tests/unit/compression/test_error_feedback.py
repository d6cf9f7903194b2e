"""What is sent and what is left add up to what there was, over many steps, with skipped steps in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bert_fast.compression.error_feedback import ROUNDINGS, STORAGES, ErrorFeedback
from bert_fast.compression.quantize import Codec, Fp8, Int8, Sign
from bert_fast.compression.topk import TopK

N = 5000
CODECS: dict[str, Codec] = {
    "int8": Int8(256), "fp8": Fp8(256), "topk": TopK(0.05, 512), "topk_fp32": TopK(0.05, 512, torch.float32), "sign": Sign(512),
}  # fmt: skip


def sent_by(codec: Codec, values: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(values[None]), len(values))[0]


def dyadic(step: int) -> torch.Tensor:
    """Gradients on a grid so coarse that 200 of them add up in fp32 without rounding."""
    whole = torch.randint(-100, 101, (N,), generator=torch.Generator().manual_seed(step))
    return whole.to(torch.float32) / 64


def test_identity_to_the_last_bit_in_fp32_over_200_steps() -> None:
    feedback, sent, given = ErrorFeedback(N), torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for step in range(200):
        gradient = dyadic(step)
        given += gradient
        corrected = feedback.correct(gradient.clone())
        message = sent_by(CODECS["topk_fp32"], corrected)
        feedback.keep(corrected, message)
        sent += message
        assert torch.equal(sent + feedback.residual(), given), step


@pytest.mark.parametrize("name", ["int8", "topk", "topk_fp32"])
def test_every_step_is_exact_where_messages_are_near_or_zero(name: str) -> None:
    """Any gradients: what was to be sent is the message and the new residual, exactly, by Sterbenz's lemma."""
    feedback = ErrorFeedback(N)
    for step in range(50):
        gradient = torch.randn(N, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 7 - 3)
        corrected = feedback.correct(gradient.clone())
        message = sent_by(CODECS[name], corrected)
        feedback.keep(corrected, message)
        assert torch.equal(message.double() + feedback.residual().double(), corrected.double()), step


@pytest.mark.parametrize("name", CODECS)
def test_nothing_is_lost_over_200_steps(name: str) -> None:
    feedback, sent, given = ErrorFeedback(N), torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for step in range(200):
        gradient = torch.randn(N, generator=torch.Generator().manual_seed(step))
        given += gradient
        corrected = feedback.correct(gradient.clone())
        message = sent_by(CODECS[name], corrected)
        feedback.keep(corrected, message)
        sent += message
    torch.testing.assert_close(sent + feedback.residual(), given, rtol=0, atol=2e-4)  # 200 roundings of numbers near 50
    without = torch.stack(
        [sent_by(CODECS[name], torch.randn(N, generator=torch.Generator().manual_seed(s))) for s in range(200)]
    )
    assert (without.double().sum(dim=0) - given).norm() > 3 * (sent - given).norm() or name in ("int8", "fp8")


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_residual_is_the_difference_in_its_own_format(storage: str, rounding: str) -> None:
    feedback = ErrorFeedback(N, storage=storage, rounding=rounding)
    corrected = torch.randn(N, generator=torch.Generator().manual_seed(1))
    message = sent_by(CODECS["topk"], corrected)
    feedback.keep(corrected, message)
    difference, found = corrected - message, feedback.residual()
    if storage == "fp32":
        assert torch.equal(found, difference)
    elif storage == "bf16":
        limit = difference.abs() * 2.0 ** (-8 if rounding == "stochastic" else -9) * 2
        assert ((found - difference).abs() <= limit).all()
        assert torch.equal(found, found.to(torch.bfloat16).to(torch.float32))
    else:
        for low in range(0, N, 4096):
            block, kept = difference[low : low + 4096], found[low : low + 4096]
            level = float(block.max() - block.min()) / 15
            assert float((kept - block).abs().max()) <= level * (1.1 if rounding == "stochastic" else 0.6)
            assert len(kept.unique()) <= 16


def test_bf16_to_the_nearest_is_torchs_cast() -> None:
    feedback = ErrorFeedback(N, storage="bf16")
    values = torch.randn(N, generator=torch.Generator().manual_seed(2))
    feedback.keep(values, torch.zeros(N))
    assert torch.equal(feedback.residual(), values.to(torch.bfloat16).to(torch.float32))


@pytest.mark.parametrize("storage", ["bf16", "int4"])
def test_stochastic_rounding_is_right_on_the_average(storage: str) -> None:
    values = torch.randn(N, generator=torch.Generator().manual_seed(3))
    feedback, total = ErrorFeedback(N, storage=storage, rounding="stochastic"), torch.zeros(N, dtype=torch.float64)
    for _ in range(400):
        feedback.keep(values, torch.zeros(N))
        total += feedback.residual()
    one = (feedback.residual() - values).abs().mean()
    inside = values.abs() < values.abs().max() * 0.9  # the ends of a block are rounded to bf16
    assert (total / 400 - values)[inside].abs().mean() < one / 10


@pytest.mark.parametrize("as_flag", [lambda skipped: skipped, lambda skipped: torch.tensor(float(skipped))])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_skipped_step_leaves_the_residual_as_it_was(
    storage: str, as_flag: Callable[[bool], torch.Tensor | bool]
) -> None:
    feedback = ErrorFeedback(N, storage=storage)
    feedback.keep(torch.randn(N), torch.zeros(N))
    feedback.end_step(as_flag(False))
    before = feedback.residual()
    feedback.keep(torch.full((N,), float("nan")), torch.zeros(N))
    feedback.end_step(as_flag(True))
    assert torch.equal(feedback.residual(), before)
    feedback.keep(torch.ones(N), torch.zeros(N))
    feedback.end_step(as_flag(False))
    assert torch.equal(feedback.residual(), torch.ones(N))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("storage", STORAGES)
def test_goes_on_from_its_state_bit_for_bit(storage: str, rounding: str) -> None:
    def steps(feedback: ErrorFeedback, begin: int, end: int) -> None:
        for step in range(begin, end):
            corrected = feedback.correct(dyadic(step))
            feedback.keep(corrected, sent_by(CODECS["topk"], corrected))
            feedback.end_step(False)

    straight, first, second = (ErrorFeedback(N, storage=storage, rounding=rounding, seed=s) for s in (5, 5, 99))
    steps(straight, 0, 20)
    steps(first, 0, 10)
    second.load_state_dict(first.state_dict())
    steps(first, 10, 12)  # its state is a copy
    steps(second, 10, 20)
    assert torch.equal(straight.residual(), second.residual())


def test_refuses_the_state_of_another() -> None:
    state = ErrorFeedback(N).state_dict()
    with pytest.raises(ValueError, match="another length or format"):
        ErrorFeedback(N + 1).load_state_dict(state)
    with pytest.raises(ValueError, match="another length or format"):
        ErrorFeedback(N, storage="bf16").load_state_dict(state)
    with pytest.raises(ValueError, match="rounds in another way"):
        ErrorFeedback(N, rounding="stochastic").load_state_dict(state)


@pytest.mark.parametrize(("storage", "per_number"), [("fp32", 4.0), ("bf16", 2.0), ("int4", 0.5)])
def test_bytes(storage: str, per_number: float) -> None:
    n = 1 << 20
    assert ErrorFeedback(n, storage=storage, may_skip=False).num_bytes == pytest.approx(per_number * n, rel=0.003)
    assert ErrorFeedback(n, storage=storage).num_bytes == pytest.approx(2 * per_number * n, rel=0.003)
