"""Start the config's ranks on this machine, watch them, end them together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from bert_fast.claims import CLAIM, claim_name
from bert_fast.config import Config
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode, is_restartable, of_signal
from bert_fast.launch.error_report import ERROR_FOLDER, causes_of, format_ranks, last_seen, read_reports
from bert_fast.launch.rendezvous_check import SECRET, new_secret
from bert_fast.run_folder import CHECKPOINTS, checkpoints_in, run_folder

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHER_PID = "BERT_FAST_LAUNCHER_PID"  # variable: the process that a rank must not outlive
_REAP_S = 5.0  # in which ranks may end by themselves once one has failed, and again after each signal


def run_local(config: Config, arguments: list[str], finished: Callable[[], int | None] = lambda: None) -> int:
    """Run `python arguments` once for every rank of the config.

    Signals are passed on to the ranks, which end at a step boundary. If a rank dies, the others are stopped and the
    message names it; then all start again from the last checkpoint, up to `recovery.max_restarts` times.

    Args:
        finished: asked before another start; the exit code of a run that has nothing left to do, else None.

    Returns:
        The exit code of the run: an `ExitCode`, or that of a signal.

    Raises:
        UserError: the config's ranks are for several nodes, or its port is taken.
    """
    world = config.system.world_size
    if config.system.node_size != world:
        raise UserError(
            f"system.world_size={world} spans {world // config.system.node_size} nodes; start it with torchrun or "
            "srun on each node (docs/cluster.md, Ranks by hand), or set system.ranks_per_node=null to run all ranks here"
        )
    max_restarts = config.recovery.max_restarts
    num_restarts = 0
    while True:
        code, signalled = _run_once(config, arguments)
        if not is_restartable(code) or signalled or num_restarts == max_restarts:
            return code
        done = finished()
        if done is not None:
            return done
        has_checkpoint = bool(checkpoints_in(run_folder(config) / CHECKPOINTS))
        arguments = [each for each in arguments if each != "--resume"] + ["--resume"] * has_checkpoint
        where = "the last checkpoint" if has_checkpoint else "the beginning: there is no checkpoint yet"
        num_restarts += 1
        print(f"restart {num_restarts} of {max_restarts} from {where}", flush=True)


def _run_once(config: Config, arguments: list[str]) -> tuple[int, bool]:
    """All ranks from start to end: the exit code, and whether the run was told to stop."""
    world = config.system.world_size
    port = config.system.master_port or _free_port()
    _check_port(port)
    with tempfile.TemporaryDirectory() as errors:
        for_all = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            ERROR_FOLDER: errors,
            LAUNCHER_PID: str(os.getpid()),
            CLAIM: claim_name(run_folder(config)),
            SECRET: new_secret(),
            # A lost rank is named in one line; torch's own warnings of it are stack traces
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }
        ranks = RankProcesses(Path(errors))
        with ranks.signals_forwarded():
            for rank in range(world):
                ranks.start(arguments, {**for_all, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            return ranks.watch(), ranks.signalled


class RankProcesses:
    """The rank processes of a run on this machine."""

    def __init__(
        self,
        errors: Path,
        start_process: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
        reap_s: float = _REAP_S,
    ) -> None:
        """
        Args:
            errors: the folder of the ranks' error reports.
            start_process: called as `subprocess.Popen` is.
            reap_s: seconds in which ranks may end by themselves once one has failed, and again after each signal.
        """
        self._errors, self._start_process, self._reap_s = errors, start_process, reap_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._forwarded: int | None = None  # the last signal that was passed on
        self._num_interrupts = 0
        self._ended_by_us: set[int] = set()

    @property
    def signalled(self) -> bool:
        """Whether a signal was passed on."""
        return self._forwarded is not None

    def start(self, arguments: list[str], variables: dict[str, str]) -> None:
        """Start one rank, in a session of its own: a terminal's Ctrl-C reaches the launcher alone, which passes it on."""
        if self._forwarded is None:
            environment = {**os.environ, **variables}
            command = [sys.executable, *arguments]
            self._processes.append(self._start_process(command, env=environment, start_new_session=True))
            if self._forwarded is not None:  # it came before the process was in the list
                self._processes[-1].send_signal(self._forwarded)

    @contextmanager
    def signals_forwarded(self) -> Iterator[None]:
        """Pass signals on to the ranks; leave none of them behind at the end."""
        previous = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            yield
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
            self._wait_for_all()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self._forwarded = number
        self._num_interrupts += number == signal.SIGINT
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if self._num_interrupts > 2 else number)

    def watch(self) -> int:
        """Wait for the ranks to end. Returns the exit code of the run; why it failed is printed."""
        while True:
            codes = [process.poll() for process in self._processes]
            if any(code not in (None, ExitCode.OK) for code in codes) or not codes:
                return self._end()
            if all(code == ExitCode.OK for code in codes):
                return ExitCode.OK
            time.sleep(0.05)

    def _end(self) -> int:
        """A rank has ended badly: let the others end by themselves or stop them, then name the cause."""
        self._wait_for_all()
        for stop in (subprocess.Popen.terminate, subprocess.Popen.kill):
            for rank, process in enumerate(self._processes):
                if process.poll() is None:
                    self._ended_by_us.add(rank)
                    stop(process)
            self._wait_for_all()
        # Not even SIGKILL ends what waits for a file system that does not answer: it has no return code
        codes = [-signal.SIGKILL if p.returncode is None else p.returncode for p in self._processes]
        if self._forwarded is not None and (not codes or any(code == -self._forwarded for code in codes)):
            name = signal.Signals(self._forwarded).name
            print(f"error: stopped by {name} before the first step; nothing was written", file=sys.stderr)
            return of_signal(self._forwarded)
        killed = [rank for rank, code in enumerate(codes) if code < 0 and rank not in self._ended_by_us]
        if killed:
            self._explain_killed({rank: signal.Signals(-codes[rank]).name for rank in killed})
            return ExitCode.LOST_RANK
        return self._explain_failed(codes)

    def _explain_killed(self, killed: dict[int, str]) -> None:
        """Print which ranks were killed, by which signal, and where the others saw the first of them last."""
        names = ", ".join(f"rank {rank} by {name}" for rank, name in killed.items())
        seen = last_seen(read_reports(self._errors), min(killed))
        print(
            f"error: a rank was killed: {names}; the others were stopped{f'; {seen}' if seen else ''}. Start again, or "
            "--resume from the last checkpoint",
            file=sys.stderr,
        )

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + self._reap_s
        while time.monotonic() < deadline and any(p.poll() is None for p in self._processes):
            time.sleep(0.02)

    def _explain_failed(self, codes: list[int]) -> int:
        """Print what the ranks that failed by themselves have reported, each text once. Returns their exit code."""
        own = [rank for rank, code in enumerate(codes) if code > 0 and code != ExitCode.LOST_RANK]
        culprits = own or [rank for rank, code in enumerate(codes) if code]
        reports = [report for report in read_reports(self._errors) if report.rank in culprits]
        for text, ranks in causes_of(reports).items():
            who = "" if len(ranks) == len(codes) else f"rank {format_ranks(ranks)}: "
            print(f"error: {who}{text}", file=sys.stderr)
        # A missed target is no failure, and neither is a run that a signal has stopped after it saved: no reports of them
        answers = {ExitCode.TARGET_MISSED, *(of_signal(number) for number in FORWARDED)}
        if not reports and not answers.intersection(codes):  # a rank that could not write its report any more
            print(
                f"error: rank {format_ranks(culprits)} ended with exit code {codes[culprits[0]]} and left no report; "
                "the lines above may say why. Start again, or --resume from the last checkpoint",
                file=sys.stderr,
            )
        return codes[culprits[0]] if codes[culprits[0]] > 0 else ExitCode.LOST_RANK


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
