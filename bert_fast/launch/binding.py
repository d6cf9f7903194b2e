"""Which cores, GPU and network card each local rank gets, from the machine's topology."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from bert_fast.errors import UserError
from bert_fast.launch.topology import Gpu, Nic, Topology, format_cpulist

_ADDRESS = re.compile(r"(?:0000)?([0-9a-f]{4}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")  # nvidia-smi: a domain of 8 digits


@dataclass(frozen=True)
class Binding:
    """What a local rank gets. `why` is a line for the log; `num_cores` counts physical cores, as threads should."""

    cpus: tuple[int, ...]
    numa_node: int | None
    nic: str | None
    gpu: str | None
    why: str
    num_cores: int


_Cores = list[tuple[int, ...]]  # allowed CPUs of every core
_Nodes = dict[int | None, _Cores]  # allowed cores of every node; None: CPUs that no node claims


@dataclass(frozen=True)
class _Share:
    """A rank's part of `of` cores (or CPUs, where cores do not go round) that `ranks` share."""

    cores: _Cores
    of: int
    ranks: int
    unit: Literal["core", "CPU"]


def is_bound_by_slurm(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether srun has already given this task cores of its own (`--cpu-bind`)."""
    kinds = environ.get("SLURM_CPU_BIND_TYPE", "")
    return any(kind in kinds for kind in ("mask_cpu", "map_cpu", "mask_ldom", "map_ldom"))


def bind(
    topology: Topology,
    local_rank: int,
    local_world_size: int,
    allowed_cpus: Collection[int],
    device: Literal["cuda", "cpu"],
    visible_devices: str | None = None,
) -> Binding:
    """Cores and network card of one local rank. All local ranks compute the same plan, so that their cores are disjoint.

    Args:
        allowed_cpus: what the scheduler or container leaves this job: `os.sched_getaffinity(0)`, before any binding.
        visible_devices: CUDA_VISIBLE_DEVICES: indices in PCI order (so CUDA_DEVICE_ORDER=PCI_BUS_ID), or PCI
            addresses, which also hold where a container or a cgroup renumbers devices. None: all.

    Cores: those of the GPU's NUMA node, shared out equally between the ranks whose GPUs are there; on a CPU, equal shares
    of all allowed ones that stay within a node as far as they can. NIC: the nearest by PCI, one each as far as they go round.
    """
    assert 0 <= local_rank < local_world_size
    nodes = _allowed_cores(topology, allowed_cpus)
    gpus: list[Gpu | None] = [None] * local_world_size
    shares, notes = None, [f"no {place} here" for place in topology.missing]
    if device == "cuda":
        gpus, problem = _gpus_of_ranks(topology, local_world_size, visible_devices)
        if problem is None:
            shares, problem = _gpu_shares(topology, nodes, [gpu for gpu in gpus if gpu])
        notes += [f"{problem}: cores not chosen by GPU"] if problem else []
    shares = shares or _even_shares(nodes, local_world_size)
    nodes_of = [_nodes_of(share, nodes) for share in shares]
    homes = [touched[0] if len(touched) == 1 else None for touched in nodes_of]
    gpu, share = gpus[local_rank], shares[local_rank]
    nic, near = None, None
    if device == "cpu" or gpu:
        nic, near = _assign_nics(_places(gpus, homes), _usable_nics(topology))[local_rank]
    of = f" of NUMA node {gpu.numa_node}" if gpu and gpu.numa_node is not None else ""
    address = gpu.address if gpu else None
    why = [address and f"GPU {address}{of}", _describe(share, nodes_of[local_rank]), near, *notes]
    cpus = tuple(sorted(_flat(share.cores)))
    num_cores = _num_physical_cores(topology, cpus)
    return Binding(cpus, homes[local_rank], nic, address, "; ".join(filter(None, why)), num_cores)


def check_one_rank_per_gpu(devices_by_rank: Sequence[tuple[str, str | None]]) -> None:
    """Refuse two ranks of a host on one GPU.

    Args:
        devices_by_rank: host and GPU of every rank; None where it has no GPU.

    Raises:
        UserError: naming the host, the ranks and the GPU.
    """
    ranks = defaultdict(list)
    for rank, (host, device) in enumerate(devices_by_rank):
        if device is not None:
            ranks[host, device].append(rank)
    for (host, device), sharing in ranks.items():
        if len(sharing) > 1:
            raise UserError(
                f"host {host}: ranks {', '.join(map(str, sharing))} are all on GPU {device}; start one rank per GPU "
                "(system.ranks_per_node) and let CUDA_VISIBLE_DEVICES show each rank all of the host's GPUs"
            )


def _nodes_of(share: _Share, nodes: _Nodes) -> list[int | None]:
    """The nodes that a share has cores of."""
    mine = set(_flat(share.cores))
    return [node for node, cores in nodes.items() if mine & set(_flat(cores))]


def _places(gpus: list[Gpu | None], homes: list[int | None]) -> list[tuple[tuple[str, ...], int | None]]:
    """Where every rank is, for its network card: the PCI path of its GPU, and the NUMA node of the GPU or of its cores."""
    return [
        (gpu.path, home if gpu.numa_node is None else gpu.numa_node) if gpu else ((), home)
        for gpu, home in zip(gpus, homes, strict=True)
    ]


def _num_physical_cores(topology: Topology, cpus: Collection[int]) -> int:
    core_of = {cpu: index for index, core in enumerate(topology.cores) for cpu in core}
    return len({core_of.get(cpu, -1 - cpu) for cpu in cpus})


def _flat(cores: _Cores) -> list[int]:
    return [cpu for core in cores for cpu in core]


def _apart(cores: _Cores) -> _Cores:
    """Every CPU by itself, those of a core next to each other."""
    return [(cpu,) for core in cores for cpu in core]


def _describe(share: _Share, nodes: list[int | None]) -> str:
    known = [node for node in nodes if node is not None]
    where = f" of NUMA node{'s' if len(known) > 1 else ''} {format_cpulist(known)}" if known else ""
    text = f"{len(share.cores)} {share.unit}{'' if len(share.cores) == 1 else 's'}{where}"
    text += f" (CPUs {format_cpulist(_flat(share.cores))})" if share.cores else ""
    if share.ranks == 1:
        return text
    if len(share.cores) == share.of:
        return f"{text} for all of {share.ranks} ranks: too few to bind them apart"
    return f"{text}: an equal share of {share.of} for {share.ranks} ranks"


def _allowed_cores(topology: Topology, allowed: Collection[int]) -> _Nodes:
    node_of = {cpu: node.number for node in topology.nodes for cpu in node.cpus}
    known = {cpu for core in topology.cores for cpu in core}
    nodes: _Nodes = {}
    for core in (*topology.cores, *((cpu,) for cpu in sorted(set(allowed) - known))):
        if mine := tuple(cpu for cpu in core if cpu in allowed):
            nodes.setdefault(node_of.get(mine[0]), []).append(mine)
    return dict(sorted(nodes.items(), key=lambda item: -1 if item[0] is None else item[0]))


def _gpus_of_ranks(topology: Topology, ranks: int, visible: str | None) -> tuple[list[Gpu | None], str | None]:
    """The GPU of every local rank, and why some have none."""
    if not topology.gpus:
        return [None] * ranks, "no NVIDIA GPU in sysfs"
    chosen: list[Gpu] = list(topology.gpus)
    if visible is not None:
        chosen, by_address = [], {gpu.address: gpu for gpu in topology.gpus}
        for name in (part.strip().lower() for part in visible.split(",")):
            if name.startswith(("gpu-", "mig-")):
                return [None] * ranks, "CUDA_VISIBLE_DEVICES names GPUs by UUID, which sysfs does not know"
            address = _ADDRESS.fullmatch(name)
            gpu = by_address.get(":".join(address.groups())) if address else None
            if name.isdecimal() and int(name) < len(topology.gpus):
                gpu = topology.gpus[int(name)]
            if gpu is None:  # as in CUDA, a name that does not exist ends the list
                break
            chosen.append(gpu)
    short = f"{len(chosen)} visible GPUs for {ranks} ranks" if len(chosen) < ranks else None
    return [*chosen[:ranks], *[None] * (ranks - len(chosen))], short


def _home(topology: Topology, nodes: _Nodes, gpu: Gpu) -> int | None:
    """The node whose cores serve a GPU: its own, or the nearest one that has allowed cores."""
    own = gpu.numa_node
    if own is None and gpu.cpus:
        found = [node.number for node in topology.nodes if set(gpu.cpus) & set(node.cpus)]
        own = found[0] if len(found) == 1 else None
    if own in nodes or len(nodes) == 1:
        return own if own in nodes else next(iter(nodes))
    distances = next((node.distances for node in topology.nodes if node.number == own), {})
    return min((n for n in nodes if n in distances), key=lambda n: (distances[n], n), default=None)


def _gpu_shares(topology: Topology, nodes: _Nodes, gpus: list[Gpu]) -> tuple[list[_Share] | None, str | None]:
    """Every rank's part of the cores at its GPU, or the reason why there is none for some rank.

    All ranks or none: a plan that is local for some only would give the others what is left, and all wait for the slowest.
    """
    homes = [_home(topology, nodes, gpu) for gpu in gpus]
    sharing, given, shares = Counter(homes), Counter[int | None](), []
    for gpu, home in zip(gpus, homes, strict=True):
        if home not in nodes:
            return None, f"GPU {gpu.address} has no allowed CPUs at a known NUMA node"
        unit: Literal["core", "CPU"] = "core" if len(nodes[home]) >= sharing[home] else "CPU"
        units = nodes[home] if unit == "core" else _apart(nodes[home])
        size = len(units) // sharing[home]
        if size == 0:
            return None, f"{sharing[home]} GPUs and {len(units)} allowed CPUs at NUMA node {home}"
        start = given[home] * size
        given[home] += 1
        shares.append(_Share(units[start : start + size], len(units), sharing[home], unit))
    return shares, None


def _even_shares(nodes: _Nodes, ranks: int) -> list[_Share]:
    """Equal disjoint shares of all allowed cores, in the order of nodes."""
    unit: Literal["core", "CPU"] = "core"
    if sum(map(len, nodes.values())) < ranks:
        nodes, unit = {node: _apart(cores) for node, cores in nodes.items()}, "CPU"
    every = [core for cores in nodes.values() for core in cores]
    if len(every) < ranks:
        return [_Share(every, len(every), ranks, unit)] * ranks
    share = len(every) // ranks
    inside = next(size for size in range(share, 0, -1) if sum(len(cores) // size for cores in nodes.values()) >= ranks)
    if ranks < len(nodes) and 2 * inside <= share:  # to stay within a node would idle half of the machine
        parts = [every[rank * share : (rank + 1) * share] for rank in range(ranks)]
    else:
        # The first seat of every node before the second of any: memory bandwidth is the nodes', so ranks spread out.
        seats = sorted((i, order) for order, cores in enumerate(nodes.values()) for i in range(len(cores) // inside))
        taken = sorted((order, i) for i, order in seats[:ranks])
        parts = [list(nodes.values())[order][i * inside : (i + 1) * inside] for order, i in taken]
    return [_Share(part, len(every), ranks, unit) for part in parts]


def _usable_nics(topology: Topology) -> list[Nic]:
    """InfiniBand cards with an active port; where there is none, Ethernet interfaces that are up."""
    up = [nic for nic in topology.nics if nic.up]
    return [nic for nic in up if nic.infiniband] or up


_NEAR = ("not known to be near", "on the same NUMA node", "at the same host bridge", "behind the same PCI switch")


def _closeness(path: tuple[str, ...], node: int | None, nic: Nic) -> tuple[int, int]:
    """How near a card is: a class (index of `_NEAR`), then the bridges in common."""
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(path, nic.path, strict=False))))
    if shared:
        return min(shared + 1, 3), shared
    return int(node is not None and node == nic.numa_node), 0


def _assign_nics(places: list[tuple[tuple[str, ...], int | None]], nics: list[Nic]) -> list[tuple[str | None, str]]:
    """A card and where it is for every rank, whose place is the PCI path of its GPU and its NUMA node.

    Only cards of a rank's nearest class are for it; of these the pairs with most bridges in common go first, and no card is
    given a second time before all that are near have been given once.
    """
    if not nics:
        return [(None, "no network card that is up")] * len(places)
    table = [[_closeness(path, node, nic) for nic in nics] for path, node in places]
    best = [max(row)[0] for row in table]
    every = ((rank, index, *close) for rank, row in enumerate(table) for index, close in enumerate(row))
    pairs = sorted((-shared, rank, index) for rank, index, near, shared in every if near == best[rank])
    assigned: dict[int, int] = {}
    while len(assigned) < len(places):
        taken: set[int] = set()
        for _, rank, index in pairs:
            if rank not in assigned and index not in taken:
                assigned[rank] = index
                taken.add(index)
    return [(nics[i].name, f"NIC {nics[i].name} {_NEAR[table[rank][i][0]]}") for rank, i in sorted(assigned.items())]
