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
from support.sysfs import Sysfs

from bert_fast.errors import UserError
from bert_fast.launch.binding import Binding, bind, check_one_rank_per_gpu, is_bound_by_slurm
from bert_fast.launch.topology import Gpu, Nic, NumaNode, Topology, format_cpulist, parse_cpulist, read_topology


def bind_all(
    topology: Topology, ranks: int, device: str, visible: str | None = None, cpus: str | None = None
) -> list[Binding]:
    allowed = topology.cpus if cpus is None else parse_cpulist(cpus)
    return [bind(topology, rank, ranks, allowed, device, visible) for rank in range(ranks)]  # type: ignore[arg-type]


def lists(bindings: list[Binding]) -> list[str]:
    return [format_cpulist(binding.cpus) for binding in bindings]


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


def test_a_card_that_is_down_is_not_assigned(dgx_h100: Topology) -> None:
    nics = tuple(replace(nic, up=nic.name != "mlx5_3") for nic in dgx_h100.nics)
    dealt = [binding.nic for binding in bind_all(replace(dgx_h100, nics=nics), 8, "cuda")]
    assert dealt[:3] == ["mlx5_0", "mlx5_0", "mlx5_4"]  # shared with the neighbour on the switch, not far away


def test_ethernet_is_for_machines_without_infiniband(dgx_h100: Topology) -> None:
    near = Nic("eno1", dgx_h100.gpus[0].path, 0, infiniband=False, up=True)
    assert bind_all(replace(dgx_h100, nics=(near, *dgx_h100.nics)), 1, "cuda")[0].nic == "mlx5_0"
    down = [replace(nic, up=False) for nic in dgx_h100.nics]
    assert bind_all(replace(dgx_h100, nics=(*down, near)), 1, "cuda")[0].nic == "eno1"


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


def test_two_ranks_on_one_gpu_are_refused() -> None:
    check_one_rank_per_gpu(
        [("n1", "0000:07:00.0"), ("n1", "0000:0f:00.0"), ("n2", "0000:07:00.0"), ("n2", None), ("n2", None)]
    )
    with pytest.raises(UserError, match=r"host n2: ranks 1, 3 are all on GPU 0000:07:00.0; start one rank per GPU"):
        check_one_rank_per_gpu(
            [("n1", "0000:07:00.0"), ("n2", "0000:07:00.0"), ("n2", "0000:0f:00.0"), ("n2", "0000:07:00.0")]
        )


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


@pytest.mark.parametrize(
    ("kind", "bound"), [("", False), ("none", False), ("quiet,mask_cpu:0xf", True), ("map_cpu", True)]
)
def test_slurms_own_binding_is_seen(kind: str, bound: bool) -> None:
    assert is_bound_by_slurm({"SLURM_CPU_BIND_TYPE": kind}) is bound
