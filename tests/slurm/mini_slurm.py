"""A real Slurm on this machine: munged, slurmctld and two slurmd on loopback, in a temporary folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

NODES = ("node1", "node2")
PROGRAMS = ("sbatch", "srun", "scontrol", "slurmctld", "slurmd", "munged")
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")

# KillWait: a job that is cancelled or requeued has this long to save. cred_expire: Slurm holds a requeued job back until the
# credentials of its first start have expired, by default two minutes. It must not be let go sooner with StartTime=now: its
# second start then fails at once with the end of the first.
_CONFIG = """\
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=socket={run}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool.%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.%n.pid
SlurmctldLogFile={run}/slurmctld.log
SlurmdLogFile={run}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
MpiDefault=none
SlurmctldTimeout=10
SlurmdTimeout=6
KillWait=20
JobRequeue=1
SlurmdParameters=config_overrides
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{slurmd_port}-{slurmd_port_2}] CPUs=2 RealMemory=2000
PartitionName=debug Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class MiniSlurm:
    """A context: `with MiniSlurm() as slurm: slurm.command("sbatch", ...)`. Ends every process that it started."""

    def __init__(self) -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="mini_slurm-", dir="/tmp")
        )  # munge wants a short path for its socket
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))
        }
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> MiniSlurm:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        run = self.folder
        run.chmod(0o755)
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (run / name).mkdir()
        key = run / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._daemon(
            "munged", "--foreground", f"--socket={run}/munge.sock", f"--key-file={key}", f"--pid-file={run}/munged.pid",
            f"--log-file={run}/munged.log", f"--seed-file={run}/munged.seed", "--num-threads=2", "--force",
        )  # fmt: skip
        first, second = _two_adjacent_ports()
        (run / "slurm.conf").write_text(
            _CONFIG.format(run=run, ctld_port=_free_port(), slurmd_port=first, slurmd_port_2=second), encoding="utf-8"
        )
        self._wait((run / "munge.sock").exists, "munged made no socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._wait(lambda: self.states() == ["idle"] * len(NODES), "the nodes did not become idle", timeout=30)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.output", "ab") as output:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, start_new_session=True)
            )

    def _wait(self, condition: object, what: str, timeout: float = 15) -> None:
        deadline = time.monotonic() + timeout
        while not condition():  # type: ignore[operator]
            gone = [d.args[0] for d in self._daemons if d.poll() is not None]  # type: ignore[index]
            if gone or time.monotonic() > deadline:
                logs = "\n".join(f"{p.name}: {p.read_text(errors='replace')[-800:]}" for p in self.folder.glob("*.log"))
                raise RuntimeError(f"{what}; ended: {gone or 'none'}; states {self.states()}\n{logs}")
            time.sleep(0.1)

    def states(self) -> list[str]:
        """State of each node, as sinfo writes it; empty while the controller does not answer."""
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"], env=self.environment, capture_output=True, text=True
        )
        return done.stdout.split() if done.returncode == 0 else []

    def command(self, *command: str, variables: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run a command in this Slurm's environment; its standard output. Fails the test if it fails."""
        done = subprocess.run(
            command, env={**self.environment, **(variables or {})}, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}{done.stdout}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        text = self.command("scontrol", "show", "job", job_id, "--oneliner")
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait_for_end(self, job_id: str, timeout: float = 90) -> dict[str, str]:
        """The job's fields once it has ended."""
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(job_id)
            if job["JobState"] in _ENDED:
                return job
            assert time.monotonic() < deadline, f"job {job_id} is {job['JobState']} ({job['Reason']}) after {timeout} s"
            time.sleep(0.2)

    def end_jobs(self) -> None:
        """Cancel whatever is queued or running, and wait until the nodes are idle again."""
        subprocess.run(["scancel", "--signal=KILL", "--full", "--state=RUNNING", "--user=root"], env=self.environment)
        subprocess.run(["scancel", "--user=root"], env=self.environment)
        self._wait(lambda: self.states() == ["idle"] * len(NODES), "nodes stay busy", timeout=40)

    def processes(self) -> list[int]:
        """Living processes of this Slurm and its jobs: they carry its configuration's path in their environment."""
        mark = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                try:
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        found.append(int(folder.name))
                except OSError:
                    continue
        return found

    def close(self) -> None:
        """End every daemon and every process of a job; remove the folder."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(d.poll() is None for d in self._daemons):
            time.sleep(0.05)
        for pid in self.processes():  # slurmstepd and ranks, if a test has failed in the middle of a job
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for daemon in self._daemons:
            daemon.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _two_adjacent_ports() -> tuple[int, int]:
    while True:
        first = _free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
        return first, first + 1
