"""Before the first collective on gradients: do all ranks have the same parameters, buckets and settings?"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bert_fast.communication.buckets import Layout
from bert_fast.config import Config, as_plain
from bert_fast.errors import UserError
from bert_fast.train.environment import Environment
from bert_fast.train.exchange import broadcast_json

_SETTINGS = ("model", "batch", "communication", "optimizer", "schedule", "train")


def check_parameters(named_shapes: list[tuple[str, list[int]]], environment: Environment) -> None:
    """A collective. Raises UserError on every rank, naming the first rank and parameter that differ from rank 0's."""
    other = _first_difference(named_shapes, environment)
    if other is None:
        return
    rank, theirs = other
    reference = _of_rank(named_shapes, 0)
    for index in range(max(len(reference), len(theirs))):
        ours, mine = (_describe(each[index]) if index < len(each) else "missing" for each in (reference, theirs))
        if ours != mine:
            raise UserError(
                f"rank {rank} has other parameters than rank 0: parameter {index} is {mine} there and {ours} on rank 0; "
                "start all ranks with the same code and config"
            )


def check_settings(config: Config, layout: Layout, model: nn.Module, environment: Environment) -> None:
    """A collective. Raises UserError where a rank's settings or buckets are not rank 0's; the setting is named."""
    plain = as_plain(config)
    settings = {f"{section}.{name}": value for section in _SETTINGS for name, value in plain[section].items()}
    del settings["train.init_checkpoint"]  # may lie elsewhere on every node; the checksum sees to it
    settings["the order of gradients"] = list(layout.order)
    settings["the checksum of the starting weights"] = _checksum(model)
    settings["the buckets"] = [[bucket.start, bucket.end] for bucket in layout.buckets]
    other = _first_difference(settings, environment)
    if other is None:
        return
    rank, theirs = other
    reference = _of_rank(settings, 0)
    name = next(key for key in {**reference, **theirs} if reference.get(key) != theirs.get(key))
    raise UserError(
        f"rank {rank} has another config than rank 0: {name} is {_short(theirs.get(name))} there and "
        f"{_short(reference.get(name))} on rank 0; start all ranks with the same config"
    )


def _checksum(model: nn.Module) -> list[int]:
    """Exact, in whatever order it is added up: the bits as whole numbers."""
    return [int(p.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64)) for p in model.parameters()]


def _first_difference(value: Any, environment: Environment) -> tuple[int, Any] | None:
    """The first rank whose value (plain, as JSON) is not rank 0's, and that value; digests travel first."""
    if not dist.is_initialized():
        return None
    digest = hashlib.sha256(json.dumps(value).encode()).digest()[:8]
    mine = torch.tensor([int.from_bytes(digest, "big", signed=True)], device=environment.device)
    everyone = [mine.clone() for _ in range(environment.world_size)]
    dist.all_gather(everyone, mine)
    digests = [int(each) for each in everyone]
    rank = next((rank for rank, each in enumerate(digests) if each != digests[0]), None)
    return None if rank is None else (rank, _of_rank(value, rank))


def _of_rank(value: Any, rank: int) -> Any:
    """What a rank has. A collective."""
    return broadcast_json(value, rank)


def _describe(entry: tuple[str, list[int]]) -> str:
    name, shape = entry
    return f"{name} {list(shape)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
