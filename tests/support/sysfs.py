"""Made-up sysfs trees: what the kernel would tell of a machine."""

from __future__ import annotations

from pathlib import Path


class Sysfs:
    """Writes the parts of a sysfs tree that the reader looks at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.node_cpus: dict[int, str] = {}

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def link(self, path: str, target: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.symlink_to(self.root / target)

    def nodes(self, cpulists: list[str], distances: list[str]) -> None:
        self.node_cpus = dict(enumerate(cpulists))
        for number, cpulist in self.node_cpus.items():
            self.write(f"devices/system/node/node{number}/cpulist", cpulist)
            self.write(f"devices/system/node/node{number}/distance", distances[number])
        self.write("devices/system/node/online", f"0-{len(cpulists) - 1}")

    def cpus(self, cores: int, threads: int = 2) -> None:
        for cpu in range(cores * threads):
            siblings = ",".join(str(cpu % cores + thread * cores) for thread in range(threads))
            self.write(f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
        self.write("devices/system/cpu/cpufreq/boost", "1")

    def pci(self, path: str, numa: int, vendor: str = "0x15b3", kind: str = "0x020700") -> None:
        device = f"devices/{path}"
        for name, text in {"vendor": vendor, "class": kind, "numa_node": str(numa)}.items():
            self.write(f"{device}/{name}", text)
        self.write(f"{device}/local_cpulist", self.node_cpus.get(numa, ""))
        self.link(f"bus/pci/devices/{path.rsplit('/', 1)[1]}", device)

    def gpu(self, path: str, numa: int) -> None:
        self.pci(path, numa, "0x10de", "0x030200")

    def infiniband(self, name: str, path: str, numa: int, state: str = "4: ACTIVE") -> None:
        self.pci(path, numa)
        home = f"devices/{path}/infiniband/{name}"
        self.write(f"{home}/ports/1/state", state)
        self.link(f"{home}/device", f"devices/{path}")
        self.link(f"class/infiniband/{name}", home)

    def ethernet(self, name: str, path: str | None, numa: int = 0, state: str = "up") -> None:
        home = f"devices/{path}/net/{name}" if path else f"devices/virtual/net/{name}"
        self.write(f"{home}/operstate", state)
        if path:
            self.pci(path, numa, kind="0x020000")
            self.link(f"{home}/device", f"devices/{path}")
        self.link(f"class/net/{name}", home)
