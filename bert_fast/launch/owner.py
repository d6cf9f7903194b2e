"""Whose a run's folder is while the run goes: two runs in one folder would destroy each other's checkpoints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from bert_fast.files import write_json

_NAME = "running.json"


def claim(folder: Path) -> None:
    """Note that this process runs in `folder`."""
    write_json(folder / _NAME, {
        "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
    })  # fmt: skip


def release(folder: Path) -> None:
    """The run has ended."""
    (folder / _NAME).unlink(missing_ok=True)


def owner_of(folder: Path) -> str | None:
    """The living run in `folder`, in words; None if there is none, or nobody can tell.

    On this host its process is looked up; on another one its Slurm job, if that is not this one.
    """
    try:
        note: dict[str, Any] = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        host, pid, started, job = (note[name] for name in ("host", "pid", "started", "job"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if host == socket.gethostname():
        return f"process {pid} on this host" if pid != os.getpid() and started == _started(pid) is not None else None
    if job is None or job == os.environ.get("SLURM_JOB_ID"):
        return None
    return f"job {job} on {host}" if _job_runs(job) else None


def _started(pid: int) -> str | None:
    """When a living process was started, in the kernel's ticks; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _job_runs(job: str) -> bool:
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format=%T"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() in ("RUNNING", "COMPLETING", "SUSPENDED")
