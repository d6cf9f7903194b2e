#!/usr/bin/env python3
"""Print this machine's NUMA nodes, GPUs and network cards as sysfs has them, and what every local rank would get.

    python scripts/show_topology.py --ranks 8 --device cuda --json topology.json

--root reads another tree (a copy of a machine's /sys); then all of its CPUs count as allowed and all GPUs as visible.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_json
from bert_fast.launch.binding import bind
from bert_fast.launch.machine_file import nic_variables
from bert_fast.launch.topology import Topology, format_cpulist, read_topology

SYSFS = Path("/sys")


def describe(topology: Topology) -> list[str]:
    """A line a node, GPU and card."""

    def place(node: int | None) -> str:
        return "NUMA node unknown" if node is None else f"NUMA node {node}"

    lines = [f"NUMA node {node.number}: CPUs {format_cpulist(node.cpus) or 'none'}" for node in topology.nodes]
    threads = max(map(len, topology.cores), default=1)
    lines.append(f"{len(topology.cores)} cores, up to {threads} CPUs a core")
    lines += [f"GPU {i}: {gpu.address}, {place(gpu.numa_node)}" for i, gpu in enumerate(topology.gpus)]
    for nic in topology.nics:
        kind = "InfiniBand or RoCE" if nic.infiniband else "Ethernet"
        lines.append(f"{nic.name}: {kind}, {nic.path[-1]}, {place(nic.numa_node)}, {'up' if nic.up else 'down'}")
    return lines + [f"absent: {part}" for part in topology.missing]


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=whole(1, 10**6), help="local ranks (default: one a GPU, or one)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--root", type=Path, default=SYSFS, metavar="DIR", help="sysfs tree (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write topology and bindings there")
    args = parser.parse_args()
    try:
        if not args.root.is_dir():
            raise UserError(f"--root {args.root} is not a folder; give the copy of a machine's /sys")
        topology = read_topology(args.root)
        ranks = args.ranks or len(topology.gpus) or 1
        device: Literal["cuda", "cpu"] = args.device or ("cuda" if topology.gpus else "cpu")
        if ranks < 1:
            raise UserError(f"--ranks {ranks}: there must be at least one rank")
        here = args.root == SYSFS
        allowed = os.sched_getaffinity(0) if here else topology.cpus
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") if here else None
        bindings = [bind(topology, rank, ranks, allowed, device, visible) for rank in range(ranks)]
        cards = {nic.name: nic for nic in topology.nics}
        variables = [nic_variables(cards[binding.nic]) if binding.nic else {} for binding in bindings]
        print(
            "\n".join([*describe(topology), "", f"{ranks} ranks on {device}, allowed CPUs {format_cpulist(allowed)}:"])
        )
        for rank, (binding, pinned) in enumerate(zip(bindings, variables, strict=True)):
            print(f"rank {rank}: {binding.why}")
            if pinned:
                print("    with bind_nics: " + " ".join(f"{name}={value}" for name, value in pinned.items()))
        if args.json:
            ranked = [
                {"local_rank": rank, **asdict(binding), "bind_nics": pinned}
                for rank, (binding, pinned) in enumerate(zip(bindings, variables, strict=True))
            ]
            write_json(args.json, {"topology": asdict(topology), "device": device, "ranks": ranked})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
