"""Processors and memory from made-up files of the kernel."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from bert_fast.hardware import cpu_has_bf16, cpu_info, cpu_name, machine_memory, physical_memory

PROCESSOR = "processor\t: {}\nmodel name\t: Some CPU @ 2:1 GHz\nphysical id\t: 0\nflags\t\t: fpu avx512f {}\n\n"


def write(folder: Path, *flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text("".join(PROCESSOR.format(number, flag) for number, flag in enumerate(flags)), encoding="utf-8")
    return path


def test_processors_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "", "")
    assert [processor["processor"] for processor in cpu_info(path)] == ["0", "1"]
    assert cpu_info(path)[0]["physical id"] == "0"
    assert cpu_name(path) == "Some CPU @ 2:1 GHz"


@pytest.mark.parametrize(
    ("flags", "has"), [("avx512_bf16", True), ("amx_bf16 amx_tile", True), ("avx512_bf16x", False), ("", False)]
)
def test_bf16_in_hardware(tmp_path: Path, flags: str, has: bool) -> None:
    assert cpu_has_bf16(write(tmp_path, flags, flags)) is has


def test_a_system_without_the_file(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    assert cpu_info(path) == []
    assert cpu_name(path) == (platform.processor() or platform.machine())
    assert not cpu_has_bf16(path)


def test_a_container_has_less_than_its_machine(tmp_path: Path) -> None:
    assert machine_memory(tmp_path) == physical_memory() > 1 << 28
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory(tmp_path) == physical_memory()
    (tmp_path / "memory.max").write_text("1048576\n")
    assert machine_memory(tmp_path) == 1 << 20
