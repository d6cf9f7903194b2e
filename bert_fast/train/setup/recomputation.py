"""`memory.recompute`: the plan of what backward computes again, made before the clock and given to the model."""

from __future__ import annotations

import numpy as np
import torch

from bert_fast.config import Config
from bert_fast.config.choices import ENGINES, RECOMPUTE
from bert_fast.memory.chain import measure_chain
from bert_fast.memory.estimate import with_buckets
from bert_fast.memory.modes import equal_chain
from bert_fast.memory.recomputation import Recomputation, make_recomputation_plan
from bert_fast.memory.remat import Chain, Plan, Segment, keep_all, make_plan
from bert_fast.memory.segments import RecomputedAttention, SegmentRunner
from bert_fast.memory.stages import grown_by_layer, longest_lengths
from bert_fast.model.bert import BertForPretraining, BertInput
from bert_fast.train.batches import batch_of_lengths, to_device
from bert_fast.train.collectives import broadcast_value
from bert_fast.train.environment import Environment

_CPU = torch.device("cpu")


def set_up_recomputation(config: Config, environment: Environment, model: BertForPretraining) -> Recomputation | None:
    """Make the plan and let the model run by it; None: everything is kept. A collective: all ranks run rank 0's plan.

    Raises:
        UserError: no plan fits into the budget.
    """
    how = config.memory.recompute
    if config.memory.offload_activations:  # with nothing computed again, as the config has been checked
        model.run_stages = SegmentRunner(keep_all(equal_chain(config.model.num_layers)).segments, on_host=True)
    if how == "none":
        return None
    choice = RECOMPUTE[how]
    restore_random = not config.train.cuda_graphs  # which has no dropout then, as the config has been checked
    if choice.of_attention:
        model.attend = RecomputedAttention(model.attend, restore_random=restore_random)
        return Recomputation(how, 0, 2 * config.model.num_layers)
    if choice.reads_sizes:
        chain = measured_chain(config, environment, model)
        plan = broadcast_plan(chain, make_recomputation_plan(config, chain))
    else:
        chain = equal_chain(config.model.num_layers)
        plan = make_recomputation_plan(config, chain)
    gathers = ENGINES[config.communication.engine].shards  # whose hooks count the modules of a unit that have run
    model.run_stages = SegmentRunner(plan.segments, restore_random=restore_random, to_the_end=gathers)
    again = sum(1 for number in plan.recomputed if number)  # without the embeddings
    if not choice.reads_sizes:
        return Recomputation(how, again, 2 * config.model.num_layers)
    share = plan.recompute_s / chain.forward_s if chain.forward_s else 0.0
    return Recomputation(
        how, again, 2 * config.model.num_layers, plan.peak_bytes, keep_all(chain).peak_bytes, share
    )  # fmt: skip


def broadcast_plan(chain: Chain, plan: Plan) -> Plan:
    """Rank 0's plan: seconds are measured, and differ from rank to rank. A collective."""
    mine = [[segment.begin, segment.end, int(segment.recompute)] for segment in plan.segments]
    shared = broadcast_value(mine)
    return make_plan(chain, (Segment(begin, end, bool(again)) for begin, end, again in shared))


def measured_chain(config: Config, environment: Environment, model: BertForPretraining) -> Chain:
    """The chain of the longest micro-batch that the config allows, measured on the run's device."""
    batch = longest_batch(config, environment.device)
    autocast = torch.autocast(
        environment.device.type, environment.dtype, enabled=environment.autocast, cache_enabled=False
    )
    with autocast:
        stages = model.stages(batch, model.read_rows(batch))
        chain = measure_chain(
            stages,
            batch.input_ids,
            lambda hidden: model.losses(hidden, batch).total,
            grads_resident=not config.memory.release_gradients,
        )
    return with_buckets(grown_by_layer(chain), config) if config.memory.release_gradients else chain


def longest_batch(config: Config, device: torch.device = _CPU) -> BertInput:
    """Made-up samples that fill the longest micro-batch that the config allows."""
    rng = np.random.default_rng(0)
    lengths = np.array(longest_lengths(config))
    batch = batch_of_lengths(lengths, config.model.vocab_size, rng, config.data.mask_share)
    return to_device(batch, device, config.batch.shape_multiple)
