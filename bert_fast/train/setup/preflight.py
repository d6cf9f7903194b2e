"""Before the clock: does every rank see its device and the data, is the network what it should be, is a node slow?

A node that computes at 90 % or sends at half the rate costs as much as if all did. It is cheaper to find it in five seconds
than in the run.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.launch.binding import check_one_rank_per_gpu
from bert_fast.report.preflight import node_table
from bert_fast.train.collectives import barrier, gather_floats, gather_values
from bert_fast.train.environment import Environment
from bert_fast.train.telemetry.hardware import matmul_peak, synchronize

_SLOW_MATMUL, _SLOW_LINK = 0.9, 0.7  # of the median over ranks
_CLOCK_S = 0.5  # apart: log files of hosts can no longer be read side by side
_LATENCY_ROUNDS, _CLOCK_ROUNDS = 30, 5


def preflight(config: Config, environment: Environment) -> dict[str, Any]:
    """Check and measure; a collective that takes seconds.

    Returns:
        The report, on every rank: `nodes` (a row each), `network`, `slow` (texts that name ranks and hosts), `seconds`.

    Raises:
        UserError: on every rank, naming the host: two ranks on one device, data that is missing or another's, versions that
            differ.
    """
    began = time.perf_counter()
    facts = gather_values(_facts(config, environment))
    check_facts(facts)
    offsets = _clock_offsets(environment)
    rates = gather_floats([matmul_peak(environment)], environment.device)[:, 0]
    links = gather_floats([_neighbour_rate(environment, config.system.node_size)], environment.device)[:, 0]
    network = _all_reduce(environment)
    slow = describe_slow_ranks(facts, rates, links, offsets)
    nodes: dict[str, dict[str, Any]] = {}
    for rank, fact in enumerate(facts):
        row = nodes.setdefault(fact["host"], {**fact, "ranks": [], "tflops": [], "link_mb_s": [], "clock_ms": []})
        row["ranks"].append(rank)
        row["tflops"].append(rates[rank] / 1e12)
        row["link_mb_s"].append(links[rank] / 1e6)
        row["clock_ms"].append(1e3 * offsets[rank])
    return {
        "world_size": environment.world_size,
        "nodes": list(nodes.values()),
        "network": network,
        "slow": slow,
        "seconds": time.perf_counter() - began,
    }


def print_preflight(report: dict[str, Any]) -> None:
    """Print the node table and what is slow."""
    node_table(report)


def _facts(config: Config, environment: Environment) -> dict[str, Any]:
    """What this rank knows of itself, as plain values."""
    cuda = environment.device.type == "cuda"
    properties = torch.cuda.get_device_properties(environment.device) if cuda else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "host": socket.gethostname(),
        "device": properties.name if properties else "CPU",
        "device_id": str(properties.uuid) if properties else None,
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "memory_gib": round(memory, 1),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "data": {
            "data.train": _data_hash(config.data.train),
            "evaluation.data": _data_hash(config.evaluation.data),
        },
    }


def _data_hash(folder: str) -> str:
    """The store's hash, from its manifest; what is wrong with it if there is none."""
    path = Path(folder) / "manifest.json"
    try:
        sha256 = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        size = (path.parent / "samples.bin").stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"error: {path.parent}: {type(error).__name__}"
    return f"{sha256[:16]} ({size:,} bytes)"


def check_facts(facts: list[dict[str, Any]]) -> None:
    """Refuse ranks that cannot run together. The same verdict on every rank.

    Args:
        facts: what every rank knows of itself, by rank: `host`, `device_id`, `versions`, and `data` (text by field).

    Raises:
        UserError: naming the rank: its data is missing or another's, its versions differ, or its GPU is another rank's too.
    """
    for rank, fact in enumerate(facts):
        for field, value in fact["data"].items():
            if value.startswith("error"):
                raise UserError(
                    f"pre-flight: rank {rank} ({fact['host']}) cannot read {field}: {value.removeprefix('error: ')}; "
                    "put it where every node sees it"
                )
            if value != facts[0]["data"][field]:
                raise UserError(
                    f"pre-flight: rank {rank} ({fact['host']}) has another {field} than rank 0 ({facts[0]['host']}): "
                    f"{value}, not {facts[0]['data'][field]}; copy the store anew"
                )
        if fact["versions"] != facts[0]["versions"]:
            raise UserError(
                f"pre-flight: rank {rank} ({fact['host']}) runs {fact['versions']} and rank 0 ({facts[0]['host']}) "
                f"{facts[0]['versions']}; use one environment on all nodes"
            )
    check_one_rank_per_gpu([(fact["host"], fact["device_id"]) for fact in facts])


def _clock_offsets(environment: Environment) -> np.ndarray:
    """Seconds by which every rank's clock is ahead of rank 0's, to about a millisecond (ranks leave a barrier together)."""
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        barrier()
        now = gather_floats([time.time()], environment.device)[:, 0]
        rounds.append(now - now[0])
    return np.median(np.stack(rounds), axis=0)


def _neighbour_rate(environment: Environment, node_size: int) -> float:
    """Bytes per second to the same local rank of the next node and from that of the one before, all at once; 0 if alone."""
    world, rank = environment.world_size, environment.rank
    if world == 1:
        return 0.0
    step = node_size if world > node_size else 1
    mib = 64 if environment.device.type == "cuda" else 4
    ours = torch.ones(mib << 18, device=environment.device)
    theirs = torch.empty_like(ours)
    best = 0.0
    for _ in range(3):
        barrier()
        start = time.perf_counter()
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, ours, (rank + step) % world),
                dist.P2POp(dist.irecv, theirs, (rank - step) % world),
            ]
        )
        for work in works:
            work.wait()
        synchronize(environment.device)
        best = max(best, 4 * ours.numel() / (time.perf_counter() - start))
    return best


def _all_reduce(environment: Environment) -> dict[str, float]:
    """Latency of a 4-byte all-reduce and bus bandwidth (nccl-tests' definition) of larger ones, by the slowest rank."""
    if not dist.is_initialized() or environment.world_size == 1:
        return {}
    sizes = (1 << 20, 1 << 26) if environment.device.type == "cuda" else (1 << 16, 1 << 20)
    metrics = {"latency_us": 1e6 * _time_all_reduce(environment, 1, _LATENCY_ROUNDS)}
    for numel in sizes:
        seconds = _time_all_reduce(environment, numel, 5)
        moved = 2 * (environment.world_size - 1) / environment.world_size * 4 * numel
        metrics[f"bus_gb_s_{4 * numel >> 10}_kib"] = moved / seconds / 1e9
    names = list(metrics)
    table = gather_floats([metrics[name] for name in names], environment.device)
    return {n: float(table[:, i].max() if n == "latency_us" else table[:, i].min()) for i, n in enumerate(names)}


def _time_all_reduce(environment: Environment, numel: int, rounds: int) -> float:
    values = torch.ones(numel, device=environment.device)
    times = []
    for _ in range(rounds + 2):
        barrier()
        synchronize(environment.device)
        start = time.perf_counter()
        dist.all_reduce(values)
        synchronize(environment.device)
        times.append(time.perf_counter() - start)
        values.fill_(1.0)
    return statistics.median(times[2:])


def describe_slow_ranks(
    facts: list[dict[str, Any]], rates: np.ndarray, links: np.ndarray, offsets: np.ndarray
) -> list[str]:
    """Which ranks stand out, a text each.

    Args:
        facts: of every rank, by rank: `host`.
        rates: matrix multiplications, FLOP per second, float64 [ranks].
        links: to and from a neighbour, bytes per second, float64 [ranks].
        offsets: seconds by which each clock is ahead of rank 0's, float64 [ranks].
    """
    texts = []
    for what, values, bound in (("matmul", rates, _SLOW_MATMUL), ("network", links, _SLOW_LINK)):
        median = float(np.median(values))
        for rank in np.flatnonzero(values < bound * median):
            share = 100 * values[rank] / median
            texts.append(f"rank {rank} ({facts[rank]['host']}): {what} at {share:.0f} % of the median rank")
    for rank in np.flatnonzero(np.abs(offsets) > _CLOCK_S):
        texts.append(f"rank {rank} ({facts[rank]['host']}): clock {offsets[rank]:+.1f} s from rank 0's; synchronise it")
    return texts
