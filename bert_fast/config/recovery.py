"""Restarts after a failure and spare nodes."""

from __future__ import annotations

from pydantic import Field

from bert_fast.config.section import NonNegativeInt, PositiveInt, Section


class RecoveryConfig(Section):
    """What the launchers do after a failure (`bert_fast.launch`); docs/cluster.md explains it."""

    max_restarts: NonNegativeInt = Field(
        0,
        description="number of times that the launcher starts a run again, from its last checkpoint, after it has "
        "lost a rank",
    )
    spare_nodes: NonNegativeInt = Field(
        0,
        description="Slurm: number of nodes that are allocated in addition, to take the place of failed ones (sbatch "
        "--nodes=MIN-MAX)",
    )
    min_nodes: PositiveInt | None = Field(
        None,
        description="Slurm: where no spare node is left, go on with fewer nodes, but at least this many; the global "
        "batch stays the same. If unset, the run needs all nodes",
    )
