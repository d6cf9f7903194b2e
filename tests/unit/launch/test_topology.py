"""Cores and network cards of local ranks, on made-up sysfs trees and on random machines."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import ROOT

from bert_fast.errors import UserError
from bert_fast.launch.topology import (
    Binding,
    Gpu,
    Nic,
    NumaNode,
    Topology,
    bind,
    check_distinct,
    format_cpulist,
    parse_cpulist,
    read_topology,
)


class Sysfs:
    """Writes the parts of a sysfs tree that the reader looks at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.node_cpus: dict[int, str] = {}

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def link(self, path: str, target: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(self.root / target)

    def nodes(self, cpulists: list[str], distances: list[str]) -> None:
        self.node_cpus = dict(enumerate(cpulists))
        for number, cpulist in self.node_cpus.items():
            self.write(f"devices/system/node/node{number}/cpulist", cpulist)
            self.write(f"devices/system/node/node{number}/distance", distances[number])
        self.write("devices/system/node/online", f"0-{len(cpulists) - 1}")

    def cpus(self, cores: int, threads: int = 2) -> None:
        for cpu in range(cores * threads):
            siblings = ",".join(str(cpu % cores + thread * cores) for thread in range(threads))
            self.write(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
        self.write("devices/system/cpu/cpufreq/boost", "1")

    def pci(self, path: str, numa: int, vendor: str = "0x15b3", kind: str = "0x020700") -> None:
        device = f"devices/{path}"
        for name, text in {"vendor": vendor, "class": kind, "numa_node": str(numa)}.items():
            self.write(f"{device}/{name}", text)
        self.write(f"{device}/local_cpulist", self.node_cpus.get(numa, ""))
        self.link(f"bus/pci/devices/{path.rsplit('/', 1)[1]}", device)

    def gpu(self, path: str, numa: int) -> None:
        self.pci(path, numa, "0x10de", "0x030200")

    def infiniband(self, name: str, path: str, numa: int, state: str = "4: ACTIVE") -> None:
        self.pci(path, numa)
        home = f"devices/{path}/infiniband/{name}"
        self.write(f"{home}/ports/1/state", state)
        self.link(f"{home}/device", f"devices/{path}")
        self.link(f"class/infiniband/{name}", home)

    def ethernet(self, name: str, path: str | None, numa: int = 0, state: str = "up") -> None:
        home = f"devices/{path}/net/{name}" if path else f"devices/virtual/net/{name}"
        self.write(f"{home}/operstate", state)
        if path:
            self.pci(path, numa, kind="0x020000")
            self.link(f"{home}/device", f"devices/{path}")
        self.link(f"class/net/{name}", home)


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


def bind_all(
    topology: Topology, ranks: int, device: str, visible: str | None = None, cpus: str | None = None
) -> list[Binding]:
    allowed = topology.cpus if cpus is None else parse_cpulist(cpus)
    return [bind(topology, rank, ranks, allowed, device, visible) for rank in range(ranks)]  # type: ignore[arg-type]


def lists(bindings: list[Binding]) -> list[str]:
    return [format_cpulist(binding.cpus) for binding in bindings]


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


def test_dgx_a100_gpus_share_their_nodes_and_get_a_card_each(dgx_a100: Topology) -> None:
    bindings = bind_all(dgx_a100, 8, "cuda")
    assert lists(bindings) == [
        "48-55,176-183", "56-63,184-191", "16-23,144-151", "24-31,152-159",
        "112-119,240-247", "120-127,248-255", "80-87,208-215", "88-95,216-223",
    ]  # fmt: skip
    assert [binding.num_cores for binding in bindings] == [8] * 8
    # The second GPU of a switch shares a bridge with the first card, so the first GPU takes the other one.
    assert [binding.nic for binding in bindings] == [f"mlx5_{n}" for n in (1, 0, 3, 2, 7, 6, 9, 8)]
    assert bindings[0].why == (
        "GPU 0000:07:00.0 of NUMA node 3; 8 cores of NUMA node 3 (CPUs 48-55,176-183): an equal share of 16 for 2 ranks; "
        "NIC mlx5_1 behind the same PCI switch"
    )


def test_visible_devices_choose_gpus(dgx_a100: Topology) -> None:
    four = bind_all(dgx_a100, 4, "cuda", "6,0,2,4")
    assert [binding.gpu and binding.gpu[5:7] for binding in four] == ["b7", "07", "47", "87"]
    assert lists(four)[1] == "48-63,176-191"  # alone on its node now
    by_address = bind_all(dgx_a100, 2, "cuda", "0000:BD:00.0,00000000:07:00.0")
    assert [binding.gpu for binding in by_address] == ["0000:bd:00.0", "0000:07:00.0"]
    assert [binding.numa_node for binding in by_address] == [5, 3]


@pytest.mark.parametrize("visible", ["GPU-8932f937-d72c-4106", "MIG-3f1c,MIG-aa0b", "", "0,-1,1", "NoDevFiles"])
def test_unknown_devices_fall_back_to_equal_shares(dgx_a100: Topology, visible: str) -> None:
    bindings = bind_all(dgx_a100, 2, "cuda", visible)
    assert [binding.num_cores for binding in bindings] == [64, 64]
    assert not set(bindings[0].cpus) & set(bindings[1].cpus)
    assert "cores not chosen by GPU" in bindings[1].why
    assert ("UUID" in bindings[1].why) == visible.startswith(("GPU", "MIG"))
    assert bindings[1].gpu is bindings[1].nic is None


def test_a_node_without_allowed_cpus_borrows_from_the_nearest(dgx_a100: Topology) -> None:
    bindings = bind_all(dgx_a100, 8, "cuda", cpus="32-47,96-111")  # nodes 2 and 6: none has a GPU
    assert [binding.numa_node for binding in bindings] == [2] * 4 + [6] * 4
    assert [len(binding.cpus) for binding in bindings] == [4] * 8
    assert "GPU 0000:07:00.0 of NUMA node 3; 4 cores of NUMA node 2 " in bindings[0].why


def test_a_node_with_fewer_cores_than_gpus_parts_its_threads(dgx_a100: Topology) -> None:
    bindings = bind_all(dgx_a100, 3, "cuda", cpus="48,176,16-31")
    assert lists(bindings) == ["48", "176", "16-31"]
    assert bindings[0].num_cores == 1
    too_few = bind_all(dgx_a100, 3, "cuda", cpus="48,16-31")
    assert [len(binding.cpus) for binding in too_few] == [5, 5, 5]
    assert "2 GPUs and 1 allowed CPUs at NUMA node 3: cores not chosen by GPU" in too_few[0].why


def test_dgx_h100_matches_the_user_guide(dgx_h100: Topology) -> None:
    bindings = bind_all(dgx_h100, 8, "cuda")
    assert [binding.nic for binding in bindings] == [f"mlx5_{n}" for n in (0, 3, 4, 5, 6, 9, 10, 11)]
    assert lists(bindings)[:2] == ["0-13,112-125", "14-27,126-139"]
    assert [binding.numa_node for binding in bindings] == [0] * 4 + [1] * 4


def test_a_card_that_is_down_is_not_dealt(dgx_h100: Topology) -> None:
    nics = tuple(replace(nic, up=nic.name != "mlx5_3") for nic in dgx_h100.nics)
    dealt = [binding.nic for binding in bind_all(replace(dgx_h100, nics=nics), 8, "cuda")]
    assert dealt[:3] == ["mlx5_0", "mlx5_0", "mlx5_4"]  # shared with the neighbour on the switch, not far away


def test_ethernet_is_for_machines_without_infiniband(dgx_h100: Topology) -> None:
    near = Nic("eno1", dgx_h100.gpus[0].path, 0, infiniband=False, up=True)
    assert bind_all(replace(dgx_h100, nics=(near, *dgx_h100.nics)), 1, "cuda")[0].nic == "mlx5_0"
    down = [replace(nic, up=False) for nic in dgx_h100.nics]
    assert bind_all(replace(dgx_h100, nics=(*down, near)), 1, "cuda")[0].nic == "eno1"


def test_ports_that_are_down(sysfs: Sysfs) -> None:
    sysfs.infiniband("mlx5_0", "pci0000:00/0000:01:00.0", 0, "1: DOWN")
    sysfs.write("class/infiniband/mlx5_0/ports/2/state", "4: ACTIVE")
    sysfs.infiniband("mlx5_1", "pci0000:00/0000:02:00.0", 0, "2: INIT")
    assert [(nic.name, nic.up, nic.ports) for nic in read_topology(sysfs.root).nics] == [
        ("mlx5_0", True, (2,)),
        ("mlx5_1", False, ()),
    ]


def test_desktop(desktop: Topology) -> None:
    (binding,) = bind_all(desktop, 1, "cuda")
    assert binding == Binding(tuple(range(16)), 0, "enp3s0", "0000:01:00.0", binding.why, 8)
    assert "NIC enp3s0 at the same host bridge" in binding.why
    assert [nic.name for nic in desktop.nics if nic.up] == ["enp3s0"]
    two = bind_all(desktop, 2, "cuda")
    assert lists(two) == ["0-3,8-11", "4-7,12-15"]
    assert "1 visible GPUs for 2 ranks: cores not chosen by GPU" in two[1].why


def test_a_gpu_of_unknown_node_is_placed_by_its_cpus(sysfs: Sysfs) -> None:
    sysfs.nodes(["0-3", "4-7"], ["10 20", "20 10"])
    sysfs.cpus(8, threads=1)
    sysfs.gpu("pci0000:00/0000:01:00.0", -1)
    sysfs.write("devices/pci0000:00/0000:01:00.0/local_cpulist", "4-7")
    assert lists(bind_all(read_topology(sysfs.root), 1, "cuda")) == ["4-7"]
    sysfs.write("devices/pci0000:00/0000:01:00.0/local_cpulist", "0-7")
    (binding,) = bind_all(read_topology(sysfs.root), 1, "cuda")
    assert binding.cpus == tuple(range(8))
    assert "no allowed CPUs at a known NUMA node" in binding.why


def test_container_without_nodes(sysfs: Sysfs) -> None:
    sysfs.cpus(2, threads=1)
    topology = read_topology(sysfs.root)
    assert topology.missing == ("devices/system/node", "bus/pci/devices")
    bindings = bind_all(topology, 2, "cpu")
    assert [binding.cpus for binding in bindings] == [(0,), (1,)]
    assert bindings[0].numa_node is None
    assert bindings[0].why == (
        "1 core (CPUs 0): an equal share of 2 for 2 ranks; no network card that is up; no devices/system/node here; "
        "no bus/pci/devices here"
    )


def test_no_sysfs_at_all(tmp_path: Path) -> None:
    topology = read_topology(tmp_path / "nothing")
    assert [bind(topology, rank, 2, {4, 7}, "cpu").cpus for rank in range(2)] == [(4,), (7,)]
    assert bind(topology, 0, 1, (), "cuda").cpus == ()


def test_unreadable_parts_are_left_out(sysfs: Sysfs) -> None:
    sysfs.nodes(["0-1", "nonsense"], ["10", ""])
    sysfs.cpus(2, threads=1)
    sysfs.write("devices/system/cpu/cpu1/online", "0")
    (sysfs.root / "class/net/eth0/device").mkdir(parents=True)
    topology = read_topology(sysfs.root)
    assert topology.cores == ((0,),)
    assert [node.cpus for node in topology.nodes] == [(0, 1), ()]
    assert [nic.up for nic in topology.nics] == [False]


def test_cpu_ranks_get_whole_cores_within_nodes(dgx_h100: Topology) -> None:
    four = bind_all(dgx_h100, 4, "cpu")
    assert lists(four) == ["0-27,112-139", "28-55,140-167", "56-83,168-195", "84-111,196-223"]
    assert [binding.nic for binding in four] == ["mlx5_0", "mlx5_1", "mlx5_6", "mlx5_7"]
    three = bind_all(dgx_h100, 3, "cpu")
    assert [(binding.numa_node, binding.num_cores) for binding in three] == [(0, 28), (0, 28), (1, 28)]
    assert "an equal share of 112 for 3 ranks" in three[0].why


def test_one_cpu_rank_takes_all_nodes(dgx_h100: Topology) -> None:
    (binding,) = bind_all(dgx_h100, 1, "cpu")
    assert (binding.num_cores, len(binding.cpus), binding.numa_node) == (112, 224, None)
    assert "112 cores of NUMA nodes 0-1" in binding.why


def test_threads_of_a_core_are_parted_only_when_cores_run_out(desktop: Topology) -> None:
    bindings = bind_all(desktop, 4, "cpu", cpus="0-1,8-9")
    assert [binding.cpus for binding in bindings] == [(0,), (8,), (1,), (9,)]
    assert "1 CPU of NUMA node 0" in bindings[0].why
    many = bind_all(desktop, 5, "cpu", cpus="0-1,8-9")
    assert {binding.cpus for binding in many} == {(0, 1, 8, 9)}
    assert "for all of 5 ranks: too few to bind them apart" in many[0].why


def test_check_distinct() -> None:
    check_distinct([("n1", "0000:07:00.0"), ("n1", "0000:0f:00.0"), ("n2", "0000:07:00.0"), ("n2", None), ("n2", None)])
    with pytest.raises(UserError, match=r"host n2: ranks 1, 3 are all on GPU 0000:07:00.0; start one rank a GPU"):
        check_distinct([("n1", "0000:07:00.0"), ("n2", "0000:07:00.0"), ("n2", "0000:0f:00.0"), ("n2", "0000:07:00.0")])


@st.composite
def machines(draw: st.DrawFn) -> tuple[Topology, set[int], int]:
    sizes = draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    threads, total = draw(st.integers(1, 2)), sum(sizes) or 3
    cores = tuple(tuple(core + thread * total for thread in range(threads)) for core in range(total))
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    distances = {m: 10 + m for m in range(4)} if draw(st.booleans()) else {}
    nodes = tuple(
        NumaNode(n, tuple(cpu for core in cores[start : start + size] for cpu in core), distances)
        for n, (start, size) in enumerate(zip(starts, sizes, strict=True))
    )
    place = st.none() | st.integers(0, 3)
    gpus = tuple(
        Gpu(f"0000:{n:02x}:00.0", (f"pci0000:{draw(st.integers(0, 1))}", f"{n}"), draw(place), ())
        for n in range(draw(st.integers(0, 6)))
    )
    nics = tuple(
        Nic(f"mlx5_{n}", (f"pci0000:{n % 2}", f"nic{n}"), draw(place), True, draw(st.booleans())) for n in range(3)
    )
    allowed = draw(st.sets(st.sampled_from([c for core in cores for c in core]), min_size=1))
    return Topology(nodes, cores, gpus, nics, ()), allowed, draw(st.integers(1, 7))


@settings(max_examples=120, deadline=None)
@given(machine=machines(), device=st.sampled_from(["cpu", "cuda"]))
def test_shares_are_allowed_and_disjoint(machine: tuple[Topology, set[int], int], device: str) -> None:
    topology, allowed, ranks = machine
    bindings = [bind(topology, rank, ranks, allowed, device) for rank in range(ranks)]  # type: ignore[arg-type]
    for binding in bindings:
        assert set(binding.cpus) <= allowed
        assert binding.cpus
        assert binding.num_cores >= 1
    given_out = Counter(cpu for binding in bindings for cpu in binding.cpus)
    if len(allowed) >= ranks:
        assert set(given_out.values()) == {1}
    usable = [set(core) & allowed for core in topology.cores if set(core) & allowed]
    if device == "cpu" and len(usable) >= ranks:
        assert len({binding.num_cores for binding in bindings}) == 1
        for core in usable:  # whole cores: nobody has a part of one
            assert all(core <= set(binding.cpus) or not core & set(binding.cpus) for binding in bindings)
    nodes = [set(node.cpus) for node in topology.nodes if node.cpus]
    if device == "cpu" and nodes and len(usable) >= ranks >= len(nodes):  # nobody spans two nodes
        assert all(any(set(binding.cpus) <= node for node in nodes) for binding in bindings)


def test_show_topology(
    h100_sysfs: Sysfs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, script = tmp_path / "topology.json", ROOT / "scripts" / "show_topology.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--root", str(h100_sysfs.root), "--ranks", "8", "--json", str(out)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(script), run_name="__main__")
    text = capsys.readouterr().out
    assert "GPU 7: 0000:df:00.0, NUMA node 1" in text
    assert "NCCL_IB_HCA==mlx5_11:1 UCX_NET_DEVICES=mlx5_11:1" in text
    assert [rank["nic"] for rank in json.loads(out.read_text())["ranks"]][:2] == ["mlx5_0", "mlx5_3"]
    monkeypatch.setattr(sys, "argv", [str(script), "--root", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().err.startswith("error: --root ")
