"""Machines as sysfs trees, for the tests of topology and binding."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.sysfs import Sysfs

from bert_fast.launch.topology import Topology, read_topology


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


@pytest.fixture(scope="module")
def dgx_a100(tmp_path_factory: pytest.TempPathFactory) -> Topology:
    """2 sockets of 64 cores in 8 nodes; under each switch two GPUs and two cards, one card at the bridge of the second GPU."""
    sysfs = Sysfs(tmp_path_factory.mktemp("a100"))
    row = [" ".join("10" if a == b else "12" if a // 4 == b // 4 else "32" for b in range(8)) for a in range(8)]
    sysfs.nodes([f"{16 * n}-{16 * n + 15},{128 + 16 * n}-{143 + 16 * n}" for n in range(8)], row)
    sysfs.cpus(128)
    switches = {
        "00": (3, "07 0f", "0c 12"),
        "40": (1, "47 4e", "4b 54"),
        "80": (7, "87 90", "8d 94"),
        "b0": (5, "b7 bd", "ba cc"),
    }
    for (bus, (node, gpus, nics)), first in zip(switches.items(), (0, 2, 6, 8), strict=True):
        switch = f"pci0000:{bus}/0000:{bus}:01.1/0000:{bus}:02.0"
        near, far = gpus.split()
        close, wide = nics.split()
        sysfs.gpu(f"{switch}/0000:{bus}:03.0/0000:{near}:00.0", node)
        sysfs.gpu(f"{switch}/0000:{bus}:04.0/0000:{far}:00.0", node)
        sysfs.infiniband(f"mlx5_{first}", f"{switch}/0000:{bus}:04.0/0000:{close}:00.0", node)
        sysfs.infiniband(f"mlx5_{first + 1}", f"{switch}/0000:{bus}:05.0/0000:{wide}:00.0", node)
    sysfs.infiniband("mlx5_4", "pci0000:60/0000:60:03.1/0000:61:00.0", 0)
    sysfs.infiniband("mlx5_10", "pci0000:e0/0000:e0:03.1/0000:e1:00.0", 4)
    sysfs.pci("pci0000:b0/0000:b0:01.1/0000:c4:00.0", 5, "0x10de", "0x068000")  # an NVSwitch is no GPU
    return read_topology(sysfs.root)


@pytest.fixture(scope="module")
def h100_sysfs(tmp_path_factory: pytest.TempPathFactory) -> Sysfs:
    """2 sockets of 56 cores; a switch for two GPUs and two cards; two storage cards at their own root ports."""
    sysfs = Sysfs(tmp_path_factory.mktemp("h100"))
    sysfs.nodes(["0-55,112-167", "56-111,168-223"], ["10 21", "21 10"])
    sysfs.cpus(112)
    gpus, cards = ["1b", "43", "52", "61", "9d", "c3", "d1", "df"], ["18", "40", "4f", "5e", "9a", "c0", "ce", "dc"]
    for index, number in enumerate((0, 3, 4, 5, 6, 9, 10, 11)):
        switch = f"pci0000:{index // 2 + 1:02x}/0000:{index // 2 + 1:02x}:01.0/0000:{index // 2 + 1:02x}:02.0"
        sysfs.gpu(f"{switch}/0000:{gpus[index]}:00.0", index // 4)
        sysfs.infiniband(f"mlx5_{number}", f"{switch}/0000:{cards[index]}:00.0", index // 4)
    sysfs.infiniband("mlx5_1", "pci0000:20/0000:20:01.0/0000:29:00.0", 0)
    sysfs.infiniband("mlx5_7", "pci0000:a0/0000:a0:01.0/0000:aa:00.0", 1)
    return sysfs


@pytest.fixture(scope="module")
def dgx_h100(h100_sysfs: Sysfs) -> Topology:
    return read_topology(h100_sysfs.root)


@pytest.fixture
def desktop(sysfs: Sysfs) -> Topology:
    """One socket of 8 cores, which tells no device's node; one GPU with its audio function; Ethernet only."""
    sysfs.nodes(["0-15"], ["10"])
    sysfs.cpus(8)
    sysfs.pci("pci0000:00/0000:00:01.0/0000:01:00.0", -1, "0x10de", "0x030000")
    sysfs.pci("pci0000:00/0000:00:01.0/0000:01:00.1", -1, "0x10de", "0x040300")
    sysfs.ethernet("enp3s0", "pci0000:00/0000:00:1c.0/0000:03:00.0", -1)
    sysfs.ethernet("enp4s0", "pci0000:00/0000:00:1d.0/0000:04:00.0", -1, "down")
    sysfs.ethernet("lo", None, state="unknown")
    sysfs.ethernet("docker0", None)
    return read_topology(sysfs.root)
