"""Start the config's ranks on this machine, watch them, end them together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from bert_fast.config import Config
from bert_fast.errors import UserError

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
EXIT_LOST_RANK = 4
ERROR_FOLDER = "BERT_FAST_ERROR_FOLDER"  # variable: where ranks leave their error texts for the launcher
_REAP_S = 5.0


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
            "(docs/running.md shows how)"
        )
    variables["RANK"], variables["WORLD_SIZE"] = variables["SLURM_PROCID"], variables["SLURM_STEP_NUM_TASKS"]
    variables["LOCAL_RANK"] = variables["SLURM_LOCALID"]


def run_local(config: Config, arguments: list[str]) -> int:
    """Run `python arguments` once for every rank of the config; returns the exit code of the run.

    Signals are passed on to the ranks, which end at a step boundary. If a rank dies, the others are stopped and the
    message names it.
    """
    world = config.system.world_size
    if config.system.node_size != world:
        raise UserError(
            f"system.world_size={world} spans {world // config.system.node_size} nodes; start it with torchrun or "
            "sbatch on each node (docs/running.md), or set system.ranks_per_node=null to run all ranks here"
        )
    port = config.system.master_port or _free_port()
    _check_port(port)
    with tempfile.TemporaryDirectory() as errors:
        processes = []
        for rank in range(world):
            variables = {
                **os.environ,
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), ERROR_FOLDER: errors,
            }  # fmt: skip
            # A session of its own: a terminal's Ctrl-C reaches the launcher alone, which passes it on once.
            processes.append(subprocess.Popen([sys.executable, *arguments], env=variables, start_new_session=True))
        return _watch(processes, Path(errors))


def _watch(processes: list[subprocess.Popen[bytes]], errors: Path) -> int:
    interrupts = 0

    def forward(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if interrupts > 2 else number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        while True:
            codes = [process.poll() for process in processes]
            if any(code not in (None, 0) for code in codes):
                return _end(processes, errors)
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(processes: list[subprocess.Popen[bytes]], errors: Path) -> int:
    """A rank has ended badly: let the others end by themselves or stop them, then name the cause."""
    for stop in (None, subprocess.Popen.terminate, subprocess.Popen.kill):
        for process in processes:
            if stop and process.poll() is None:
                stop(process)
                if stop is subprocess.Popen.terminate:
                    process.stopped_by_us = True  # type: ignore[attr-defined]
        deadline = time.monotonic() + _REAP_S
        while time.monotonic() < deadline and any(p.poll() is None for p in processes):
            time.sleep(0.02)
    codes = [p.returncode for p in processes]
    killed = [r for r, p in enumerate(processes) if p.returncode < 0 and not hasattr(p, "stopped_by_us")]
    if killed:
        names = ", ".join(f"rank {r} by {signal.Signals(-codes[r]).name}" for r in killed)
        print(
            f"error: a rank was killed: {names}; the others were stopped. Start again, or --resume from the last checkpoint",
            file=sys.stderr,
        )
        return EXIT_LOST_RANK
    own = [r for r, code in enumerate(codes) if code not in (0, EXIT_LOST_RANK) and code > 0]
    culprits = own or [r for r, code in enumerate(codes) if code]
    texts: dict[str, list[int]] = {}
    for rank in culprits:
        note = errors / f"rank-{rank}"
        if note.is_file():
            texts.setdefault(note.read_text(encoding="utf-8"), []).append(rank)
    for text, ranks in texts.items():
        who = "" if len(ranks) == len(processes) else f"rank {', '.join(map(str, ranks))}: "
        print(f"error: {who}{text}", file=sys.stderr)
    if not texts and own and codes[own[0]] == 1 and any(code != 1 for code in codes):
        print(f"error: rank {own[0]} failed (its message is above); the others were stopped", file=sys.stderr)
    return codes[culprits[0]] if codes[culprits[0]] > 0 else EXIT_LOST_RANK


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"port {port} (system.master_port) cannot be used: {error.strerror}; set system.master_port=0 to pick "
                "a free one"
            ) from None
