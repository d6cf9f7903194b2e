"""The loss scale against its rule written out."""

from __future__ import annotations

import torch
from support.steps import CPU

from bert_fast.train.loss_scale import LossScale


def plain_loss_scale(overflows: list[int], value: float) -> list[float]:
    values, good = [], 0
    for overflow in overflows:
        good = 0 if overflow else good + 1
        if overflow:
            value /= 2
        elif good == 2000:
            value, good = value * 2, 0
        values.append(value)
    return values


def test_loss_scale_halves_and_doubles() -> None:
    overflows = [0] * 1999 + [1, 1] + [0] * 1999 + [1] + [0] * 4001
    scale, values = LossScale(1024.0, CPU), []
    flags = (torch.tensor(0.0), torch.tensor(1.0))
    for overflow in overflows:
        scale.update(flags[overflow])
        values.append(scale.value.item())
    assert values == plain_loss_scale(overflows, 1024.0)
    assert sorted(set(values)) == [128.0, 256.0, 512.0, 1024.0]


def test_loss_scale_state_keeps_the_count_of_good_steps() -> None:
    first = LossScale(8.0, CPU)
    for _ in range(1999):
        first.update(torch.tensor(0.0))
    second = LossScale(1.0, CPU)
    second.load_state_dict(first.state_dict())
    assert second.value.item() == 8.0
    second.update(torch.tensor(0.0))
    assert second.value.item() == 16.0
