"""What Slurm tells a process through its environment."""

from __future__ import annotations

import os

from bert_fast.errors import UserError


def is_launched() -> bool:
    """Whether a launcher has given this process its rank (ours, torchrun, or Slurm through `adopt_slurm`)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def adopt_slurm() -> None:
    """Translate Slurm's variables of a task into torch's. Only where srun started more than this process alone."""
    variables = os.environ
    if is_launched() or "SLURM_PROCID" not in variables or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    missing = [name for name in ("SLURM_LOCALID", "SLURM_STEP_NUM_TASKS") if name not in variables]
    if missing or "MASTER_ADDR" not in variables or "MASTER_PORT" not in variables:
        raise UserError(
            "started by srun, but MASTER_ADDR and MASTER_PORT are not set: export them in the batch script "
            "(docs/running.md shows how)"
        )
    variables["RANK"], variables["WORLD_SIZE"] = variables["SLURM_PROCID"], variables["SLURM_STEP_NUM_TASKS"]
    variables["LOCAL_RANK"] = variables["SLURM_LOCALID"]
