"""What several stages build: a config of one rank by settings, its environment, its process group."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.step.setting import make_config
from bert_fast.c10d import TCPStore
from bert_fast.config import Config
from bert_fast.train.environment import Environment, pick_dtype

from .stage import Context

BEST_DROPOUT = 0.1


def arguments(
    context: Context, size: str, batch: int, dropout: float = BEST_DROPOUT, layers: int | None = None
) -> argparse.Namespace:
    """What scripts/benchmarks/step takes: size and batch of a step on this device. On a CPU the smallest of all."""
    if context.tiny:
        size, batch, layers = "mini", 4, 1
    return argparse.Namespace(
        size=size,
        mix="wikipedia",
        batch=batch,
        layers=layers,
        dropout=dropout,
        threads=1 if context.tiny else None,
        device=context.device,
    )


def precision_of(context: Context) -> str:
    return "fp32" if context.tiny else "bf16"


def config_of(
    context: Context, size: str, batch: int, precision: str | None = None, **sections: dict[str, Any]
) -> Config:
    """A config of one rank on this device; `sections` replace settings of theirs."""
    args = arguments(context, size, batch, sections.pop("dropout", {}).get("p", BEST_DROPOUT))
    return make_config(args, precision or precision_of(context), **sections)


def environment_of(config: Config) -> Environment:
    device = torch.device(config.system.device, 0) if config.system.device == "cuda" else torch.device("cpu")
    return Environment(0, 0, 1, device, pick_dtype(config.train.precision, device))


@contextmanager
def process_group(context: Context) -> Iterator[None]:
    """A process group of this process alone: NCCL on CUDA, gloo on a CPU."""
    store = TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo" if context.tiny else "nccl", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
