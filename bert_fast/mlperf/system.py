"""The description of a system that a submission carries: what the machine says of itself, completed by a user's YAML."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from bert_fast.errors import UserError
from bert_fast.hardware import cpu_info, physical_memory

STATUSES = ("Available on-premise", "Available cloud", "Research, Development, or Internal (RDI)", "Preview")
# What MLPerf's system checker wants, in its order. `None`: only the user knows it.
FIELDS: dict[str, str | None] = {
    "submitter": None,
    "division": None,
    "status": None,
    "system_name": None,
    "number_of_nodes": None,
    "host_processors_per_node": "1",
    "host_processor_model_name": "",
    "host_processor_core_count": "",
    "host_processor_vcpu_count": "",
    "host_processor_frequency": "",
    "host_processor_caches": "",
    "host_processor_interconnect": "",
    "host_memory_capacity": "",
    "host_storage_type": "",
    "host_storage_capacity": "",
    "host_networking": "",
    "host_networking_topology": None,
    "host_memory_configuration": "",
    "accelerators_per_node": "0",
    "accelerator_model_name": "",
    "accelerator_host_interconnect": "",
    "accelerator_frequency": "",
    "accelerator_on-chip_memories": "",
    "accelerator_memory_configuration": "",
    "accelerator_memory_capacity": "",
    "accelerator_interconnect": "",
    "accelerator_interconnect_topology": "",
    "cooling": "",
    "hw_notes": "",
    "framework": "",
    "other_software_stack": "",
    "operating_system": "",
    "sw_notes": "",
}


def collect_system() -> dict[str, str]:
    """The fields that can be read on this machine, a node of the system. Needs no torch, so that any node can be asked."""
    cpu = cpu_info()
    sockets = len({each.get("physical id", "0") for each in cpu}) or 1
    cores = len({(each.get("physical id"), each.get("core id")) for each in cpu}) or len(cpu)
    storage = shutil.disk_usage(Path.cwd())
    fields = {
        "host_processors_per_node": str(sockets),
        "host_processor_model_name": cpu[0].get("model name", platform.processor()) if cpu else platform.processor(),
        "host_processor_core_count": str(max(1, cores // sockets)),
        "host_processor_vcpu_count": str(os.cpu_count() or 1),
        "host_processor_frequency": f"{cpu[0]['cpu MHz']} MHz" if cpu and "cpu MHz" in cpu[0] else "",
        "host_processor_caches": cpu[0].get("cache size", "") if cpu else "",
        "host_memory_capacity": f"{physical_memory() / 2**30:.0f} GiB",
        "host_storage_type": _storage_type(),
        "host_storage_capacity": f"{storage.total / 2**40:.1f} TiB",
        "host_networking": ", ".join(_networks()),
        "framework": f"PyTorch {_version('torch')}",
        "other_software_stack": ", ".join(_software()),
        "operating_system": _read("/etc/os-release", lambda text: text.split('PRETTY_NAME="')[1].split('"')[0])
        or platform.platform(),
    }
    return {**fields, **_accelerators()}


def complete_system(collected: dict[str, str], given: dict[str, Any], division: str, num_nodes: int) -> dict[str, str]:
    """The description: what the user has given over what the machine says, all fields present, values as text.

    Raises:
        UserError: unknown fields, fields that only the user knows are missing, or a status that the rules do not have.
    """
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise UserError(f"system description: unknown field {unknown[0]}; known: {', '.join(FIELDS)}")
    merged: dict[str, Any] = {**FIELDS, **collected, "division": division, "number_of_nodes": num_nodes, **given}
    missing = [name for name, value in FIELDS.items() if value is None and not str(merged[name] or "").strip()]
    if missing:
        raise UserError(
            f"system description: missing {', '.join(missing)}; write them in the YAML (--describe makes one to fill in)"
        )
    if merged["status"] not in STATUSES:
        raise UserError(f"system description: status '{merged['status']}' must be one of: {'; '.join(STATUSES)}")
    for name in ("number_of_nodes", "host_processors_per_node", "accelerators_per_node"):
        if not str(merged[name]).isdigit():
            raise UserError(f"system description: {name} '{merged[name]}' must be a whole number")
    if merged["division"] != division:
        raise UserError(f"system description: division '{merged['division']}' and the logs say '{division}'")
    return {name: str(merged[name]) for name in FIELDS}


def read_given_fields(path: str | Path) -> dict[str, Any]:
    """The user's YAML of fields. Raises UserError for a file that holds something else."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make one with --describe {path}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold fields, one `name: value` per line")
    return {name: value for name, value in values.items() if value is not None}


def template(collected: dict[str, str]) -> str:
    """A YAML to fill in: what only the user knows on top, what was found below, to be corrected."""
    head = "# What only you know. status is one of: " + "; ".join(STATUSES) + "\n"
    wanted = [name for name, value in FIELDS.items() if value is None and name not in ("division", "number_of_nodes")]
    blanks = "".join(f"{name}:\n" for name in wanted)
    rest = {name: collected.get(name, "") for name, value in FIELDS.items() if value is not None}
    return f"{head}{blanks}# Found on this machine; correct what is wrong, fill in what is empty.\n" + yaml.safe_dump(
        rest, sort_keys=False, allow_unicode=True, width=120
    )


# ---- what the machine says ------------------------------------------------------------------------------------------


def _read(path: str | Path, of: Callable[[str], str] = str.strip) -> str:
    try:
        return of(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError):
        return ""


def _storage_type() -> str:
    names = sorted(path.name for path in Path("/sys/block").glob("*")) if Path("/sys/block").is_dir() else []
    if any(name.startswith("nvme") for name in names):
        return "NVMe SSD"
    rotational = {_read(f"/sys/block/{name}/queue/rotational") for name in names if name.startswith(("sd", "vd"))}
    return {"0": "SSD", "1": "HDD"}.get(next(iter(sorted(rotational)), ""), "")


def _networks() -> Iterable[str]:
    for path in sorted(Path("/sys/class/infiniband").glob("*/ports/*/rate")):
        yield f"{path.parts[-4]}: {_read(path)}"
    for path in sorted(Path("/sys/class/net").glob("*/speed")):
        speed = _read(path)
        if speed.isdigit():
            yield f"{path.parts[-2]}: {int(speed) / 1000:g} Gb/s Ethernet"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _software() -> Iterable[str]:
    yield f"Python {platform.python_version()}"
    yield f"bert_fast {_version('bert_fast')}"
    for label, package in (
        ("CUDA", "nvidia-cuda-runtime-cu12"),
        ("NCCL", "nvidia-nccl-cu12"),
        ("flash-attn", "flash-attn"),
    ):
        if _version(package) != "unknown":
            yield f"{label} {_version(package)}"


def _accelerators() -> dict[str, str]:
    """What nvidia-smi says of this node; zero accelerators where it does not run."""
    query = ("name", "memory.total", "clocks.max.sm", "driver_version")
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError):
        rows = []
    if not rows:
        return {"accelerators_per_node": "0", "accelerator_model_name": "N/A"}
    name, memory, clock, _ = rows[0]
    return {
        "accelerators_per_node": str(len(rows)),
        "accelerator_model_name": name,
        "accelerator_memory_capacity": memory,
        "accelerator_frequency": clock,
    }
