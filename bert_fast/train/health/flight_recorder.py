"""torch's NCCL flight recorder: which collectives every rank had started when one did not end."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

from bert_fast.run_folder import FLIGHT

_ENTRIES = 2000  # collectives each rank remembers
_PREFIX = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


def record_flight(folder: Path) -> None:
    """Switch the recorder on, before the process group is made; harmless without NCCL. What is set already stays."""
    old_name = tuple(map(int, version("torch").split(".")[:2])) < (2, 9)
    defaults = {
        "TORCH_NCCL_TRACE_BUFFER_SIZE" if old_name else "TORCH_FR_BUFFER_SIZE": str(_ENTRIES),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        _PREFIX: str(folder.absolute() / FLIGHT / "nccl_trace_rank_"),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def flight_record() -> str:
    """Write this rank's record now. Returns where the records are, as the end of a message; empty without NCCL."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    prefix = os.environ.get(_PREFIX, "")
    path = Path(prefix + os.environ.get("RANK", "0"))
    with contextlib.suppress(Exception):  # an explanation must not hide what it explains
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())
    return f"; NCCL's flight records are {prefix}* (read them with torch's fr_trace)"
