"""Restarts after a failure and spare nodes."""

from __future__ import annotations

from pydantic import Field

from bert_fast.config.section import NonNegativeInt, PositiveInt, Section


class RecoveryConfig(Section):
    """What happens after a failure: docs/cluster.md."""

    max_restarts: NonNegativeInt = Field(
        0, description="how often a run that lost a rank is started again from its last checkpoint by its launcher"
    )
    spare_nodes: NonNegativeInt = Field(
        0,
        description="Slurm: nodes of the allocation kept back to take the place of failed ones (sbatch --nodes=MIN-MAX)",
    )
    min_nodes: PositiveInt | None = Field(
        None,
        description="Slurm: go on with fewer nodes, down to this many, where no spare is left; the global batch stays. Unset: "
        "never fewer",
    )
