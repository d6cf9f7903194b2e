"""Reading made-up sysfs trees."""

from __future__ import annotations

from support.sysfs import Sysfs

from bert_fast.launch.topology import Topology, format_cpulist, parse_cpulist, read_topology


def test_cpulists() -> None:
    assert parse_cpulist("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert parse_cpulist("\n") == ()
    assert format_cpulist((11, 0, 1, 2, 8, 10)) == "0-2,8,10-11"


def test_dgx_a100_is_read(dgx_a100: Topology) -> None:
    assert [gpu.numa_node for gpu in dgx_a100.gpus] == [3, 3, 1, 1, 7, 7, 5, 5]
    assert [gpu.address[5:7] for gpu in dgx_a100.gpus] == ["07", "0f", "47", "4e", "87", "90", "b7", "bd"]
    assert [nic.name for nic in dgx_a100.nics][-2:] == ["mlx5_9", "mlx5_10"]
    assert len(dgx_a100.cores) == 128
    assert dgx_a100.cores[3] == (3, 131)
    assert dgx_a100.nodes[1].distances[5] == 32
    assert dgx_a100.missing == ()


def test_unreadable_parts_are_left_out(sysfs: Sysfs) -> None:
    sysfs.nodes(["0-1", "nonsense"], ["10", ""])
    sysfs.cpus(2, threads=1)
    sysfs.write("devices/system/cpu/cpu1/online", "0")
    (sysfs.root / "class/net/eth0/device").mkdir(parents=True)
    topology = read_topology(sysfs.root)
    assert topology.cores == ((0,),)
    assert [node.cpus for node in topology.nodes] == [(0, 1), ()]
    assert [nic.up for nic in topology.nics] == [False]


def test_ports_that_are_down(sysfs: Sysfs) -> None:
    sysfs.infiniband("mlx5_0", "pci0000:00/0000:01:00.0", 0, "1: DOWN")
    sysfs.write("class/infiniband/mlx5_0/ports/2/state", "4: ACTIVE")
    sysfs.infiniband("mlx5_1", "pci0000:00/0000:02:00.0", 0, "2: INIT")
    assert [(nic.name, nic.up, nic.ports) for nic in read_topology(sysfs.root).nics] == [
        ("mlx5_0", True, (2,)),
        ("mlx5_1", False, ()),
    ]
