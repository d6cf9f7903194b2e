"""One training step in several ways: ours with choices on and off, and transformers' BertForPreTraining as people use it.

A variant is a function that builds everything and returns a step: no arguments, the loss sum as a tensor. Steps go through
the given batches in turn.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from bert_fast.allocator import keep_freed_memory
from bert_fast.config import Config
from bert_fast.data.batch import Batch
from bert_fast.model import fused
from bert_fast.train.batches import to_device
from bert_fast.train.environment import Environment, pick_dtype
from bert_fast.train.setup import build as building
from bert_fast.train.step import StepInput

from .setting import make_batch, make_config

Step = Callable[[], torch.Tensor]
_IGNORED = -100


def ours(
    args: argparse.Namespace,
    precision: str,
    *,
    plain: bool = False,
    allocator: bool = True,
    batches: Sequence[Batch] | None = None,
    **changes: Any,
) -> Step:
    """Our step: unpadded, masked positions only, fused optimizer, clipping."""
    if allocator and args.device == "cpu":
        keep_freed_memory()
    config = make_config(args, precision, **changes)
    environment = _environment(config, args)
    switched_off = fused.turned_off if plain else nullcontext
    with switched_off():
        components = building.build(config, environment)
    stream = itertools.cycle(batches or [make_batch(config, args.mix)])

    def step() -> torch.Tensor:
        batch = next(stream)
        inputs = to_device(batch, environment.device, config.batch.shape_multiple)
        with switched_off():
            result = components.step(
                StepInput([inputs], len(batch.masked_labels), config.batch.global_batch_size), 1e-5
            )
        return result.mlm_sum

    return step


def _environment(config: Config, args: argparse.Namespace) -> Environment:
    device = torch.device(args.device)
    return Environment(0, 0, 1, device, pick_dtype(config.train.precision, device))


def huggingface(
    args: argparse.Namespace,
    precision: str,
    *,
    masked_longest: bool = False,
    compiled: bool = False,
    batches: Sequence[Batch] | None = None,
) -> Step:
    """BertForPreTraining, SDPA, AdamW fused and clipping as its Trainer does.

    Args:
        masked_longest: padded to the longest sample and only masked positions through the vocabulary projection; else padded to
            the longest that the config allows and all positions projected, as BertForPreTraining does.
        compiled: the model under torch.compile.
    """
    from transformers import BertConfig, BertForPreTraining

    config = make_config(args, precision)
    environment = _environment(config, args)
    shape, device = config.model, environment.device
    torch.manual_seed(0)
    with device:
        model = BertForPreTraining(
            BertConfig(  # type: ignore[call-arg]  # attn_implementation is a setting of all configs of transformers
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_heads,
                intermediate_size=shape.intermediate_size,
                max_position_embeddings=shape.max_positions,
                hidden_dropout_prob=shape.hidden_dropout,
                attention_probs_dropout_prob=shape.attention_dropout,
                attn_implementation="sdpa",
            )
        ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    stream = itertools.cycle(
        [
            {
                name: torch.from_numpy(values).to(device)
                for name, values in _padded(
                    batch, max(batch.lengths) if masked_longest else config.data.max_seq_len
                ).items()
            }
            for batch in batches or [make_batch(config, args.mix)]
        ]
    )
    body = torch.compile(model) if compiled else model

    def loss_of_masked(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden, pooled = model.bert(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            token_type_ids=inputs["token_type_ids"],
            return_dict=False,
        )
        keep = inputs["labels"] != _IGNORED
        logits = model.cls.predictions(hidden[keep])
        nsp = model.cls.seq_relationship(pooled)
        return torch.nn.functional.cross_entropy(
            logits.float(), inputs["labels"][keep]
        ) + torch.nn.functional.cross_entropy(nsp.float(), inputs["next_sentence_label"])

    def step() -> torch.Tensor:
        inputs = next(stream)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, environment.dtype, enabled=environment.autocast):
            loss = loss_of_masked(inputs) if masked_longest else body(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def _padded(batch: Batch, width: int) -> dict[str, np.ndarray]:
    count = len(batch.lengths)
    lengths = np.array(batch.lengths)
    real = np.arange(width) < lengths[:, None]
    rows = {"input_ids": np.zeros((count, width), np.int64), "token_type_ids": np.zeros((count, width), np.int64)}
    rows["input_ids"][real], rows["token_type_ids"][real] = batch.input_ids, batch.token_type_ids
    flat = np.full(batch.num_tokens, _IGNORED, np.int64)
    flat[batch.masked_positions] = batch.masked_labels
    labels = np.full((count, width), _IGNORED, np.int64)
    labels[real] = flat
    return {
        **rows,
        "attention_mask": real.astype(np.int64),
        "labels": labels,
        "next_sentence_label": batch.next_sentence_labels.astype(np.int64),
    }


VARIANTS: dict[str, Callable[[argparse.Namespace, str], Step]] = {
    "ours": ours,
    "hf_default": huggingface,
    "hf_masked_longest": lambda args, precision: huggingface(args, precision, masked_longest=True),
    "hf_compiled": lambda args, precision: huggingface(args, precision, compiled=True),
    "plain_pieces": lambda args, precision: ours(args, precision, plain=True),
    "sdpa_groups": lambda args, precision: ours(args, precision, model={"attention_backend": "grouped"}),
    "sdpa_loop": lambda args, precision: ours(args, precision, model={"attention_backend": "loop"}),
    "every_shape_anew": lambda args, precision: ours(args, precision, batch={"shape_multiple": 1}),
    "system_allocator": lambda args, precision: ours(args, precision, allocator=False),
    "compiled_layers": lambda args, precision: ours(args, precision, train={"compile": True}),
}
PEERS = ("ours", "hf_default", "hf_masked_longest")
