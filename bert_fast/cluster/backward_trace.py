"""When the gradients of BERT-base and BERT-large are ready, by FLOPs: for planning without such a machine."""

from __future__ import annotations

import numpy as np
import torch

from bert_fast.communication.buckets import clip_group_of
from bert_fast.config import ModelConfig
from bert_fast.model.bert import BertForPretraining, expected_ready_order
from bert_fast.model.flops import forward_flops_per_masked_token, forward_flops_per_token

SHAPES = {
    "base": ModelConfig(),
    "large": ModelConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
}


def model_trace(
    name: str, backward_s: float, wire_bytes: int, whole_groups: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Ready times and sizes of BERT's gradients, with the time of backward spread by FLOPs.

    FLOPs are those of sequences of 256 tokens, 15 % of them masked. The tied word embedding comes last.

    Args:
        name: a key of `SHAPES`.
        backward_s: seconds of the whole backward pass.
        wire_bytes: bytes per number of a gradient on the wire.
        whole_groups: return a row per layer (clip group) instead of one per parameter.

    Returns:
        Ready times in seconds (float64 [n], ascending), sizes in bytes (float64 [n]), and names.
    """
    shape = SHAPES[name]
    with torch.device("meta"):
        model = BertForPretraining(shape)
    named = list(model.named_parameters())
    heads = 0.15 * forward_flops_per_masked_token(shape)
    layer = forward_flops_per_token(shape) / shape.num_layers
    whole = heads + layer * shape.num_layers
    names, ready, sizes, now, last = [], [], [], 0.0, ""
    share, matrices = 0.0, 1  # of the group: seconds of its backward, and numbers in its parameters
    order = expected_ready_order(model)
    for index in order:
        parameter_name, parameter = named[index]
        group = clip_group_of(parameter_name, "layer")
        if group != last:
            mine = [i for i in order if clip_group_of(named[i][0], "layer") == group]
            matrices = sum(named[i][1].numel() for i in mine)
            share = {"heads": heads, "embeddings": 0.0}.get(group, layer) / whole * backward_s
            last = group
        now += share * parameter.numel() / matrices
        names.append(parameter_name)
        ready.append(now)
        sizes.append(parameter.numel() * wire_bytes)
    if not whole_groups:
        return np.array(ready), np.array(sizes, float), names
    groups = [clip_group_of(each, "layer") for each in names]
    kept = list(dict.fromkeys(groups))
    return (
        np.array([max(r for r, g in zip(ready, groups, strict=True) if g == group) for group in kept]),
        np.array([sum(s for s, g in zip(sizes, groups, strict=True) if g == group) for group in kept], float),
        kept,
    )
