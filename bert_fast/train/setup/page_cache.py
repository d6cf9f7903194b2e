"""The operating system's caches, which MLPerf asks to be dropped before a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bert_fast.train.collectives import gather_floats
from bert_fast.train.environment import Environment


def clear_caches(environment: Environment, log: Callable[[str], None]) -> bool:
    """Drop each node's page cache. Returns whether all were; logs it if not. A collective."""
    failed = 0
    if environment.local_rank == 0:
        try:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")
        except OSError:
            failed = 1
    nodes = int(gather_floats([float(failed)], environment.device).sum())
    if nodes:
        log(
            f"warning: caches were not cleared on {nodes} node(s) (not permitted); cache_clear is logged false. Run as root, "
            "or let the job's prologue write 3 to /proc/sys/vm/drop_caches"
        )
    return nodes == 0
