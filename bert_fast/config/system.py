"""Ranks, devices and threads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config.section import Ranks, Section


class SystemConfig(Section):
    """The ranks and what each of them gets of a node. Read by the launchers, and by every rank when it starts."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="cuda, cpu, or auto: cuda where there is a device, and else cpu"
    )
    world_size: Ranks = Field(1, description="number of ranks on all nodes together")
    ranks_per_node: Ranks | None = Field(None, description="number of ranks on one node; world_size if unset")
    threads_per_rank: Annotated[int, Field(gt=0, le=4096)] | None = Field(
        None,
        description="number of CPU threads per rank; if unset: cores of the node / ranks of the node on the CPU, 4 on "
        "CUDA",
    )
    bind_cores: bool = Field(
        True,
        description="pin every rank to cores of its own: those near its GPU, or an equal share of the node's on the "
        "CPU",
    )
    master_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="port at which ranks that are started on this machine meet; 0: pick a free one"
    )
    machine_file: str | None = Field(
        None,
        description="file with the machine's environment variables (those of NCCL, for example) and its binding, as "
        "in configs/systems/; a variable that is already set stays as it is",
    )
    preflight: bool = Field(
        False,
        description="check devices, data, clocks and the network of all ranks before the clock starts "
        "(docs/cluster.md)",
    )

    @property
    def node_size(self) -> int:
        """Number of ranks on one node."""
        return self.ranks_per_node or self.world_size

    @property
    def num_nodes(self) -> int:
        """Number of nodes that the ranks fill."""
        return self.world_size // self.node_size
