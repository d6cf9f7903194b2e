"""From plans to the inputs of steps, read ahead."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.steps import CPU, PlannedSteps

from bert_fast.config import Config
from bert_fast.data.masking import redraw
from bert_fast.data.store import Store
from bert_fast.errors import UserError
from bert_fast.train.batches import PlannedStep, StepLoader, plan_step


@pytest.mark.parametrize("first", [0, 3])
def test_the_loader_gives_the_planned_steps_in_order(make_config: Callable[..., Config], first: int) -> None:
    config = make_config("batch.micro_batch_size=4", "batch.gradient_accumulation_steps=2", "train.max_steps=6")
    steps = PlannedSteps(config)
    loader = StepLoader(steps.planned, first, config, CPU)
    for number in range(first, 6):
        planned, inputs = next(loader)
        expected = steps.input(number)
        assert planned.plan.step == number
        assert len(inputs.micro_batches) == 2
        assert (inputs.global_masked, inputs.global_samples) == (expected.global_masked, 8)
        for batch, other in zip(inputs.micro_batches, expected.micro_batches, strict=True):
            assert torch.equal(batch.input_ids, other.input_ids)
    loader.close()


def test_counts_are_those_of_the_global_batch(make_config: Callable[..., Config]) -> None:
    config = make_config("system.world_size=2", "batch.micro_batch_size=4")
    store = Store(config.data.train)
    for rank in (0, 1):
        planned = PlannedSteps(config, rank).planned(1)
        lengths = store.lengths[planned.plan.ids].astype(np.int64)
        assert planned.num_tokens == lengths.sum()
        assert planned.num_tokens_squared == (lengths**2).sum()
        assert planned.num_masked == store.num_masked[planned.plan.ids].sum()
        assert sum(planned.micro_batch_tokens()) < planned.num_tokens, "the rest is the other rank's"


@pytest.mark.parametrize("fraction", [None, 0.3])
def test_the_global_count_of_masks_is_what_all_ranks_draw(
    make_config: Callable[..., Config], fraction: float | None
) -> None:
    config = make_config(
        "system.world_size=2", "batch.micro_batch_size=4", "data.dynamic_masking=true",
        f"data.mask_fraction={'null' if fraction is None else fraction}",
    )  # fmt: skip
    store = Store(config.data.train)
    change = functools.partial(redraw, seed=0, step=1, mask_id=4, vocab_size=64, fraction=config.data.drawn_fraction)
    plan = PlannedSteps(config).plan(1)
    planned = [plan_step(store, plan, rank, config, change) for rank in (0, 1)]
    drawn = sum(len(batch.masked_labels) for each in planned for batch in each.batches)
    assert [each.num_masked for each in planned] == [drawn, drawn]
    own = store.num_masked[plan.ids].sum()
    assert drawn == own if fraction is None else drawn > 1.5 * own


def test_an_error_of_reading_comes_in_its_turn_and_close_stops_the_thread(make_config: Callable[..., Config]) -> None:
    config = make_config()
    steps, before = PlannedSteps(config), set(threading.enumerate())

    def read(number: int) -> PlannedStep:
        if number == 2:
            raise UserError("the store has changed")
        return steps.planned(number)

    loader = StepLoader(read, 0, config, CPU)
    assert [next(loader)[0].plan.step for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match="the store has changed"):
        next(loader)
    loader.close()
    assert set(threading.enumerate()) <= before
