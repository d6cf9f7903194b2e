"""The batch script's program: start the ranks of an allocation, watch them, restart or requeue, in one place.

    python -m bert_fast.launch.supervise --config C [--style srun|torchrun] [--runs N] [section.field=value ...]

Runs on the first node and needs no torch. What a run has come to is read from its folder, not from exit codes: torchrun's
is 1 for almost everything. Why a rank has failed is read from its report (launch.error_report). Variables, signals and what
is restarted: slurm/README.md.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bert_fast.claims import MARK, owner_of, remove_own
from bert_fast.command import guarded, whole
from bert_fast.config import Config
from bert_fast.config.load import load_config
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode, of_signal
from bert_fast.files import write_json
from bert_fast.launch import slurm
from bert_fast.launch.error_report import ERROR_FOLDER, REPORT_FILES, ErrorReport, describe_causes, read_reports
from bert_fast.launch.rendezvous_check import RENDEZVOUS_ADDRESSES, SECRET, new_secret
from bert_fast.report.schema import TARGET_MISSED, read_record
from bert_fast.run_folder import (
    CHECKPOINTS,
    COMMIT,
    RECORD,
    STOPPED,
    SUPERVISION,
    checkpoints_in,
    run_folder,
    step_of,
)

MAX_RUNS = 10**6  # of one submission
_HANDLED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_MAX_STUCK_STARTS = 3  # starts of a job without a step of progress, after which it is not requeued again
_FILES_LATE_S = 30.0  # on a network file system another node's file may show up late


@dataclass(frozen=True)
class PlannedRun:
    """One run of a submission: its folder, and the overrides of the config that make it this one."""

    folder: Path
    overrides: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        """Whether the run has made its record, the last of its files."""
        return (self.folder / RECORD).is_file()

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has stopped the run, and all ranks have saved."""
        return (self.folder / STOPPED).is_file()

    @property
    def status(self) -> str:
        """How a finished run has ended, by its record."""
        return read_record(self.folder / RECORD).status

    @property
    def last_step(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        checkpoints = checkpoints_in(self.folder / CHECKPOINTS)
        return step_of(checkpoints[-1]) if checkpoints else 0

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run can be resumed."""
        return self.last_step > 0


def plan_runs(config: Config, num_runs: int) -> tuple[Path, list[PlannedRun]]:
    """The folder of a submission and its runs: the config's own, or `num_runs` of them with seeds that count up."""
    run, seed = config.run, config.train.seed
    if num_runs == 1:
        base = run_folder(config)
        return base, [PlannedRun(base, (f"run.folder={base}",))]
    base = Path(run.folder or Path(run.results_dir) / run.name)
    folders = [base / f"run_{index}" for index in range(num_runs)]
    return base, [PlannedRun(f, (f"run.folder={f}", f"train.seed={seed + i}")) for i, f in enumerate(folders)]


@dataclass(frozen=True)
class RankStart:
    """One start of all ranks of a run: the srun command, the variables that it adds, and what the log says of it."""

    command: list[str]
    variables: dict[str, str]
    errors: Path  # the folder of the ranks' error reports
    meeting_point: str
    world_size: int
    resumes: bool


class Supervisor:
    """All runs of one start of a job."""

    def __init__(
        self,
        config_path: str,
        overrides: list[str],
        style: slurm.Style,
        num_runs: int,
        variables: Mapping[str, str],
        requeues: bool = True,
    ) -> None:
        """
        Args:
            overrides: settings that replace the file's, for all runs.
            style: what starts ranks on the nodes.
            num_runs: runs to bring to their end, one after another.
            variables: the environment of the batch script.
            requeues: whether a job that Slurm stops is to be requeued; False where the job has more to do than these runs.

        Raises:
            UserError: this is no job of Slurm's, or the config or a variable is wrong.
        """
        started = time.time()
        self._variables = variables
        self._job = slurm.read_job(variables)
        self._config = load_config(config_path, overrides)
        self._config_path, self._overrides, self._style = config_path, overrides, style
        self._requeues = requeues
        self._base, self._runs = plan_runs(self._config, num_runs)
        slurm.master_port(self._job.id, variables.get("MASTER_PORT"))  # refuse a wrong one now
        self._nodes = slurm.host_names(self._job.node_list)
        self._node_timeout_s = _seconds(variables, "NODE_TIMEOUT_S", 30.0)
        self._script = _script()
        self._signal: int | None = None  # the first that came
        self._is_forwarded = False  # whether the ranks that run have been told of it
        self._step: subprocess.Popen[bytes] | None = None  # the srun that runs
        batch_start = variables.get("BERT_FAST_BATCH_START")
        self._attempts: list[dict[str, Any]] = []
        self._record: dict[str, Any] = {
            "restart_count": self._job.num_restarts,
            "style": style,
            "nodes": self._nodes,
            "batch_start": float(batch_start) if batch_start else None,
            "supervisor_start": started,
            "attempts": self._attempts,
        }
        self._earlier = self._read_earlier_starts()

    # ---- the whole ----------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Bring every run to its end, or this job to a stop.

        Returns:
            The exit code of the batch script.

        Raises:
            UserError: the runs were finished before, or too few nodes answer.
        """
        job = self._job
        log(
            f"job {job.id}, start {job.num_restarts + 1}, {len(self._nodes)} nodes ({job.node_list}), style {self._style}, "
            f"{len(self._runs)} run(s) in {self._base}"
        )
        if job.num_restarts == 0 and all(run.is_finished for run in self._runs):
            raise UserError(f"{self._base} already holds the finished run(s); choose another run.name or run.folder")
        for number in _HANDLED:
            signal.signal(number, self._on_signal)
        for run in self._runs:
            code = self._bring_to_end(run)
            if code is not None:
                self._write_record()
                return code
        self._write_record()
        return self._sum_up()

    def _sum_up(self) -> ExitCode:
        """The exit code of a job whose runs are all finished."""
        missed = [run.folder.name for run in self._runs if run.status == TARGET_MISSED]
        log(
            f"all {len(self._runs)} run(s) are finished" + (f"; {TARGET_MISSED}: {', '.join(missed)}" if missed else "")
        )
        return ExitCode.TARGET_MISSED if missed else ExitCode.OK

    def _bring_to_end(self, run: PlannedRun) -> int | None:
        """Start a run until it is finished (None) or this job must end (an exit code)."""
        if run.is_finished:
            log(f"{run.folder}: finished before, skipped")
            return None
        max_restarts = self._config.recovery.max_restarts
        num_restarts = 0
        while True:
            if self._signal is not None:
                return self._after_stop(run)
            code, reason = self._attempt(run)
            if run.is_finished:
                log(f"{run.folder}: finished ({run.status})")
                return None
            if run.is_stopped or self._signal is not None:
                return self._after_stop(run)
            log(f"{run.folder}: failed: {reason}")
            if code == ExitCode.USER_ERROR:
                log("not restarted: there is something to fix in config, data or machine")
                return code
            if num_restarts == max_restarts:
                return code or 1  # srun ended with 0, and still the run is not finished
            num_restarts += 1
            log(f"restart {num_restarts} of recovery.max_restarts={max_restarts}")

    # ---- after a signal -----------------------------------------------------------------------------------------------

    def _after_stop(self, run: PlannedRun) -> int:
        """Requeue the job if Slurm means to go on with it. Returns the exit code of the batch script."""
        number = self._stop_signal(run)
        if not self._requeues:
            return of_signal(number)
        why = self._why_requeue(number)
        if why is None:
            log(
                f"not requeued by us: {signal.Signals(number).name} came from scancel, or from Slurm, which requeues what it "
                "means to start again"
            )
            return of_signal(number)
        if self._is_stuck(run):
            log(
                f"not requeued: {_MAX_STUCK_STARTS} starts in a row have not got beyond step {run.last_step}; the time limit "
                "is too short for start-up and a checkpoint, or checkpoint.every_steps too long"
            )
            return of_signal(number)
        refusal = slurm.requeue(self._job)
        if refusal:
            log(f"job {self._job.name} could not be requeued: {refusal}; submit it again to go on")
            return of_signal(number)
        log(f"job {self._job.name} requeued: {why}")
        return ExitCode.OK

    def _stop_signal(self, run: PlannedRun) -> int:
        """The signal that has stopped a run: ours, or the one that its ranks have noted."""
        if not run.is_stopped:
            log(f"{run.folder}: signalled while it could not save; it goes on from its last checkpoint, if it has one")
            return self._signal or signal.SIGTERM
        marker = json.loads((run.folder / STOPPED).read_text(encoding="utf-8"))
        log(f"{run.folder}: stopped by {marker['signal']} at step {marker['step']}, all ranks saved")
        return self._signal or signal.Signals[marker["signal"] or "SIGTERM"]

    def _why_requeue(self, number: int) -> str | None:
        """Why the job has to ask Slurm for another start after a signal; None if it must not."""
        if number == signal.SIGUSR1:
            return "SIGUSR1 says that the time limit or a preemption is near"
        return "Slurm is preempting it" if slurm.is_being_preempted(self._job) else None

    def _is_stuck(self, run: PlannedRun) -> bool:
        """Whether this start of the job, and those before it, ended where the one before had."""
        reached = [sum(each.is_finished for each in self._runs), run.last_step]
        self._record["reached"] = reached
        if not self._earlier:  # a run without a folder leaves no record: Slurm's own count has to do
            return self._job.num_restarts + 1 >= _MAX_STUCK_STARTS and reached == [0, 0]
        last = [start.get("reached") for start in self._earlier[1 - _MAX_STUCK_STARTS :]]
        return len(last) + 1 == _MAX_STUCK_STARTS and all(each == reached for each in last)

    # ---- one start of the ranks ---------------------------------------------------------------------------------------

    def _attempt(self, run: PlannedRun) -> tuple[int, str]:
        """Run the ranks once. Returns srun's exit code, or that of a user error, and why they failed if they did."""
        nodes, fitted = self._choose_nodes()
        record: dict[str, Any] = {"run": run.folder.name, "nodes": nodes, "nodes_asked": time.time()}
        _forget_stop(run)
        start = self._prepare_start(run, nodes, fitted)
        log(
            f"{run.folder}: {'resumes' if start.resumes else 'starts'} on {len(nodes)} node(s), {start.world_size} ranks, "
            f"{start.meeting_point}"
        )
        record |= {"resumed": start.resumes, "world_size": start.world_size, "srun_started": time.time()}
        self._attempts.append(record)
        code = self._run_srun(start)
        record |= {"srun_ended": time.time(), "srun_code": code}
        if code == ExitCode.OK and self._signal is None:
            _wait_for(lambda: run.is_finished or run.is_stopped, _FILES_LATE_S)
        reports = _take_reports(start.errors)
        reason = describe_causes(reports) or (
            f"srun ended with code {code} and no rank has said why (see the lines of srun above)"
        )
        record["outcome"] = "finished" if run.is_finished else "stopped" if run.is_stopped or self._signal else "failed"
        if record["outcome"] == "failed":
            record["reason"] = reason
        self._write_record()
        if any(report.exit_code is ExitCode.USER_ERROR for report in reports):
            code = ExitCode.USER_ERROR  # torchrun's is always 1, and srun's the highest of all ranks
        return code, reason

    def _choose_nodes(self) -> tuple[list[str], list[str]]:
        """Nodes to use, of those that answer, and the overrides for fewer of them than the config wants."""
        alive = slurm.answering_nodes(self._nodes, self._node_timeout_s)
        for node in self._nodes:
            if node not in alive:
                log(f"node {node} does not answer within {self._node_timeout_s:g} s: left out")
        count, fitted = slurm.fit_to_nodes(self._config, len(alive))
        if fitted:
            wanted = slurm.nodes_needed(self._config)
            log(f"goes on with {count} of {wanted} nodes, the same global batch: {' '.join(fitted)}")
        if alive[count:]:
            log(f"spare: {', '.join(alive[count:])}")
        return alive[:count], fitted

    def _prepare_start(self, run: PlannedRun, nodes: Sequence[str], fitted: Sequence[str]) -> RankStart:
        """The next start of a run's ranks on `nodes`, with a rendezvous, a secret and an error folder of its own."""
        number = len(self._attempts)
        name = f"{self._job.id}-{self._job.num_restarts}-{number}"
        address = slurm.rendezvous_address(nodes[0], len(nodes), self._variables.get("MASTER_ADDR"))
        addresses = slurm.resolved_addresses(address)
        given = self._variables.get("MASTER_PORT")
        # Another port each time, as the ranks before may still be cleaning up
        port = slurm.master_port(self._job.id + (0 if given else number), given)
        overrides = [*self._overrides, *run.overrides, *fitted]
        system = load_config(self._config_path, overrides).system
        resumes = run.has_checkpoint
        python = self._variables.get("RANK_PYTHON") or sys.executable
        command = [python, self._script, "--config", self._config_path, *["--resume"] * resumes, *overrides]
        errors = (self._base.parent / f".{self._base.name}.errors-{name}").absolute()
        errors.mkdir(parents=True, exist_ok=True)
        variables = {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            ERROR_FOLDER: str(errors),
            SECRET: new_secret(),
            # A lost rank is named in one line; torch's own warnings of it are stack traces
            "TORCH_CPP_LOG_LEVEL": self._variables.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }
        if self._style == "srun":  # torchrun tells ranks an address of its own
            variables[RENDEZVOUS_ADDRESSES] = addresses
        # Every torchrun must find the same machine, whatever the name means on its node
        endpoint = addresses.split(",")[0] if self._style == "torchrun" else address
        rendezvous = slurm.Rendezvous(name, endpoint, port)
        extra = self._variables.get("SRUN_ARGS", "")
        srun = slurm.srun_command(self._style, nodes, system.node_size, rendezvous, command, extra)
        return RankStart(srun, variables, errors, f"{address}:{port}", system.world_size, resumes)

    def _run_srun(self, start: RankStart) -> int:
        """srun's exit code; signals that come meanwhile are passed on."""
        environment = {**self._variables, **start.variables}
        with subprocess.Popen(start.command, env=environment, start_new_session=True) as step:
            self._step, self._is_forwarded = step, False
            if self._signal is not None:  # it came while the nodes were asked
                self._forward(self._signal)
            code = step.wait()
        self._step = None
        return code if code >= 0 else of_signal(-code)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = self._signal or number
        if self._step is not None:
            self._forward(number)

    def _forward(self, number: int) -> None:
        """Once, as SIGUSR1: srun passes it to every task. Under torchrun SIGTERM is left to Slurm (see below)."""
        # scancel, requeue and preemption send SIGTERM to the tasks as well as to us, and a second signal would break off
        # torchrun's wait for ranks that save. Ranks by themselves do not mind.
        if self._is_forwarded or self._step is None or (self._style == "torchrun" and number == signal.SIGTERM):
            return
        self._is_forwarded = True
        log(f"{signal.Signals(number).name}: the ranks are asked to save and stop")
        self._step.send_signal(signal.SIGUSR1)

    # ---- supervise.json -----------------------------------------------------------------------------------------------

    def _read_earlier_starts(self) -> list[dict[str, Any]]:
        """The starts of this job that are in the record. Raises UserError if the file is not such a record."""
        path = self._base / SUPERVISION
        if not path.is_file():
            return []
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return list(record["starts"]) if record["job"] == self._job.id else []
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no record of this program's; move it, or choose another run.folder") from None

    def _write_record(self) -> None:
        """Times in seconds since 1970. A single run's folder gets it only once the run has made it: see check_folder."""
        if len(self._runs) == 1 and not (self._base / COMMIT).is_file():
            return
        if owner_of(self._base):  # another job's run, beside which ours was refused
            return
        write_json(self._base / SUPERVISION, {"job": self._job.id, "starts": [*self._earlier, self._record]})


def log(text: str) -> None:
    """Print one line with a time stamp."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervise: {text}", flush=True)


def _forget_stop(run: PlannedRun) -> None:
    """Remove the mark that an earlier start was stopped, which the run would remove too."""
    if (run.folder / MARK).is_file():  # else whatever is there is not a run's
        (run.folder / STOPPED).unlink(missing_ok=True)


def _take_reports(errors: Path) -> list[ErrorReport]:
    """What the ranks of a start have reported; their folder is removed."""
    reports = read_reports(errors)
    remove_own(errors, REPORT_FILES)
    with contextlib.suppress(OSError):
        errors.rmdir()
    return reports


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
    if not 0 < value <= 86_400:
        raise UserError(f"{name}={text} is not a number of seconds above 0 and up to 86,400")
    return value


def _wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)


@guarded
def main() -> int:
    """Parse the command line and supervise. Returns the exit code of the batch script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True)
    parser.add_argument("--style", choices=slurm.STYLES, default="srun", help="what starts ranks (default %(default)s)")
    parser.add_argument(
        "--runs",
        type=whole(0, MAX_RUNS),
        default=1,
        help="runs in this allocation, seeds counting up (default %(default)s)",
    )
    parser.add_argument(
        "--no-requeue",
        action="store_true",
        help="never requeue the job: whoever started this decides (slurm/tune.sbatch)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args()
    if args.runs < 1:  # without argparse's usage, as the other checks of a submission
        raise UserError(f"--runs {args.runs} must be at least 1")
    variables, requeues = dict(os.environ), not args.no_requeue
    return Supervisor(args.config, args.overrides, args.style, args.runs, variables, requeues).run()


if __name__ == "__main__":
    sys.exit(main())
