"""Checkpoints: whole or absent, and exact to resume from.

checkpoints/step-00000120/state.pt       model, optimizer, loss scale, progress, clock (rank 0)
                          rank-0.pt      random state of a rank, and what its wire format keeps
                          complete.json  written last by rank 0: without it the folder does not count
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.errors import UserError
from bert_fast.files import write_atomically, write_json
from bert_fast.train.environment import Environment


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], rank_state: dict[str, Any], environment: Environment, keep: int,
    key: dict[str, Any],
) -> None:  # fmt: skip
    """Write the checkpoint of `step`; a collective. Older ones beyond `keep` are removed once it is complete.

    `state` is rank 0's, `rank_state` every rank's own.
    `key` is what a resumed run must share with this one (model shape, data, batch).
    """
    target = folder / f"step-{step:08d}"
    if environment.is_main and (target / "complete.json").exists():
        (target / "complete.json").unlink()
    write_atomically(target / f"rank-{environment.rank}.pt", _to_bytes({**_random_state(environment), **rank_state}))
    if environment.is_main:
        write_atomically(target / "state.pt", _to_bytes(state))
    if dist.is_initialized():
        dist.barrier()
    if environment.is_main:
        write_json(target / "complete.json", {"step": step, "world_size": environment.world_size, "key": key})
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    found = _complete(folder)
    return found[-1] if found else None


def load_checkpoint(path: Path, environment: Environment, key: dict[str, Any]) -> dict[str, Any]:
    """The state in a checkpoint, with `world_size`, the number of ranks that wrote it.

    If as many read it, this rank's random state is restored and its `rank_state` is in the result.

    Raises:
        UserError: the checkpoint is of another model, data set or global batch; the differing entry is named.
    """
    try:
        description = json.loads((path / "complete.json").read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"checkpoint {path} is damaged (complete.json is not JSON); remove it") from None
    for name, value in key.items():
        if description["key"].get(name) != value:
            raise UserError(
                f"checkpoint {path} does not fit this config: {name} was {description['key'].get(name)!r} and is now "
                f"{value!r}; resume with the run's own config or start a new run"
            )
    own_state = description["world_size"] == environment.world_size
    try:
        state: dict[str, Any] = torch.load(path / "state.pt", map_location=environment.device, weights_only=True)
        own = torch.load(path / f"rank-{environment.rank}.pt", weights_only=True) if own_state else None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"checkpoint {path} is damaged ({why}); remove it") from None
    state["world_size"] = description["world_size"]
    if own is None:
        return state
    torch.set_rng_state(own.pop("cpu"))
    if environment.device.type == "cuda":
        torch.cuda.set_rng_state(own.pop("cuda"), environment.device)
    state["rank_state"] = own
    return state


def _complete(folder: Path) -> list[Path]:
    return sorted(p.parent for p in folder.glob("step-*/complete.json"))


def _random_state(environment: Environment) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if environment.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(environment.device)
    return state


def _to_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
