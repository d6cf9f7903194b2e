"""The batch script's program: start the ranks of an allocation, watch them, restart or requeue, in one place.

    python -m bert_fast.launch.supervise --config C [--style srun|torchrun] [--runs N] [section.field=value ...]

Runs on the first node and needs no torch. What a run has come to is read from its folder, not from exit codes: torchrun's
is 1 for almost everything. Variables, signals and what is restarted: slurm/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bert_fast.claims import MARK, owner_of, remove_own
from bert_fast.config import Config
from bert_fast.config.load import load_config
from bert_fast.errors import UserError
from bert_fast.files import write_json
from bert_fast.launch import slurm
from bert_fast.launch.local import ERROR_FOLDER
from bert_fast.launch.rendezvous_check import HEAD_ADDRESSES, SECRET, new_secret
from bert_fast.run_folder import checkpoints_in, run_folder

EXIT_TARGET_MISSED, EXIT_USER = 1, 2  # as of run_pretraining.py
_HANDLED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_LOST = "lost contact with another rank"  # a consequence of some other rank's end, never the cause
_FRUITLESS = 3  # starts of a job without a step of progress, after which it is not requeued again
_FILES_LATE_S = 30.0  # on a network file system another node's file may show up late


@dataclass(frozen=True)
class PlannedRun:
    """One run of a submission: its folder and the overrides that make it this one."""

    folder: Path
    overrides: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        return (self.folder / "metrics.json").is_file()

    @property
    def is_stopped(self) -> bool:
        return (self.folder / "stopped.json").is_file()

    @property
    def last_step(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        found = checkpoints_in(self.folder / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0

    @property
    def has_checkpoint(self) -> bool:
        return self.last_step > 0


def plan_runs(config: Config, count: int) -> tuple[Path, list[PlannedRun]]:
    """The folder of a submission and its runs: the config's own, or `count` of them with seeds that count up."""
    run, seed = config.run, config.train.seed
    if count == 1:
        base = run_folder(config)
        return base, [PlannedRun(base, (f"run.folder={base}",))]
    base = Path(run.folder or Path(run.results_dir) / run.name)
    folders = [base / f"run_{index}" for index in range(count)]
    return base, [PlannedRun(f, (f"run.folder={f}", f"train.seed={seed + i}")) for i, f in enumerate(folders)]


class Supervisor:
    """All runs of one start of a job."""

    def __init__(
        self, config_path: str, overrides: list[str], style: slurm.Style, runs: int, variables: Mapping[str, str]
    ) -> None:
        started = time.time()
        self._variables = variables
        self._job = slurm.read_job(variables)
        self._config = load_config(config_path, overrides)
        self._config_path, self._overrides, self._style = config_path, overrides, style
        self._base, self._runs = plan_runs(self._config, runs)
        slurm.master_port(self._job.id, variables.get("MASTER_PORT"))  # refuse a wrong one now
        self._nodes = slurm.host_names(self._job.node_list)
        self._node_timeout_s = _seconds(variables, "NODE_TIMEOUT_S", 30.0)
        self._script = _script()
        self._signal: int | None = None
        self._forwarded = False
        self._step: subprocess.Popen[bytes] | None = None
        batch_start = variables.get("BERT_FAST_BATCH_START")
        self._start: dict[str, Any] = {
            "restart_count": self._job.restarts, "style": style, "nodes": self._nodes,
            "batch_start": float(batch_start) if batch_start else None, "supervisor_start": started, "attempts": [],
        }  # fmt: skip
        self._earlier = self._read_record()

    # ---- the whole ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Bring every run to its end, or this job to a stop. Returns the exit code of the batch script."""
        job = self._job
        say(
            f"job {job.id}, start {job.restarts + 1}, {len(self._nodes)} nodes ({job.node_list}), style {self._style}, "
            f"{len(self._runs)} run(s) in {self._base}"
        )
        if job.restarts == 0 and all(run.is_finished for run in self._runs):
            raise UserError(f"{self._base} already holds the finished run(s); choose another run.name or run.folder")
        for number in _HANDLED:
            signal.signal(number, self._on_signal)
        for run in self._runs:
            code = self._bring_to_end(run)
            if code is not None:
                self._write_record()
                return code
        self._write_record()
        missed = [run.folder.name for run in self._runs if _status(run.folder) == "target not reached"]
        say(
            f"all {len(self._runs)} run(s) are finished"
            + (f"; target not reached: {', '.join(missed)}" if missed else "")
        )
        return EXIT_TARGET_MISSED if missed else 0

    def _bring_to_end(self, run: PlannedRun) -> int | None:
        """Start a run until it is finished (None) or this job must end (an exit code)."""
        if run.is_finished:
            say(f"{run.folder}: finished before, skipped")
            return None
        for restart in range(self._config.recovery.max_restarts + 1):
            if self._signal is not None:
                return self._stopped(run)
            code, reason = self._attempt(run)
            if run.is_finished:
                say(f"{run.folder}: finished ({_status(run.folder)})")
                return None
            if run.is_stopped or self._signal is not None:
                return self._stopped(run)
            say(f"{run.folder}: failed: {reason}")
            if code == EXIT_USER:
                say("not restarted: there is something to mend in config, data or machine")
                return code
            if restart < self._config.recovery.max_restarts:
                say(f"restart {restart + 1} of recovery.max_restarts={self._config.recovery.max_restarts}")
        return code or 1

    def _stopped(self, run: PlannedRun) -> int:
        """After a signal: requeue the job if Slurm means to go on with it."""
        marker = json.loads((run.folder / "stopped.json").read_text(encoding="utf-8")) if run.is_stopped else None
        if marker:
            say(f"{run.folder}: stopped by {marker['signal']} at step {marker['step']}, all ranks saved")
        else:
            say(f"{run.folder}: signalled while it could not save; it goes on from its last checkpoint, if it has one")
        number = self._signal or int(getattr(signal, (marker or {}).get("signal") or "SIGTERM"))
        if number == signal.SIGUSR1:
            why = "SIGUSR1 says that the time limit or a preemption is near"
        elif slurm.is_being_preempted(self._job.id):
            why = "Slurm is preempting it"
        else:
            say(
                f"not requeued by us: {signal.Signals(number).name} came from scancel, or from Slurm, which requeues what it "
                "means to start again"
            )
            return 128 + number
        if self._is_stuck(run):
            say(
                f"not requeued: {_FRUITLESS} starts in a row have not got beyond step {run.last_step}; the time limit is too "
                "short for start-up and a checkpoint, or checkpoint.every_steps too long"
            )
            return 128 + number
        done = subprocess.run(["scontrol", "requeue", str(self._job.id)], capture_output=True, text=True)
        if done.returncode:
            say(f"job {self._job.id} could not be requeued: {done.stderr.strip()}; submit it again to go on")
            return 128 + number
        say(f"job {self._job.id} requeued: {why}")
        return 0

    def _is_stuck(self, run: PlannedRun) -> bool:
        """Whether this start of the job, and those before it, ended where the one before had."""
        self._start["reached"] = [sum(each.is_finished for each in self._runs), run.last_step]
        last = [start.get("reached") for start in self._earlier[1 - _FRUITLESS :]] + [self._start["reached"]]
        if not self._earlier:  # a run without a folder leaves no record: Slurm's own count has to do
            return self._job.restarts + 1 >= _FRUITLESS and self._start["reached"] == [0, 0]
        return len(last) == _FRUITLESS and all(each == last[0] for each in last)

    # ---- one start of the ranks ---------------------------------------------------------------------------------------

    def _attempt(self, run: PlannedRun) -> tuple[int, str]:
        """Run the ranks once. Returns srun's exit code and what went wrong, as far as ranks have said."""
        nodes, fitted = self._choose_nodes()
        record: dict[str, Any] = {"run": run.folder.name, "nodes": nodes, "nodes_asked": time.time()}
        address = slurm.head_address(nodes[0], len(nodes), self._variables.get("MASTER_ADDR"))
        given = self._variables.get("MASTER_PORT")
        # Another port each time, as the ranks before may still be cleaning up
        port = slurm.master_port(self._job.id + (0 if given else len(self._start["attempts"])), given)
        resume = run.has_checkpoint
        if (run.folder / MARK).is_file():  # else whatever is there is not a run's
            (run.folder / "stopped.json").unlink(missing_ok=True)  # of an earlier start; the run removes it too
        overrides = [*self._overrides, *run.overrides, *fitted]
        config = load_config(self._config_path, overrides)
        arguments = [self._script, "--config", self._config_path, *["--resume"] * resume, *overrides]
        means = slurm.resolved(address)
        meeting = means.split(",")[0] if self._style == "torchrun" else address  # the same machine for every torchrun
        name = f"{self._job.id}-{self._job.restarts}-{len(self._start['attempts'])}"
        command = slurm.srun_command(
            self._style, nodes, config.system.node_size, (name, meeting, port),
            self._variables.get("RANK_PYTHON") or sys.executable, arguments, self._variables.get("SRUN_ARGS", ""),
        )  # fmt: skip
        errors = (self._base.parent / f".{self._base.name}.errors-{name}").absolute()
        errors.mkdir(parents=True, exist_ok=True)
        variables = {
            "MASTER_ADDR": address, "MASTER_PORT": str(port), ERROR_FOLDER: str(errors), SECRET: new_secret(),
            # A lost rank is named in one line; torch's own warnings of it are stack traces
            "TORCH_CPP_LOG_LEVEL": self._variables.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }  # fmt: skip
        if self._style == "srun":  # torchrun tells ranks an address of its own
            variables[HEAD_ADDRESSES] = means
        how = "resumes" if resume else "starts"
        say(f"{run.folder}: {how} on {len(nodes)} node(s), {config.system.world_size} ranks, {address}:{port}")
        record |= {"resumed": resume, "world_size": config.system.world_size, "srun_started": time.time()}
        self._start["attempts"].append(record)
        code = self._run_step(command, variables)
        record |= {"srun_ended": time.time(), "srun_code": code}
        if code == 0 and self._signal is None:
            _wait_for(lambda: run.is_finished or run.is_stopped, _FILES_LATE_S)
        reason = (
            _explain(errors) or f"srun ended with code {code} and no rank has said why (see the lines of srun above)"
        )
        if any(path.read_text(encoding="ascii") == str(EXIT_USER) for path in errors.glob("code-*")):
            code = EXIT_USER  # torchrun's is always 1, and srun's the highest of all ranks
        remove_own(errors, ("rank-*", "code-*"))
        with contextlib.suppress(OSError):
            errors.rmdir()
        record["outcome"] = "finished" if run.is_finished else "stopped" if run.is_stopped or self._signal else "failed"
        if record["outcome"] == "failed":
            record["reason"] = reason
        self._write_record()
        return code, reason

    def _choose_nodes(self) -> tuple[list[str], list[str]]:
        """Nodes to use, of those that answer, and the overrides for fewer of them than the config wants."""
        alive = slurm.answering(self._nodes, self._node_timeout_s)
        for node in self._nodes:
            if node not in alive:
                say(f"node {node} does not answer within {self._node_timeout_s:g} s: left out")
        count, fitted = slurm.fit_to_nodes(self._config, len(alive))
        if fitted:
            say(
                f"goes on with {count} of {slurm.nodes_needed(self._config)} nodes, the same global batch: {' '.join(fitted)}"
            )
        if alive[count:]:
            say(f"spare: {', '.join(alive[count:])}")
        return alive[:count], fitted

    def _run_step(self, command: list[str], variables: dict[str, str]) -> int:
        """srun's exit code; signals that come meanwhile are passed on."""
        with subprocess.Popen(command, env={**self._variables, **variables}, start_new_session=True) as step:
            self._step, self._forwarded = step, False
            if self._signal is not None:  # it came while the nodes were asked
                self._forward(self._signal)
            code = step.wait()
        self._step = None
        return code if code >= 0 else 128 - code

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = self._signal or number
        if self._step is not None:
            self._forward(number)

    def _forward(self, number: int) -> None:
        """Once, as SIGUSR1: srun passes it to every task. Under torchrun SIGTERM is left to Slurm (see below)."""
        # scancel, requeue and preemption send SIGTERM to the tasks as well as to us, and a second signal would break off
        # torchrun's wait for ranks that save. Ranks by themselves do not mind.
        if self._forwarded or self._step is None or (self._style == "torchrun" and number == signal.SIGTERM):
            return
        self._forwarded = True
        say(f"{signal.Signals(number).name}: the ranks are asked to save and stop")
        self._step.send_signal(signal.SIGUSR1)

    # ---- supervise.json -----------------------------------------------------------------------------------------------

    def _read_record(self) -> list[dict[str, Any]]:
        path = self._base / "supervise.json"
        if not path.is_file():
            return []
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return list(record["starts"]) if record["job"] == self._job.id else []
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no record of this program's; move it, or choose another run.folder") from None

    def _write_record(self) -> None:
        """Times in seconds since 1970. A single run's folder gets it only once the run has made it: see check_folder."""
        if len(self._runs) == 1 and not (self._base / "commit.txt").is_file():
            return
        if owner_of(self._base):  # another job's run, beside which ours was refused
            return
        write_json(self._base / "supervise.json", {"job": self._job.id, "starts": [*self._earlier, self._start]})


def say(text: str) -> None:
    """One line with a time stamp."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervise: {text}", flush=True)


def _explain(folder: Path) -> str:
    """What ranks left to say, each text once; what only follows from another rank's end is dropped if there is more."""
    texts: dict[str, list[int]] = {}
    for path in sorted(folder.glob("rank-*"), key=lambda path: int(path.name.removeprefix("rank-"))):
        texts.setdefault(path.read_text(encoding="utf-8"), []).append(int(path.name.removeprefix("rank-")))
    causes = {text: ranks for text, ranks in texts.items() if not text.startswith(_LOST)} or texts
    return "; ".join(f"rank {_few(ranks)}: {text}" for text, ranks in causes.items())


def _few(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _status(folder: Path) -> str:
    record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return str(record.get("status", "no status"))


def _script() -> str:
    """run_pretraining.py of the working folder, else the one beside the package. Raises UserError."""
    beside = Path(__file__).resolve().parents[2] / "run_pretraining.py"
    for path in (Path("run_pretraining.py"), beside):
        if path.is_file():
            return str(path)
    raise UserError("no run_pretraining.py in the working folder; submit from the project's root")


def _seconds(variables: Mapping[str, str], name: str, default: float) -> float:
    text = variables.get(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not value > 0:
        raise UserError(f"{name}={text} is not a positive number of seconds")
    return value


def _wait_for(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and supervise; an error meant for a person is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True)
    parser.add_argument("--style", choices=slurm.STYLES, default="srun", help="what starts ranks (default %(default)s)")
    parser.add_argument("--runs", type=int, default=1, help="runs in this allocation, seeds counting up (default 1)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args(arguments)
    try:
        if args.runs < 1:
            raise UserError(f"--runs {args.runs} must be at least 1")
        return Supervisor(args.config, args.overrides, args.style, args.runs, dict(os.environ)).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER


if __name__ == "__main__":
    sys.exit(main())
