"""Slurm: what it tells a process, the nodes of an allocation, the srun commands that start ranks on them."""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.launch.rendezvous_check import addresses_of

Style = Literal["srun", "torchrun"]
STYLES: tuple[Style, ...] = ("srun", "torchrun")
SHUTDOWN_S = 110  # torchrun's patience with ranks that save; the batch scripts ask for the signal 120 s before the end
_PROBES_AT_ONCE = 32


def is_launched() -> bool:
    """Whether a launcher has given this process its rank (ours, torchrun, or Slurm through `adopt_slurm`)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def adopt_slurm() -> None:
    """Translate Slurm's variables of a task into torch's. Only where srun started more than this process alone."""
    variables = os.environ
    if is_launched() or "SLURM_PROCID" not in variables or int(variables.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    missing = [name for name in ("SLURM_LOCALID", "SLURM_STEP_NUM_TASKS") if name not in variables]
    if missing or "MASTER_ADDR" not in variables or "MASTER_PORT" not in variables:
        raise UserError(
            "started by srun, but MASTER_ADDR and MASTER_PORT are not set: export them in the batch script "
            "(docs/cluster.md, Ranks by hand, shows how), or start them with scripts/submit_slurm.py"
        )
    variables["RANK"], variables["WORLD_SIZE"] = variables["SLURM_PROCID"], variables["SLURM_STEP_NUM_TASKS"]
    variables["LOCAL_RANK"] = variables["SLURM_LOCALID"]
    per_node = variables.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")[0].split("(")[0]  # 8(x16): the first node's
    if per_node.isdigit():
        variables.setdefault("LOCAL_WORLD_SIZE", per_node)


# ---- the allocation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A job as its batch script sees it."""

    id: int
    node_list: str  # as Slurm abbreviates it: node[1-4]
    num_restarts: int  # how often Slurm has requeued it
    array_task: str | None = None  # ARRAY_TASK, if it is a task of an array

    @property
    def name(self) -> str:
        """What scontrol calls it. The id of an array's last task is the array's own, and would mean all of its tasks."""
        return self.array_task or str(self.id)


def read_job(variables: Mapping[str, str]) -> Job:
    """The job that this process is the batch script of. Raises UserError if a variable is missing."""
    missing = [name for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if not variables.get(name)]
    if missing:
        raise UserError(
            f"not inside a Slurm job: {', '.join(missing)} not set; start it with sbatch slurm/pretrain.sbatch CONFIG, or "
            "run_pretraining.py without Slurm"
        )
    try:
        num_restarts = int(variables.get("SLURM_RESTART_COUNT") or 0)
        array, task = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
        array_task = f"{array}_{task}" if array and task else None
        return Job(int(variables["SLURM_JOB_ID"]), variables["SLURM_JOB_NODELIST"], num_restarts, array_task)
    except ValueError as error:
        raise UserError(f"a variable of Slurm's is not a number: {error}") from None


def host_names(node_list: str) -> list[str]:
    """Every node of an abbreviated list, in Slurm's order. Raises UserError if scontrol is absent or fails."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`scontrol show hostnames {node_list}` does not work here: {error}") from None
    if done.returncode or not done.stdout.split():
        raise UserError(f"`scontrol show hostnames {node_list}` failed: {done.stderr.strip() or 'no nodes'}")
    return done.stdout.split()


def answering_nodes(nodes: Sequence[str], timeout_s: float) -> list[str]:
    """Those nodes that start a process within `timeout_s` seconds, in the same order."""

    def ask(node: str) -> bool:
        command = ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap", "true"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for stop in (None, process.terminate, process.kill):  # srun takes its step back if it is asked to end
            try:
                if stop:
                    stop()
                return process.wait(5 if stop else timeout_s) == 0 and stop is None
            except subprocess.TimeoutExpired:
                continue
        return False

    try:
        with ThreadPoolExecutor(_PROBES_AT_ONCE) as pool:
            answers = list(pool.map(ask, nodes))
    except FileNotFoundError:
        raise UserError("srun is not on PATH; start this in a batch script of Slurm") from None
    return [node for node, answer in zip(nodes, answers, strict=True) if answer]


def rendezvous_address(node: str, num_nodes: int, given: str | None) -> str:
    """The address of the rendezvous: `given` (MASTER_ADDR), else that of `node`, the first, as this host resolves it.

    Resolved here and not by the ranks: a container may know no host names. Raises UserError if it does not resolve, or
    resolves to this machine's loopback, where other nodes would look for it in vain.
    """
    if given:
        return given
    try:
        records = socket.getaddrinfo(node, None, proto=socket.IPPROTO_TCP)
    except OSError as error:
        raise UserError(
            f"the first node {node} does not resolve here ({error.strerror}); export MASTER_ADDR with its address before sbatch"
        ) from None
    addresses = sorted((str(info[4][0]) for info in records), key=lambda text: ":" in text)  # IPv4 first
    reachable = [
        text for text in addresses if num_nodes == 1 or not ipaddress.ip_address(text.split("%")[0]).is_loopback
    ]
    if not reachable:
        raise UserError(
            f"the first node {node} resolves to {addresses[0]} here, which other nodes cannot reach; export MASTER_ADDR with "
            "its address before sbatch"
        )
    return reachable[0]


def resolved_addresses(address: str) -> str:
    """What the rendezvous address resolves to on this host, comma-separated, for ranks to compare. Raises UserError."""
    try:
        return ",".join(addresses_of(address))
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={address} does not resolve here ({error.strerror}); export an address that it does"
        ) from None


def master_port(job_id: int, given: str | None) -> int:
    """The rendezvous port: `given` (MASTER_PORT), else one that two jobs on a node hardly share."""
    if not given:
        return 20000 + job_id % 20000
    if not given.isdigit() or not 0 < int(given) < 65536:
        raise UserError(f"MASTER_PORT={given} is not a port; export a number from 1 to 65535, or unset it")
    return int(given)


# ---- how many nodes, and who computes what ----------------------------------------------------------------------------


def nodes_needed(config: Config) -> int:
    """Nodes that the config's ranks fill."""
    return config.system.world_size // config.system.node_size


def fit_to_nodes(config: Config, num_available: int) -> tuple[int, list[str]]:
    """How many of `num_available` nodes to use, and the overrides of the config that keep its global batch on them.

    All that the config asks for if they are there. Else, with recovery.min_nodes set, the largest number of nodes whose
    ranks divide the global batch; a rank then computes more samples, in micro-batches no larger than before (they fit in
    memory). With virtual ranks each real one gets more of them, so that their number in all stays.

    Returns:
        The number of nodes, and overrides such as "system.world_size=8".

    Raises:
        UserError: there are too few nodes, or no number of them divides the global batch.
    """
    needed, least = nodes_needed(config), config.recovery.min_nodes
    if num_available >= needed:
        return needed, []
    if least is None:
        raise UserError(
            f"{num_available} nodes answer and the config needs {needed}; ask for spares (recovery.spare_nodes and sbatch "
            "--nodes=MIN-MAX), or let it go on with fewer (recovery.min_nodes)"
        )
    for nodes in range(num_available, least - 1, -1):
        world = nodes * config.system.node_size
        shares = _shares(config, world) if nodes else []
        if shares:
            return nodes, [f"system.world_size={world}", f"system.ranks_per_node={config.system.node_size}", *shares]
    if num_available < least:
        raise UserError(
            f"{num_available} nodes answer and recovery.min_nodes={least}; the config's full number is {needed}"
        )
    raise UserError(
        f"batch.global_batch_size={config.batch.global_batch_size} cannot be shared by {least} to {num_available} nodes of "
        f"{config.system.node_size} ranks; lower recovery.min_nodes or choose a global batch with more divisors"
    )


def _shares(config: Config, world: int) -> list[str]:
    """Overrides by which `world` ranks share the config's global batch; none if it cannot be shared evenly."""
    batch = config.batch
    if batch.virtual_ranks > 1:
        num_ranks = config.system.world_size * batch.virtual_ranks
        return [] if num_ranks % world else [f"batch.virtual_ranks={num_ranks // world}"]
    if batch.global_batch_size % world:
        return []
    samples_per_rank = batch.global_batch_size // world
    micro_batch_size = max(size for size in range(1, batch.micro_batch_size + 1) if samples_per_rank % size == 0)
    return [
        f"batch.micro_batch_size={micro_batch_size}",
        f"batch.gradient_accumulation_steps={samples_per_rank // micro_batch_size}",
    ]


# ---- starting ranks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendezvous:
    """Where ranks meet. `id` tells torchrun's agents of one start from those of another."""

    id: str
    address: str
    port: int


def srun_command(
    style: Style,
    nodes: Sequence[str],
    ranks_per_node: int,
    rendezvous: Rendezvous,
    command: Sequence[str],
    extra: str = "",
) -> list[str]:
    """The srun that runs `command`, a Python and its arguments, as every rank.

    Args:
        extra: further arguments of srun as one shell-quoted string (SRUN_ARGS).
    """
    python, *arguments = command
    per_node = ranks_per_node if style == "srun" else 1
    prefix = [
        "srun",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={per_node * len(nodes)}",
        f"--ntasks-per-node={per_node}",
        # 1: as soon as a rank has failed, Slurm sends the others SIGTERM, and SIGKILL after KillWait (30 s by default). Its
        # message is out by then (ranks write before they exit), and ranks that hang in a collective on it do not hold the
        # nodes until communication.timeout_s.
        "--kill-on-bad-exit=1",
        "--overlap",  # a step that still cleans up after a failure does not block its successor
        *shlex.split(extra),
    ]
    if style == "srun":
        return [*prefix, python, *arguments]
    torchrun = [
        python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={len(nodes)}",
        f"--nproc-per-node={ranks_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={rendezvous.id}",
        f"--rdzv-endpoint={rendezvous.address}:{rendezvous.port}",
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
        f"--shutdown-timeout={SHUTDOWN_S}",
    ]
    # Only the task knows whether it is on the first node, so a shell puts that in.
    line = f"exec {shlex.join(torchrun)} --rdzv-conf=is_host=$((SLURM_NODEID==0)) {shlex.join(arguments)}"
    return [*prefix, "bash", "-c", line]


def requeue(job: Job) -> str | None:
    """Have Slurm start the job again. Returns what scontrol says against it, None if it does it."""
    try:
        done = subprocess.run(["scontrol", "requeue", job.name], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return (done.stderr.strip() or f"scontrol ended with {done.returncode}") if done.returncode else None


def job_fields(name: int | str) -> dict[str, str]:
    """What `scontrol show job` says of a job; empty if it does not answer."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", str(name), "--oneliner"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {name: value for name, _, value in (word.partition("=") for word in done.stdout.split())}


def is_being_preempted(job: Job) -> bool:
    """Whether the job runs in the grace time of a preemption: if it ended now, Slurm would not start it again."""
    fields = job_fields(job.name)
    return fields.get("JobState") == "RUNNING" and fields.get("PreemptTime", "None") not in ("None", "Unknown", "")
