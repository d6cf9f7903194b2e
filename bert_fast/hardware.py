"""What the system tells of this machine's processors and memory. Without torch."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def cpu_info(path: Path = _CPU_INFO) -> list[dict[str, str]]:
    """What Linux says of each logical processor (`model name`, `flags`, ...); empty where it says nothing."""
    try:
        blocks = path.read_text(encoding="utf-8").split("\n\n")
    except OSError:
        return []
    pairs = ([line.partition(":") for line in block.splitlines()] for block in blocks)
    processors = [{name.strip(): value.strip() for name, _, value in block} for block in pairs]
    return [processor for processor in processors if "processor" in processor]


def cpu_name(path: Path = _CPU_INFO) -> str:
    """The CPU's model name, as far as the system tells."""
    names = (processor["model name"] for processor in cpu_info(path) if "model name" in processor)
    return next(names, platform.processor() or platform.machine())


def cpu_has_bf16(path: Path = _CPU_INFO) -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16 or AMX)."""
    flags = {flag for processor in cpu_info(path) for flag in processor.get("flags", "").split()}
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16"})


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def machine_memory(groups: Path = _CONTROL_GROUPS) -> int:
    """Bytes of memory that this machine, or the container around us, has."""
    memory = physical_memory()
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (groups / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            memory = min(memory, int(text))
    return memory
