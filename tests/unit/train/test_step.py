"""One optimizer step: its order, steps that are not finite, accumulation, loss scale, determinism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.steps import CPU, PlannedSteps, weights_of

from bert_fast.config import Config
from bert_fast.model.bert import BertForPretraining
from bert_fast.model.objective import MlmNsp
from bert_fast.train.environment import Environment, join
from bert_fast.train.loss_scale import LossScale
from bert_fast.train.setup.build import build
from bert_fast.train.step import TrainStep


def test_a_step_that_is_not_finite_changes_nothing(
    make_config: Callable[..., Config], environment: Environment
) -> None:
    config = make_config()
    components, steps = build(config, environment), PlannedSteps(config)
    state = components.optimizer.optimizer.state
    components.step(steps.input(0), lr=0.01)
    before = weights_of(components)
    moments = [entry["exp_avg"].clone() for entry in state.values()]
    hook = components.model.heads.transform.register_forward_hook(lambda *args: args[-1] * float("nan"))
    result = components.step(steps.input(1), lr=0.01)
    hook.remove()
    assert not result.is_finite
    assert not result.local_is_finite
    assert torch.equal(before, weights_of(components))
    assert moments
    assert all(torch.equal(a, entry["exp_avg"]) for a, entry in zip(moments, state.values(), strict=True))
    assert components.step(steps.input(2), lr=0.01).is_finite
    assert not torch.equal(before, weights_of(components))


def test_accumulation_and_loss_scale_give_the_same_step(
    make_config: Callable[..., Config], environment: Environment
) -> None:
    """Losses are sums with one global normalisation: the split into micro-batches does not matter."""
    gradients, losses = [], []
    for local, accumulation, scale in ((8, 1, None), (2, 4, None), (4, 2, 1024.0)):
        config = make_config(f"batch.micro_batch_size={local}", f"batch.gradient_accumulation_steps={accumulation}")
        components = build(config, environment)
        step = TrainStep(
            components.engine,
            components.optimizer.optimizer,
            MlmNsp(),
            device=CPU,
            dtype=torch.float32,
            world_size=1,
            loss_scale=LossScale(scale, CPU) if scale else None,
        )
        result = step(PlannedSteps(config).input(0), lr=0.0)
        gradients.append(torch.cat([p.grad.flatten() for p in components.model.parameters()]))
        losses.append((result.mlm_sum.item(), result.nsp_sum.item()))
    for gradient, loss in zip(gradients[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6 * gradients[0].abs().max().item())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_without_next_sentence_a_step_is_of_masked_tokens(
    make_config: Callable[..., Config], environment: Environment, accumulation: int
) -> None:
    """The plain version: the mean over the masked tokens of the whole batch, in one piece."""
    config = make_config(
        "model.next_sentence=false", f"batch.micro_batch_size={8 // accumulation}",
        f"batch.gradient_accumulation_steps={accumulation}", "communication.clip=none",
    )  # fmt: skip
    components, plain = build(config, environment), BertForPretraining(config.model, "loop")
    plain.load_state_dict(components.model.state_dict())
    result = components.step(PlannedSteps(config).input(0), lr=0.0)
    inputs = PlannedSteps(make_config("model.next_sentence=false")).input(0)
    expected = plain(inputs.micro_batches[0]).mlm_sum
    (expected / inputs.global_masked).backward()
    assert result.nsp_sum is None
    assert result.is_finite
    assert result.local_is_finite
    torch.testing.assert_close(result.mlm_sum, expected.detach())
    for (name, one), other in zip(plain.named_parameters(), components.model.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_before_update_comes_between_backward_and_the_update(
    make_config: Callable[..., Config], environment: Environment
) -> None:
    config = make_config()
    components = build(config, environment)
    before, seen = weights_of(components), []

    def look() -> None:
        seen.append((weights_of(components), max(float(p.grad.abs().max()) for p in components.model.parameters())))

    components.step(PlannedSteps(config).input(0), 0.01, look)
    ((weights, gradient),) = seen
    assert torch.equal(weights, before)
    assert gradient > 0
    assert not torch.equal(weights_of(components), before)


def test_the_determinism_switch_gives_bit_identical_steps(make_config: Callable[..., Config]) -> None:
    """`train.deterministic` reaches torch, and two machines of one seed go through the same bits, dropout included."""
    dropout = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1", "system.threads_per_rank=1")
    config = make_config("train.deterministic=true", *dropout)
    environment = join(config)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        losses, ends = [], []
        for _ in range(2):
            components, steps = build(config, environment), PlannedSteps(config)
            results = [components.step(steps.input(number), lr=1e-3) for number in range(4)]
            losses.append([(result.mlm_sum.item(), result.grad_norm.item()) for result in results])
            ends.append(weights_of(components))
        assert losses[0] == losses[1]
        assert len(set(losses[0])) == 4
        assert torch.equal(*ends)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("step_per_bucket", ["true", "false"])
def test_a_groups_rate_is_a_multiple_of_the_schedules(
    make_config: Callable[..., Config], environment: Environment, step_per_bucket: str
) -> None:
    """Muon's matrices follow the schedule from a rate of their own; a rate of 0 in a warm-up is 0 for all."""
    muon = ["optimizer.name=muon", "optimizer.lr=0.01", "optimizer.muon_lr=0.04", "communication.bucket_mb=0.001"]
    config = make_config(*muon, f"optimizer.step_per_bucket={step_per_bucket}", "communication.clip=none")
    components, steps = build(config, environment), PlannedSteps(config)
    before = weights_of(components)
    components.step(steps.input(0), lr=0.0)
    assert torch.equal(before, weights_of(components))
    components.step(steps.input(1), lr=0.005)
    rates = [(group["orthogonalize"], group["lr"]) for group in components.optimizer.optimizer.param_groups]
    assert rates == [(True, 0.02), (False, 0.005), (False, 0.005)]
    assert not torch.equal(before, weights_of(components))
