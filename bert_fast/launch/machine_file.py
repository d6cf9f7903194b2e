"""Kinds of machines as data: environment variables and binding, read from configs/systems/*.yaml."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from bert_fast.config import Section
from bert_fast.config.section import PositiveInt
from bert_fast.config.yaml_files import read_yaml, validate
from bert_fast.launch.topology import Nic

Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Text = Annotated[str, Field(min_length=1)]


class MachineFile(Section):
    """What ranks on a kind of machine start with."""

    name: Text = Field(description="short name, the file's")
    description: Text = Field(description="the machine in a sentence")
    source: Text = Field(description="where the values come from, and whether they have been run")
    ranks_per_node: PositiveInt | None = Field(None, description="ranks that fit a node, one per GPU; null: any number")
    environment: dict[Variable, str] = Field(
        {}, description="variables for every rank; one that is set already stays as it is"
    )
    bind_cpus: bool = Field(True, description="pin every rank to cores at its GPU's NUMA node (launch.binding)")
    bind_nics: bool = Field(False, description="show every rank its own network card only: see nic_variables")


def load_machine_file(path: str | Path) -> MachineFile:
    """Read a file of configs/systems/.

    Raises:
        UserError: one line naming the file and the field: absent, not YAML, an unknown or missing field, a wrong type.
    """
    tree = read_yaml(
        path, "machine file", f"fields ({', '.join(MachineFile.model_fields)})", "configs/systems/generic.yaml"
    )
    return validate(MachineFile, tree, f"machine file {path}")


def set_variables(machine: MachineFile, environ: MutableMapping[str, str]) -> list[str]:
    """Set those of the machine's variables that are not set yet; returns one line per variable for the log.

    Call it before anything asks CUDA for devices or starts a communicator: both read their variables once.
    """
    lines = []
    for name, value in machine.environment.items():
        if name not in environ:
            environ[name] = value
            lines.append(f"{name}={value} set by {machine.name}")
        elif environ[name] == value:
            lines.append(f"{name}={value} was set already")
        else:
            lines.append(f"{name}={environ[name]} left as it was; {machine.name} has {value}")
    return lines


def nic_variables(nic: Nic) -> dict[str, str]:
    """Variables that show a rank its own network card only (`bind_nics`).

    Off by default, since NCCL reads the same topology, gives every GPU its near cards, and sends through a neighbour GPU's
    card (PXN) where that is shorter; all ranks of a node should then see all cards. It is right where NCCL cannot see the
    topology (a virtual machine without its PCI tree), with several jobs on a node that must not share a card, or for UCX
    and MPI, which do not choose by GPU.
    """
    if not nic.infiniband:
        return {"NCCL_SOCKET_IFNAME": f"={nic.name}", "GLOO_SOCKET_IFNAME": nic.name, "UCX_NET_DEVICES": nic.name}
    ports = [f"{nic.name}:{port}" for port in nic.ports]
    # The leading "=" asks for the exact name: a bare mlx5_1 also means mlx5_10 to mlx5_19.
    return {"NCCL_IB_HCA": "=" + ",".join(ports or [nic.name]), "UCX_NET_DEVICES": ",".join(ports or [f"{nic.name}:1"])}
