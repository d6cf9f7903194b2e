"""Who am I: rank, world, device, precision, threads. The one place that reads launcher variables."""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from bert_fast.allocator import keep_freed_memory, return_freed_memory
from bert_fast.config import Config
from bert_fast.config.choices import ENGINES
from bert_fast.errors import LostRankError, UserError
from bert_fast.hardware import cpu_has_bf16, cpu_name
from bert_fast.launch.binding import bind, is_bound_by_slurm
from bert_fast.launch.machine_file import MachineFile, load_machine_file, nic_variables, set_variables
from bert_fast.launch.rendezvous_check import check_rendezvous_address
from bert_fast.launch.topology import format_cpulist, read_topology
from bert_fast.train.rendezvous import meet


@dataclass(frozen=True)
class Environment:
    """A rank's place in the run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    binding: str = ""  # which cores, and why

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def autocast(self) -> bool:
        return self.dtype != torch.float32


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The autocast format; fp32 means no autocast. Raises UserError for fp16 and fp8 on a CPU."""
    if precision == "auto":
        has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        precision = "bf16" if has_bf16 else "fp32"
    if precision in ("fp16", "fp8") and device.type == "cpu":
        raise UserError(f"train.precision={precision} needs CUDA; on CPU set train.precision=bf16 or fp32")
    return {"fp8": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device of a local rank. Raises UserError if CUDA is asked for and absent, or has too few devices."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("system.device=cuda: this machine has no usable CUDA device; set system.device=cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no device: this node has {torch.cuda.device_count()}; "
            "set system.ranks_per_node to that"
        )
    return torch.device("cuda", local_rank)


def join(config: Config) -> Environment:
    """Find this process's rank, set threads and device, join the process group.

    Raises:
        UserError: the launcher's world size is not the config's, or the rendezvous port is taken.
        LostRankError: not all ranks have come to the rendezvous in time.
    """
    variables = os.environ
    rank, world = int(variables.get("RANK", 0)), int(variables.get("WORLD_SIZE", 1))
    local_rank = int(variables.get("LOCAL_RANK", 0))
    if world != config.system.world_size:
        raise UserError(
            f"the launcher started {world} ranks and system.world_size={config.system.world_size}; start as many or set "
            f"system.world_size={world} (and batch.global_batch_size to match)"
        )
    machine = _use_machine_file(config)
    check_rendezvous_address()
    device = pick_device(config.system.device, local_rank)
    binding = _bind(config, machine, device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif config.memory.budget_gib is not None:
        return_freed_memory()  # so that what is planned is what is resident
    else:
        keep_freed_memory()
    if config.train.deterministic and device.type == "cuda":  # cuBLAS reads it when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if needs_process_group(config):
        _init_process_group(config, device, rank, world)
    torch.use_deterministic_algorithms(config.train.deterministic)
    return Environment(rank, local_rank, world, device, pick_dtype(config.train.precision, device), binding)


def needs_process_group(config: Config) -> bool:
    """Whether collectives are really called. One rank needs none, but a backend that is asked for by name is used."""
    communication = config.communication
    return config.system.world_size > 1 or ENGINES[communication.engine].needs_group or communication.backend != "auto"


def _init_process_group(config: Config, device: torch.device, rank: int, world: int) -> None:
    backend: str = config.communication.backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
        if config.memory.offload_weights and device.type == "cuda":  # their parts are reduced on the host too
            backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(seconds=config.communication.timeout_s)
    store = meet(rank, world, config.communication.timeout_s, lambda line: print(line, flush=True))
    try:
        device_id = device if "nccl" in backend else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device_id)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        text = str(error).splitlines()[0]
        raise LostRankError(f"ranks could not meet at {os.environ['MASTER_ADDR']}: {text[:200]}") from None


def _use_machine_file(config: Config) -> MachineFile | None:
    """Take the machine's variables from `system.machine_file`, before CUDA or NCCL read theirs."""
    if config.system.machine_file is None:
        return None
    machine = load_machine_file(config.system.machine_file)
    if machine.ranks_per_node is not None and machine.ranks_per_node != config.system.node_size:
        raise UserError(
            f"system.machine_file={config.system.machine_file} is for {machine.ranks_per_node} ranks on a node and "
            f"system.ranks_per_node is {config.system.node_size}; change one"
        )
    set_variables(machine, os.environ)
    return machine


def _bind(config: Config, machine: MachineFile | None, device: torch.device, local_rank: int) -> str:
    """Pin this rank to its cores (those near its GPU) and set its number of threads. Returns what was done, for the log."""
    if not hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(config.system.threads_per_rank or 1)
        return "not bound: this system has no affinity of processes"
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.system.node_size))
    allowed = os.sched_getaffinity(0)
    if is_bound_by_slurm():  # these cores are this rank's alone already
        torch.set_num_threads(config.system.threads_per_rank or min(len(allowed), 4 if device.type == "cuda" else 1024))
        return f"bound by srun to CPUs {format_cpulist(allowed)}; {torch.get_num_threads()} threads"
    kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    binding = bind(read_topology(), local_rank, ranks, allowed, kind, _visible_devices() if kind == "cuda" else None)
    own = max(1, binding.num_cores)
    threads = config.system.threads_per_rank or (own if kind == "cpu" else min(4, own))
    torch.set_num_threads(threads)
    wanted = config.system.bind_cores and (machine is None or machine.bind_cpus)
    enough = ranks > 1 and len(allowed) >= ranks * threads if kind == "cpu" else len(binding.cpus) > 0
    if not (wanted and enough):
        return f"not bound; {threads} threads"
    os.sched_setaffinity(0, binding.cpus)
    if machine is not None and machine.bind_nics and binding.nic:
        nic = next(nic for nic in read_topology().nics if nic.name == binding.nic)
        os.environ.update({k: v for k, v in nic_variables(nic).items() if k not in os.environ})
    return f"{binding.why}; {threads} threads"


def _visible_devices() -> str | None:
    """The GPUs of this process by PCI address, which also holds where a container numbers them anew."""
    addresses = []
    for index in range(torch.cuda.device_count()):
        device: Any = torch.cuda.get_device_properties(index)
        if not hasattr(device, "pci_bus_id"):  # older torch
            return os.environ.get("CUDA_VISIBLE_DEVICES")
        addresses.append(f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0")
    return ",".join(addresses)


def seed_ranks(seed: int, environment: Environment) -> None:
    """Each rank its own dropout. Torch takes 64 bits, so large seeds wrap around."""
    torch.manual_seed((seed * 100_003 + environment.rank) % 2**64)


def describe(environment: Environment) -> dict[str, object]:
    """Versions and hardware for records and reports."""
    cuda = environment.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(environment.device) if cuda else cpu_name(),
        "device_type": environment.device.type,
        "precision": str(environment.dtype).removeprefix("torch."),
        "world_size": environment.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "binding": environment.binding,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }
