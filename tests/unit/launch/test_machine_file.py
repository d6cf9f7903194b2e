"""Machine files: strict reading, variables that never overwrite, and the shipped files."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import ROOT

from bert_fast.errors import UserError
from bert_fast.launch.machine_file import MachineFile, load_machine_file, nic_variables, set_variables
from bert_fast.launch.topology import Nic

FILES = sorted((ROOT / "configs" / "systems").glob("*.yaml"))
GOOD = "name: box\ndescription: a box\nsource: a page\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "box.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults(tmp_path: Path) -> None:
    machine = load_machine_file(write(tmp_path, GOOD))
    assert (machine.ranks_per_node, machine.environment, machine.bind_cpus, machine.bind_nics) == (
        None,
        {},
        True,
        False,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "bind_cpu: true\n", "unknown field bind_cpu; the fields are name, description, source,"),
        ("name: box\nsource: a page\n", "field description is missing; add it"),
        (GOOD + "environment: {NCCL_NVLS_ENABLE: 1}\n", "environment.NCCL_NVLS_ENABLE: 1 is read as a number"),
        (GOOD + "environment: {'NCCL-X': '1'}\n", "environment.NCCL-X: String should match"),
        (GOOD + "ranks_per_node: 0\n", "ranks_per_node: Input should be greater than 0"),
        (GOOD + "bind_nics: perhaps\n", "bind_nics: "),
        ("- name\n", "must hold fields (name, "),
        ("name: [\n", "line 2 is not valid YAML"),
    ],
)
def test_mistakes_name_the_file_and_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_machine_file(path)
    assert str(caught.value).startswith(f"machine file {path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_file_lists_the_others(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"bux\.yaml does not exist; there are: .*box\.yaml"):
        load_machine_file(tmp_path / "bux.yaml")


def test_variables_leave_what_is_set() -> None:
    machine = MachineFile(
        name="box", description="d", source="s", environment={"A_NEW": "1", "B_SAME": "2", "C_OTHER": "3"}
    )
    environ = {"B_SAME": "2", "C_OTHER": "9", "PATH": "/bin"}
    assert set_variables(machine, environ) == [
        "A_NEW=1 set by box",
        "B_SAME=2 was set already",
        "C_OTHER=9 left as it was; box has 3",
    ]
    assert environ == {"A_NEW": "1", "B_SAME": "2", "C_OTHER": "9", "PATH": "/bin"}


def test_nic_variables() -> None:
    card = Nic("mlx5_1", ("pci0000:00", "0000:12:00.0"), 3, infiniband=True, up=True, ports=(1, 2))
    assert nic_variables(card) == {"NCCL_IB_HCA": "=mlx5_1:1,mlx5_1:2", "UCX_NET_DEVICES": "mlx5_1:1,mlx5_1:2"}
    plain = Nic("eth0", ("pci0000:00", "0000:03:00.0"), None, infiniband=False, up=True)
    assert nic_variables(plain)["NCCL_SOCKET_IFNAME"] == "=eth0"
    assert nic_variables(plain)["GLOO_SOCKET_IFNAME"] == "eth0"


def test_there_are_shipped_files() -> None:
    assert {path.stem for path in FILES} >= {"generic", "dgx_a100", "dgx_h100", "loopback"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_files(path: Path) -> None:
    machine = load_machine_file(path)
    assert machine.name == path.stem
    text = path.read_text(encoding="utf-8")
    assert "not been run" in text.split("name:")[0]  # the header says so
    lines = text.splitlines()
    for variable in machine.environment:  # every value has its reason in the line above
        (number,) = [n for n, line in enumerate(lines) if line.strip().startswith(f"{variable}:")]
        assert lines[number - 1].strip().startswith("#"), variable
    hca = machine.environment.get("NCCL_IB_HCA")
    if hca is not None:  # exact names, one per rank
        assert hca.startswith("=")
        assert len(set(hca[1:].split(","))) == machine.ranks_per_node


def test_a100_leaves_out_the_storage_cards() -> None:
    machine = load_machine_file(next(path for path in FILES if path.stem == "dgx_a100"))
    assert not {"mlx5_4", "mlx5_5", "mlx5_10", "mlx5_11"} & set(machine.environment["NCCL_IB_HCA"][1:].split(","))
