"""Energy of one node while a run goes: GPUs by NVML, CPUs and memory by RAPL, as far as they can be read. No estimates.

NVML needs the package nvidia-ml-py and GPUs from Volta on. RAPL's files can usually be read by root only; its counters
wrap around within minutes to an hour, and a second wrap between two ticks would go unseen: call `tick()` at every log line.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

RAPL = Path("/sys/class/powercap")
_NEVER_COUNTED = "fans, network, storage and power supplies"


@dataclass(frozen=True)
class EnergyReading:
    """Joules since `start()`; None is what could not be read. `source` says what was counted and what was not."""

    joules_gpu: float | None
    joules_cpu: float | None
    source: str


class EnergyMeter:
    """Counts from `start()` to `stop()`. One process of a node has one."""

    def __init__(self, rapl: str | Path = RAPL, nvml: Any | None = None) -> None:
        """`rapl` is the folder of the zones, `nvml` a module with pynvml's functions (default: pynvml, if it is there)."""
        self._gpus, self._cpus = _Gpus(nvml), _Rapl(Path(rapl))
        self._stopped: EnergyReading | None = None

    def start(self) -> None:
        """Count from here, anew if it was counting."""
        self._stopped = None
        self._gpus.start()
        self._cpus.start()

    def tick(self) -> EnergyReading:
        """What was counted so far. A few file reads and one NVML call per GPU; asks no GPU to finish its work."""
        if self._stopped is not None:
            return self._stopped
        gpu, cpu = self._gpus.joules(), self._cpus.joules()
        counted = [name for name in (self._gpus.counted, self._cpus.counted) if name]
        missing = [reason for reason in (self._gpus.missing, self._cpus.missing) if reason]
        source = f"{' + '.join(counted) or 'none'}; not counted: {', '.join([*missing, _NEVER_COUNTED])}"
        return EnergyReading(gpu, cpu, source)

    def stop(self) -> EnergyReading:
        """The end: what was counted since `start()`. Later calls give the same."""
        self._stopped = self.tick()
        self._gpus.close()
        return self._stopped


# ---- GPUs -----------------------------------------------------------------------------------------------------------


class _Gpus:
    """NVML's counters, in mJ since the driver was loaded, of the devices that CUDA may use here."""

    def __init__(self, nvml: Any | None) -> None:
        self._nvml: Any = nvml if nvml is not None else _pynvml()  # None: nothing can be read, and nothing is opened
        self._handles: list[Any] = []
        self._first: list[int] = []
        self._open = False
        self.counted, self.missing = "", "GPUs (nvidia-ml-py is not installed)"

    def start(self) -> None:
        if self._nvml is None:
            return
        try:
            if not self._open:
                self._nvml.nvmlInit()
                self._open = True
            self._handles = _visible(self._nvml)
            self._first = self._read()
        except self._nvml.NVMLError as error:
            self._give_up(error)
            return
        plural = "" if len(self._handles) == 1 else "s"
        self.counted = f"NVML ({len(self._handles)} GPU{plural})" if self._handles else ""
        self.missing = "" if self._handles else "GPUs (none is visible)"

    def joules(self) -> float | None:
        if not self.counted:
            return None
        try:
            return (sum(self._read()) - sum(self._first)) / 1e3
        except self._nvml.NVMLError as error:
            self._give_up(error)
            return None

    def close(self) -> None:
        if self._open:
            self._open = False
            with suppress(self._nvml.NVMLError):  # what was read stays true
                self._nvml.nvmlShutdown()

    def _read(self) -> list[int]:
        return [int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in self._handles]

    def _give_up(self, error: Exception) -> None:
        self.counted, self.missing = "", f"GPUs (NVML: {error})"


def _pynvml() -> ModuleType | None:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _visible(nvml: Any) -> list[Any]:
    """Handles of the devices in CUDA_VISIBLE_DEVICES (indices or UUIDs), or of all that NVML shows.

    NVML counts by PCI bus; CUDA does so on nodes of equal GPUs, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    handles = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name == "-1":  # as CUDA reads it: nothing after it counts
            break
        by_index = name.isdecimal()
        handles.append(nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else nvml.nvmlDeviceGetHandleByUUID(name))
    return handles


# ---- CPUs -----------------------------------------------------------------------------------------------------------


class _Rapl:
    """The zones of processor packages and of memory beside them. Cores lie inside packages, and psys holds both."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._zones: dict[Path, tuple[int, int]] = {}  # last value and the range after which it wraps, in microjoules
        self._total = 0
        self.counted, self.missing = "", "CPUs and memory"

    def start(self) -> None:
        self._zones, self._total, self.counted = {}, 0, ""
        names = {zone: _read_text(zone / "name") for zone in sorted(self._root.glob("intel-rapl:*"))}
        wanted = [zone for zone, name in names.items() if name is not None and name.startswith(("package", "dram"))]
        if not wanted:
            self.missing = "CPUs and memory (no RAPL here)"
            return
        try:
            for zone in wanted:
                limit = int((zone / "max_energy_range_uj").read_text(encoding="ascii"))
                self._zones[zone] = (int((zone / "energy_uj").read_text(encoding="ascii")), limit)
        except (OSError, ValueError) as error:
            self._give_up(error)
            return
        memory = any(str(names[zone]).startswith("dram") for zone in wanted)
        packages = sum(str(names[zone]).startswith("package") for zone in wanted)
        plural = "" if packages == 1 else "s"
        self.counted = f"RAPL ({packages} CPU package{plural}{' and memory' if memory else ''})"
        self.missing = "" if memory else "memory"

    def joules(self) -> float | None:
        if not self.counted:
            return None
        try:
            for zone, (last, limit) in self._zones.items():
                now = int((zone / "energy_uj").read_text(encoding="ascii"))
                self._total += now - last if now >= last else now - last + limit
                self._zones[zone] = (now, limit)
        except (OSError, ValueError) as error:
            self._give_up(error)
            return None
        return self._total / 1e6

    def _give_up(self, error: Exception) -> None:
        why = "readable by root only" if isinstance(error, PermissionError) else str(error)
        self.counted, self.missing = "", f"CPUs and memory (RAPL: {why})"


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
