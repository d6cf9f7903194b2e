"""Gradients of an encoder in micro-batches against those of one pass over everything, with dropout."""

from __future__ import annotations

import copy
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bert_fast.contrastive.gradcache import cached_backward
from bert_fast.contrastive.loss import ContrastiveLoss

CPU = torch.device("cpu")


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 16))


def micro_batches() -> list[torch.Tensor]:
    """Pairs as [pairs, 2, 12], of different numbers."""
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 2, 12, generator=g) for n in (5, 9, 1, 7)]


def loss_of(module: ContrastiveLoss):
    def loss(embeddings: list[torch.Tensor], parameters: list[torch.Tensor]) -> torch.Tensor:
        every = F.normalize(torch.cat(embeddings), dim=-1)
        return module(every[:, 0], every[:, 1], scale=parameters[0].exp() if parameters else None)

    return loss


def gradients(model: nn.Module, module: ContrastiveLoss) -> list[torch.Tensor]:
    found = [p.grad for p in (*model.parameters(), *module.parameters())]
    return [grad for grad in found if grad is not None]


def test_gradients_are_those_of_one_pass() -> None:
    model, module = encoder(), ContrastiveLoss(learn_scale=True)
    whole, whole_module = copy.deepcopy(model), copy.deepcopy(module)
    torch.manual_seed(7)
    value = cached_backward(model, micro_batches(), loss_of(module), CPU, parameters=list(module.parameters()))
    after = torch.get_rng_state()
    torch.manual_seed(7)
    right = loss_of(whole_module)(
        [whole(each) for each in micro_batches()], list(whole_module.parameters())
    )  # one graph of all
    right.backward()
    assert value.item() == pytest.approx(right.item(), rel=1e-6)
    assert torch.equal(torch.get_rng_state(), after)  # what follows draws what it would have drawn
    for found, expected in zip(gradients(model, module), gradients(whole, whole_module), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


def test_a_single_micro_batch_is_computed_once() -> None:
    calls = []
    model = encoder()
    cached_backward(lambda x: (calls.append(x), model(x))[1], micro_batches()[:1], loss_of(ContrastiveLoss()), CPU)
    assert len(calls) == 1


def test_every_pass_with_a_gradient_is_announced() -> None:
    model, order = encoder(), []

    @contextmanager
    def around(number: int):
        order.append(number)
        yield
        assert not any(p.grad is None for p in model.parameters())

    cached_backward(model, micro_batches(), loss_of(ContrastiveLoss()), CPU, around)
    assert order == [0, 1, 2, 3]


def test_a_scaled_loss_scales_gradients_and_not_the_value() -> None:
    first, second, module = encoder(), encoder(), ContrastiveLoss()
    torch.manual_seed(3)
    value = cached_backward(first, micro_batches(), loss_of(module), CPU)
    torch.manual_seed(3)
    scaled = cached_backward(second, micro_batches(), loss_of(module), CPU, scale=torch.tensor(1024.0))
    assert value == scaled
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(1024 * one.grad, other.grad)


def test_graphs_of_other_micro_batches_are_gone() -> None:
    """At no time are activations with a graph alive of more than one micro-batch."""
    alive, outputs = [], []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            alive.append(sum(1 for ref in outputs if (out := ref()) is not None and out.requires_grad))
            out = x * self.weight
            outputs.append(weakref.ref(out))
            return out

    cached_backward(Seen(), micro_batches(), loss_of(ContrastiveLoss()), CPU)
    assert max(alive) <= 1  # the one before, which is about to go


def test_nothing_to_do() -> None:
    with pytest.raises(ValueError, match="no micro-batch"):
        cached_backward(encoder(), [], loss_of(ContrastiveLoss()), CPU)
