"""Synthetic steps before the clock, and the batches for them; afterwards everything is as it was."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from bert_fast.config import Config
from bert_fast.config.choices import OBJECTIVES, attribute
from bert_fast.data.batch import Batch
from bert_fast.model.bert import BertForPretraining
from bert_fast.model.loss import LossSums
from bert_fast.train.batches import synthetic_batch, to_device
from bert_fast.train.components import TrainComponents
from bert_fast.train.environment import Environment
from bert_fast.train.step import StepInput
from bert_fast.train.telemetry.hardware import synchronize


def synthetic_input(config: Config, environment: Environment, seed: int) -> StepInput:
    """Made-up batches of a rank, as long as the config allows; the same for the same seed."""
    count, vocab_size, share = config.batch.micro_batch_size, config.model.vocab_size, config.data.mask_share
    made_up = made_up_for(config)
    batches = [
        made_up(synthetic_batch(count, config.longest_sample, vocab_size, seed + i, share))
        for i in range(config.batch.micro_batches_per_step)
    ]
    masked = sum(len(b.masked_labels) for b in batches) * environment.world_size
    inputs = [to_device(b, environment.device, config.batch.shape_multiple) for b in batches]
    return StepInput(inputs, masked, config.batch.global_batch_size)


def made_up_for(config: Config) -> Callable[[Batch], Batch]:
    """What makes random sequences the batch that the objective's model is given."""
    choice = OBJECTIVES[config.train.objective]
    if not choice.made_up:
        return lambda batch: batch
    return functools.partial(attribute(choice.made_up), config=config)


def synthetic_loss(config: Config, environment: Environment, model: BertForPretraining) -> torch.Tensor:
    """The summed losses of a made-up micro-batch, 0-dim, with their graph."""
    inputs = synthetic_input(config, environment, seed=0)
    with torch.autocast(environment.device.type, environment.dtype, enabled=environment.autocast, cache_enabled=False):
        output = model(inputs.micro_batches[0])
    return total_of(model, output)


def total_of(model: BertForPretraining, output: LossSums | torch.Tensor) -> torch.Tensor:
    """A 0-dim number on which every parameter has an influence, from what the model returned."""
    if isinstance(output, torch.Tensor):  # embeddings, which the scale of their loss is no part of
        return output.sum() + sum(parameter.sum() for parameter in model.heads.parameters())
    return output.total


def warm_up(config: Config, environment: Environment, components: TrainComponents) -> None:
    """Synthetic steps: communicator, kernels, allocator, DDP's bucket plan. Everything is put back afterwards."""
    model, engine = components.model, components.engine
    num_steps = max(config.train.warmup_batches, engine.num_warmup_steps)
    if not num_steps:
        return
    weights = [p.detach().clone() for p in model.parameters()]
    groups = _settings(components.optimizer.optimizer)
    wire_state = engine.wire.state_dict()
    scale_state = components.loss_scale.state_dict() if components.loss_scale else None
    for index in range(num_steps):
        components.step(synthetic_input(config, environment, seed=index), lr=0.0)
    engine.wait_pending()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    _put_back(components.optimizer.optimizer, groups)
    components.optimizer.optimizer.clear_extra_state()
    if components.loss_scale and scale_state:
        components.loss_scale.load_state_dict(scale_state)
    synchronize(environment.device)
    components.step.read_device_times()
    engine.wire.load_state_dict(wire_state)
    engine.reset_counters()


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the parameter groups hold beside parameters: some optimizers count in them."""
    return [
        copy.deepcopy({name: value for name, value in g.items() if name != "params"}) for g in optimizer.param_groups
    ]


def _put_back(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """Forget all state; the groups get the settings that they had, and lose those that they did not have."""
    optimizer.state.clear()
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        for name in group.keys() - before.keys() - {"params"}:
            del group[name]
        group.update(before)
