"""What a machine is made of, read from sysfs: NUMA nodes, cores, GPUs, network cards."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path


@dataclass(frozen=True)
class NumaNode:
    """A NUMA node: its CPUs, and its distance to every node by the firmware's table (10 is itself)."""

    number: int
    cpus: tuple[int, ...]
    distances: dict[int, int]


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU. `path` goes from the host bridge to the device; `numa_node` is None where the kernel does not know."""

    address: str
    path: tuple[str, ...]
    numa_node: int | None
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Nic:
    """A network card: of InfiniBand's class (RoCE too) with its active ports, or an Ethernet interface that is up."""

    name: str
    path: tuple[str, ...]
    numa_node: int | None
    infiniband: bool
    up: bool
    ports: tuple[int, ...] = ()


@dataclass(frozen=True)
class Topology:
    """What sysfs tells of a machine. `cores` are the CPUs of every physical core; `missing` are parts that are absent."""

    nodes: tuple[NumaNode, ...]
    cores: tuple[tuple[int, ...], ...]
    gpus: tuple[Gpu, ...]
    nics: tuple[Nic, ...]
    missing: tuple[str, ...]

    @property
    def cpus(self) -> tuple[int, ...]:
        """Every CPU that is known, in order."""
        return tuple(sorted({c for core in self.cores for c in core} | {c for node in self.nodes for c in node.cpus}))


def parse_cpulist(text: str) -> tuple[int, ...]:
    """CPUs of the kernel's list form, "0-3,8": sorted. Raises ValueError for anything else."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(cpus))


def format_cpulist(cpus: Collection[int]) -> str:
    """The kernel's list form of CPUs: "0-3,8"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def read_topology(root: Path = Path("/sys")) -> Topology:
    """Read the sysfs tree at `root`. A part that is absent or unreadable is left out, never an error."""
    system = root / "devices" / "system"
    tables = {
        int(folder.name.removeprefix("node")): (_cpus(folder / "cpulist"), (_text(folder / "distance") or "").split())
        for folder in _entries(system / "node", "node[0-9]*")
    }
    nodes = tuple(
        NumaNode(number, cpus, {other: int(d) for other, d in zip(tables, row, strict=False) if d.isdigit()})
        for number, (cpus, row) in tables.items()
    )
    single = nodes[0].number if len(nodes) == 1 else None  # then a device that does not say is there too
    gpus = tuple(
        Gpu(entry.name, _pci_path(entry), _node_of(entry, single), _cpus(entry / "local_cpulist"))
        for entry in _entries(root / "bus/pci/devices")
        if _is_gpu(entry)
    )
    absent = [
        part for part in ("devices/system/node", "devices/system/cpu", "bus/pci/devices") if not (root / part).is_dir()
    ]
    return Topology(nodes, _read_cores(system / "cpu"), gpus, _read_nics(root / "class", single), tuple(absent))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):  # some attributes are there and refuse to be read
        return None


def _cpus(path: Path) -> tuple[int, ...]:
    try:
        return parse_cpulist(_text(path) or "")
    except ValueError:
        return ()


def _entries(folder: Path, pattern: str = "*") -> list[Path]:
    """Entries in the order of their numbers: mlx5_10 comes after mlx5_9."""
    return sorted(folder.glob(pattern), key=lambda entry: (len(entry.name), entry.name))


def _read_cores(folder: Path) -> tuple[tuple[int, ...], ...]:
    cores: list[tuple[int, ...]] = []
    seen: set[int] = set()
    for entry in _entries(folder, "cpu[0-9]*"):
        cpu = int(entry.name.removeprefix("cpu"))
        if cpu in seen or _text(entry / "online") == "0":
            continue
        core = tuple(c for c in _cpus(entry / "topology" / "thread_siblings_list") or (cpu,) if c not in seen)
        seen.update(core)
        cores.append(core)
    return tuple(cores)


def _pci_path(entry: Path) -> tuple[str, ...]:
    """Bridges from the host bridge down to the device that `entry` links to."""
    parts = entry.resolve().parts
    return tuple(dropwhile(lambda part: not re.fullmatch(r"pci[0-9a-f]{4,8}:[0-9a-f]{2}", part), parts)) or parts[-1:]


def _node_of(device: Path, single: int | None) -> int | None:
    text = _text(device / "numa_node") or ""
    return int(text) if text.isdigit() else single  # -1: the firmware did not say


def _is_gpu(entry: Path) -> bool:
    """An NVIDIA device of class 3D or VGA controller: not its audio function, not an NVSwitch."""
    return _text(entry / "vendor") == "0x10de" and (_text(entry / "class") or "")[:6] in ("0x0302", "0x0300")


def _read_nics(classes: Path, single: int | None) -> tuple[Nic, ...]:
    nics = []
    for entry in _entries(classes / "infiniband"):
        ports = tuple(int(p.name) for p in _entries(entry / "ports") if "ACTIVE" in (_text(p / "state") or "").split())
        device = entry / "device"
        nics.append(Nic(entry.name, _pci_path(device), _node_of(device, single), True, bool(ports), ports))
    for entry in _entries(classes / "net"):
        if (device := entry / "device").exists():  # loopback, bridges and bonds have none
            up = _text(entry / "operstate") == "up"
            nics.append(Nic(entry.name, _pci_path(device), _node_of(device, single), False, up))
    return tuple(nics)
