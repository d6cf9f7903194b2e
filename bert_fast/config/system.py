"""Ranks, devices and threads."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bert_fast.config.section import Ranks, Section


class SystemConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one, else CPU")
    world_size: Ranks = Field(1, description="number of ranks of the whole run")
    ranks_per_node: Ranks | None = Field(None, description="ranks on one node; world_size if unset")
    threads_per_rank: Annotated[int, Field(gt=0, le=4096)] | None = Field(
        None, description="CPU threads of a rank; unset: cores of the node / ranks of the node on CPU, 4 on CUDA"
    )
    bind_cores: bool = Field(
        True,
        description="pin every local rank to cores of its own: near its GPU, or an equal share of the node's on CPU",
    )
    master_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        0, description="rendezvous port for locally started ranks; 0 picks a free one"
    )

    machine_file: str | None = Field(
        None,
        description="file of the machine's environment and binding (configs/systems/): NCCL variables as data. A variable "
        "that is set already stays as it is",
    )
    preflight: bool = Field(
        False, description="check devices, data, clocks and the network of all ranks before the clock (docs/cluster.md)"
    )

    @property
    def node_size(self) -> int:
        return self.ranks_per_node or self.world_size
