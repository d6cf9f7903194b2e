"""Stage `two_ranks`: two processes share this device and exchange over gloo. Streams and hooks with a real exchange.

After some steps both ranks must hold the same weights, and where clipping does not depend on ranks those of one rank that was
given both shares.
"""

from __future__ import annotations

import multiprocessing
import socket
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.step.setting import make_config
from bert_fast.c10d import TCPStore
from bert_fast.config import Config
from bert_fast.train.batches import synthetic_batch, to_device
from bert_fast.train.environment import Environment, pick_dtype
from bert_fast.train.setup.build import build
from bert_fast.train.step import StepInput

from .parts import arguments
from .stage import CheckFailed, Context

_STEPS = 3
_RATE = 1e-3
# Clipping modes that act on the average of ranks, or not at all, give one rank's weights; the others only equal ones.
CASES = {
    "bucketed, no clipping": {"engine": "bucketed", "clip": "none"},
    "bucketed, clip after": {"engine": "bucketed", "clip": "global_after_reduce"},
    "bucketed, clip before": {"engine": "bucketed", "clip": "bucket_before_reduce"},
    "bucketed, bf16 on the wire": {"engine": "bucketed", "clip": "bucket_before_reduce", "reduce_dtype": "bf16"},
    "ddp, no clipping": {"engine": "ddp", "clip": "none"},
    "ddp, clip before": {"engine": "ddp", "clip": "bucket_before_reduce"},
}
_TOLERANCE = 2e-3  # of what the weights have moved: Adam's first updates are signs, also of rounding errors


def run(context: Context) -> None:
    result = context.result
    port = _free_port()
    fork = multiprocessing.get_context("fork")  # this process has not touched CUDA
    ranks = [
        fork.Process(target=_work, args=(context.device, rank, 2, port, context.scratch / f"rank{rank}.pt"))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(max(1.0, context.seconds_left() - 3))
    late = [number for number, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
    if late:
        raise CheckFailed(f"rank {late[0]} did not end in time")
    if any(process.exitcode for process in ranks):
        raise CheckFailed(f"ranks ended with exit codes {[process.exitcode for process in ranks]}; see two_ranks.log")
    weights = [torch.load(context.scratch / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    _work(context.device, 0, 1, None, context.scratch / "alone.pt")
    alone = torch.load(context.scratch / "alone.pt", weights_only=True)
    right = sum(context.case(name, partial(_compare, name, weights, alone)) for name in CASES)
    result.metrics |= {"two_ranks/right": right, "two_ranks/total": len(CASES)}
    result.summary = f"{right} of {len(CASES)} exchanges right"


def _compare(name: str, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    mine, other, start = ranks[0][name], ranks[1][name], alone["start"]
    if not torch.equal(mine, other):
        raise CheckFailed(f"ranks hold different weights, by {float((mine - other).abs().max()):.2g} at the most")
    moved = float((mine - start).norm())
    if not moved > 0:
        raise CheckFailed("no weight has changed")
    partner = "ddp, clip before" if name == "bucketed, clip before" else name
    expected = ranks[0][partner] if partner != name else alone.get(name)
    if expected is not None:
        gap = float((mine - expected).norm()) / moved
        if not gap <= _TOLERANCE:
            whose = f"of '{partner}'" if partner != name else "of one rank with both shares"
            raise CheckFailed(f"weights are {gap:.2g} of their way off those {whose}")


def _config(device: str, world: int, communication: dict[str, Any]) -> Config:
    context = Context(device, Path(), Path(), 0.0)
    args = arguments(context, "mini", 8, dropout=0.0)
    batch = args.batch
    return make_config(
        args,
        "fp32",
        communication={**communication, "bucket_mb": 0.25, "backend": "gloo"},
        batch={"global_batch_size": 2 * batch, "micro_batch_size": batch, "gradient_accumulation_steps": 2 // world},
        system={"world_size": world},
        model={"attention_backend": "grouped"},
    )


def _work(device: str, rank: int, world: int, port: int | None, path: Path) -> None:
    """One rank: all cases in turn; its weights after each go to `path`. Alone, it takes both shares as micro-batches."""
    if port is not None:
        store = TCPStore("127.0.0.1", port, world, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    weights: dict[str, torch.Tensor] = {}
    place = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    torch.set_num_threads(1)
    for name, communication in CASES.items():
        if port is None and (communication["engine"] == "ddp" or communication["clip"] == "bucket_before_reduce"):
            continue
        config = _config(device, world, communication)
        environment = Environment(rank, rank, world, place, pick_dtype("fp32", place))
        components = build(config, environment)
        parameters = list(components.model.parameters())
        if port is None:
            weights.setdefault("start", _flat(parameters))
        for number in range(_STEPS):
            shares = [
                synthetic_batch(
                    config.batch.micro_batch_size, config.data.max_seq_len, config.model.vocab_size, 10 * number + share
                )
                for share in (0, 1)
            ]
            masked = sum(len(share.masked_labels) for share in shares)
            own = shares if port is None else [shares[rank]]
            inputs = [to_device(share, place, config.batch.shape_multiple) for share in own]
            components.step(StepInput(inputs, masked, config.batch.global_batch_size), _RATE)
        components.engine.wait_pending()
        weights[name] = _flat(parameters)
    if "ddp, no clipping" not in weights and "bucketed, no clipping" in weights:
        weights["ddp, no clipping"] = weights["bucketed, no clipping"]
    torch.save(weights, path)
    if port is not None:
        dist.barrier()
        dist.destroy_process_group()


def _flat(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.detach().flatten().cpu() for p in parameters])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
