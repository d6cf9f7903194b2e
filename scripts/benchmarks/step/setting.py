"""What is measured: model sizes, mixes of lengths, one batch that every variant gets."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from bert_fast.balance.lengths import wikipedia_like
from bert_fast.command import share, whole
from bert_fast.config import Config
from bert_fast.config.load import config_from_tree
from bert_fast.data.batch import Batch
from bert_fast.train.batches import batch_of_lengths

# layers, width, heads, vocabulary, longest sample, samples of a batch on a CPU, on a GPU
SIZES = {
    "mini": (2, 128, 2, 2048, 128, 32, 512),
    "small": (4, 512, 8, 30_528, 512, 16, 128),
    "base": (12, 768, 12, 30_528, 512, 16, 96),
    "large": (24, 1024, 16, 30_528, 512, 8, 64),
}
MIXES = ("wikipedia", "all-512", "all-128")


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Arguments that bench_step.py and profile_step.py share."""
    add = parser.add_argument
    add("--size", choices=SIZES, default="base", help="default %(default)s")
    add("--mix", choices=MIXES, default="wikipedia", help="lengths of the samples (default %(default)s)")
    add("--batch", type=whole(1, 10**6), help="samples of a step (default: by size and device)")
    add("--layers", type=whole(1, 1000), help="encoder layers (default: the size's)")
    add("--dropout", type=share, default=0.1, help="hidden and attention dropout (default %(default)s)")
    add("--threads", type=whole(1, 10**6), help="CPU threads (default: all cores)")
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default %(default)s",
    )


def make_config(args: argparse.Namespace, precision: str, **changes: dict[str, Any]) -> Config:
    """The config of one rank; `changes` are sections."""
    layers, width, heads, vocabulary, longest, on_cpu, on_gpu = SIZES[args.size]
    batch = args.batch or (on_cpu if args.device == "cpu" else on_gpu)
    tree: dict[str, dict[str, Any]] = {
        "run": {"tensorboard": False, "measure_peak_flops": False},
        "model": {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "num_layers": args.layers or layers,
            "num_heads": heads,
            "intermediate_size": 4 * width,
            "max_positions": longest,
            "hidden_dropout": args.dropout,
            "attention_dropout": args.dropout,
        },
        "data": {"train": "unused", "max_seq_len": longest},
        "batch": {"global_batch_size": batch, "micro_batch_size": batch},
        "communication": {"clip": "global_after_reduce"},
        "schedule": {"total_steps": 1000},
        "train": {"precision": precision, "max_steps": 1000, "warmup_batches": 1},
        "evaluation": {"data": "unused", "every_samples": 10**9},
        "system": {"device": args.device},
        "mlperf": {"enabled": False},
    }
    for section, values in changes.items():
        tree.setdefault(section, {}).update(values)
    return config_from_tree(tree)


def make_batch(config: Config, mix: str, seed: int = 0) -> Batch:
    """The samples of a step, the longest first; the same for the same seed."""
    count, longest = config.batch.micro_batch_size, config.data.max_seq_len
    if mix == "wikipedia":
        lengths = np.maximum(8, wikipedia_like(count, seed).astype(np.int64) * longest // 512)
    else:
        lengths = np.full(count, min(longest, int(mix.removeprefix("all-"))))
    lengths = np.sort(lengths)[::-1].copy()
    return batch_of_lengths(lengths, config.model.vocab_size, np.random.default_rng([seed, 7]))
