"""MPI launchers such as mpirun: what they tell a process. Without it every process would start a whole run of its own."""

from __future__ import annotations

import os

from bert_fast.errors import UserError
from bert_fast.launch.slurm import is_launched

# Of Open MPI, MVAPICH, and the process managers of MPICH and Intel MPI: rank, number of ranks, both on this host
_FAMILIES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def adopt_mpi() -> None:
    """Translate the variables of an MPI launcher into torch's, where it has started more than this process alone.

    Raises:
        UserError: a variable is not a number, or one that ranks need is missing.
    """
    variables = os.environ
    family = next((each for each in _FAMILIES if each[0] in variables and each[1] in variables), None)
    if is_launched() or family is None:
        return
    rank, size = (_number(name) for name in family[:2])
    if size < 2 or _is_sruns(family, rank, size):
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", family[2]) if name not in variables]
    if missing:
        raise UserError(
            f"started by an MPI launcher as rank {rank} of {size} ({family[0]}), but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; pass every rank the first host's address and a free port (with "
            "Open MPI: mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500), or start with torchrun, srun, or "
            "run_pretraining.py alone (docs/running.md)"
        )
    local = _number(family[2])
    variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_RANK"] = str(rank), str(size), str(local)
    if family[3] in variables:
        variables.setdefault("LOCAL_WORLD_SIZE", str(_number(family[3])))


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise UserError(f"{name}={text} is not a number; it is set by mpirun: unset it, or start the ranks anew")
    return int(text)


def _is_sruns(family: tuple[str, ...], rank: int, size: int) -> bool:
    """Whether srun has set these (--mpi=pmi2), so that Slurm's own variables say all."""
    variables = os.environ
    same = variables.get("SLURM_PROCID") == str(rank) and variables.get("SLURM_STEP_NUM_TASKS") == str(size)
    return same and family[2] not in variables
