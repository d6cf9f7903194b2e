"""Before the first step: do all ranks have the same settings, data, parameters, buckets and state to start from?

Every rank computes plans, batches and counts for itself. A rank that has something else than the others would train on without
a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bert_fast.communication.buckets import GradientLayout
from bert_fast.config import Config, as_plain
from bert_fast.data.store import Store
from bert_fast.errors import UserError
from bert_fast.train.collectives import broadcast_value, gather_floats
from bert_fast.train.environment import Environment

# What may differ between ranks: where things lie on their node (what is in them is compared) and how a node is used.
# Every other setting decides numbers, or which collective comes next.
MAY_DIFFER = (
    "data.train",
    "evaluation.data",
    "checkpoint.init_from",
    "run.results_dir",
    "run.folder",
    "data.scrub_mb_per_s",
    "system.threads_per_rank",
    "system.bind_cores",
    "system.machine_file",
    "system.master_port",
)


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


def check_config(config: Config, resume: bool, environment: Environment) -> None:
    """A collective. Raises UserError on every rank, naming the first rank and setting that differ from rank 0's."""
    settings = {
        f"{section}.{name}": value
        for section, values in as_plain(config).items()
        for name, value in values.items()
        if f"{section}.{name}" not in MAY_DIFFER
    }
    if config.balance.cost_path is not None:  # where the file lies may differ; `check_state` compares what it says
        settings["balance.cost"] = "a file"
    _check({**settings, "--resume": resume}, environment, "another config", "start all ranks with the same config")


def check_layout(layout: GradientLayout, model: nn.Module, environment: Environment) -> None:
    """A collective. Raises UserError on every rank where a rank's starting weights, or buckets of them, are not rank 0's."""
    found = {
        "the order of gradients": list(layout.ordering.order),
        "the checksum of the starting weights": _checksum(model),
        "the buckets": [[bucket.start, bucket.end] for bucket in layout.buckets],
    }
    _check(found, environment, "another model", "start all ranks with the same code and starting checkpoint")


def open_stores(
    config: Config,
    vocab_sha256: str | None,
    environment: Environment,
    store_of: Callable[[str], Store] = Store,
) -> tuple[Store, Store]:
    """The training store and the evaluation store, the same on all ranks by their manifests. A collective.

    Args:
        vocab_sha256: of the vocabulary that this rank found beside its starting checkpoint, None if it found none.
        store_of: opens the store in a folder.

    Raises:
        UserError: on every rank, naming the first rank whose stores are not rank 0's and the field of the manifest.
    """
    stores, failed = [], None
    found: dict[str, Any] = {"the vocabulary beside checkpoint.init_from": vocab_sha256}
    for name, folder in (("data.train", config.data.train), ("evaluation.data", config.evaluation.data)):
        try:
            store = store_of(folder)
        except UserError as error:
            failed = failed or error
            found[name] = f"unreadable: {error}"
            continue
        stores.append(store)
        found[name] = "readable"
        first = {key: store.manifest.get(key) for key in ("num_samples", "sha256")}  # what tells most
        found |= {f"{key} of {name}": value for key, value in {**first, **store.manifest}.items()}
    _check(found, environment, "other data", "copy the store to that node anew, or point it to the same one")
    if failed is not None:  # on all ranks alike
        raise failed
    train, evaluation = stores
    return train, evaluation


def check_state(state: dict[str, Any], environment: Environment) -> None:
    """A collective. Raises UserError on every rank where a rank starts from another `state` (plain values by name)."""
    fix = "give all ranks the same cost file, checkpoint and version of the program"
    _check(state, environment, "another start", fix)


def _check(mine: dict[str, Any], environment: Environment, what: str, fix: str) -> None:
    """Raise UserError, the same on every rank, where a rank has other values than rank 0; the first is named."""
    other = _first_difference(mine, environment)
    if other is None:
        return
    rank, theirs = other
    reference = _of_rank(mine, 0)
    name = next((key for key in {**reference, **theirs} if reference.get(key) != theirs.get(key)), "the order of names")
    raise UserError(
        f"rank {rank} has {what} than rank 0: {name} is {_short(theirs.get(name))} there and "
        f"{_short(reference.get(name))} on rank 0; {fix}"
    )


def _checksum(model: nn.Module) -> list[int]:
    """Exact, in whatever order it is added up: the bits as whole numbers."""
    return [int(p.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64)) for p in model.parameters()]


def _first_difference(value: Any, environment: Environment) -> tuple[int, Any] | None:
    """The first rank whose value (plain, as JSON) is not rank 0's, and that value; digests travel first."""
    digest = hashlib.sha256(json.dumps(value).encode()).digest()
    mine = [float(int.from_bytes(digest[:4], "big")), float(int.from_bytes(digest[4:8], "big"))]
    digests = gather_floats(mine, environment.device).tolist()
    rank = next((rank for rank, each in enumerate(digests) if each != digests[0]), None)
    return None if rank is None else (rank, _of_rank(value, rank))


def _of_rank(value: Any, rank: int) -> Any:
    """What a rank has. A collective."""
    return broadcast_value(value, rank)


def _describe(entry: tuple[str, list[int]]) -> str:
    name, shape = entry
    return f"{name} {list(shape)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
