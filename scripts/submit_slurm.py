#!/usr/bin/env python3
"""Submit a config to Slurm from a copy of the code, and follow its output.

    python scripts/submit_slurm.py --config configs/bert_large_1024xa100_adam.yaml --dry-run      # shows the batch script
    python scripts/submit_slurm.py --config C --time 02:00:00 --partition gpu --runs 10 train.seed=7
    python scripts/submit_slurm.py --config C --container bert_fast.sqsh --no-tail

The number of nodes comes from the config, with its spares as a range. Code and config go to OUT/NAME-TIMESTAMP/, and the job
runs there: later edits do not reach it. GPUs are asked for as the cluster wants it, through sbatch's own variables
(SBATCH_GPUS_PER_NODE, SBATCH_GRES); further variables: slurm/README.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import guard  # noqa: F401

from bert_fast.command import guarded, whole
from bert_fast.config import Config, as_plain
from bert_fast.config.load import load_config
from bert_fast.config.yaml_files import to_yaml
from bert_fast.errors import UserError
from bert_fast.exit_codes import ExitCode
from bert_fast.files import write_atomically
from bert_fast.launch.provenance import COMMIT, commit
from bert_fast.launch.slurm import STYLES, job_fields, nodes_needed

ROOT = Path(__file__).resolve().parents[1]

COPIED = ("bert_fast", "slurm", "run_pretraining.py")  # what a job runs; no data, no history, no tests
PATHS = (
    ("data", "train"),
    ("evaluation", "data"),
    ("checkpoint", "init_from"),
    ("balance", "cost"),
)
SETTINGS = "system.yaml"  # the copy of system.machine_file
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
_PATIENCE = 20  # seconds of scontrol knowing nothing of the job before it counts as gone


def node_range(config: Config, asked: int | None) -> str:
    """What sbatch --nodes gets. Raises UserError if `asked` is not what the config's ranks fill."""
    needed, spare = nodes_needed(config), config.recovery.spare_nodes
    if asked is not None and asked != needed:
        system = config.system
        raise UserError(
            f"--nodes {asked} does not match the config: system.world_size={system.world_size} with "
            f"system.ranks_per_node={system.node_size} fills {needed} node(s); leave --nodes out or change the config"
        )
    return f"{needed}-{needed + spare}" if spare else str(needed)


def frozen(config: Config, folder: Path) -> str:
    """The whole config as YAML for a job that runs in `folder`: input paths absolute, output inside."""
    plain = as_plain(config)
    for section, name in _paths_in(plain):
        plain[section][name] = os.path.abspath(plain[section][name])
    plain["run"]["folder"] = str(folder / "run")
    if config.system.machine_file is not None:
        plain["system"]["machine_file"] = str(folder / SETTINGS)  # a copy: see `submit`
    return to_yaml(plain)


def _paths_in(plain: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that hold a path; `balance.cost` may also be a word or numbers."""
    return [
        (section, name)
        for section, name in PATHS
        if isinstance(plain[section][name], str) and plain[section][name] not in ("flops", "measure")
    ]


def render(config: Config, folder: Path, args: argparse.Namespace) -> str:
    """The batch script: directives and variables of this submission, then the shipped script."""
    recovery = config.recovery
    # Without --no-kill Slurm ends the job with its first lost node, before a spare could take its place
    no_kill = ["--no-kill"] if recovery.spare_nodes or recovery.min_nodes else []
    directives = [
        f"--job-name={config.run.name}",
        f"--nodes={node_range(config, args.nodes)}",
        "--ntasks-per-node=1",
        "--exclusive",
        "--requeue",
        "--open-mode=append",
        "--signal=B:USR1@120",
        f"--output={folder}/slurm-%j.out",
        *no_kill,
        *(f"--{name}={getattr(args, name)}" for name in ("time", "partition", "account") if getattr(args, name)),
    ]
    variables = {"STYLE": args.style, "RUNS": str(args.runs)}
    script = "slurm/pretrain.sbatch"
    if args.container:
        script, here = "slurm/pretrain_pyxis.sbatch", str(folder)
        inputs = {str(Path(path).parent) for path in _input_paths(config)}
        mounts = ",".join(f"{path}:{path}" for path in sorted({here, *inputs}))
        variables |= {"CONTAINER_IMAGE": args.container}
        variables |= {} if "CONTAINER_MOUNTS" in os.environ else {"CONTAINER_MOUNTS": mounts}
    if "PYTHON" not in os.environ:
        variables["PYTHON"] = sys.executable
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {each}" for each in directives)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return "\n".join([*lines, f"exec bash {script} config.yaml", ""])


def _input_paths(config: Config) -> list[str]:
    plain = as_plain(config)
    return [os.path.abspath(plain[section][name]) for section, name in _paths_in(plain)]


def copy_code(folder: Path) -> None:
    """Tracked and new files of the code; the installed package alone where there is no git."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *COPIED]
    try:
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
        names = listed.stdout.splitlines() if listed.returncode == 0 else []
    except FileNotFoundError:
        names = []
    if not names:
        names = [str(p.relative_to(ROOT)) for part in COPIED[:2] for p in (ROOT / part).rglob("*") if p.is_file()]
        names = [name for name in names if "__pycache__" not in name] + [COPIED[2]]
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def submit(config: Config, folder: Path, script: str) -> int:
    """Make the submission's folder and hand it to sbatch; the job's id."""
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch on this machine; run this on a login node of the cluster, or add --dry-run")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{folder} is another submission's, of the same second or by hand; submit again") from None
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; choose another --out") from None
    copy_code(folder)
    if config.system.machine_file is not None:
        shutil.copyfile(config.system.machine_file, folder / SETTINGS)
    write_atomically(folder / "config.yaml", frozen(config, folder))
    write_atomically(folder / COMMIT, commit() + "\n")
    write_atomically(folder / "job.sbatch", script)
    done = subprocess.run(["sbatch", "--parsable", "job.sbatch"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch refused {folder / 'job.sbatch'}: {done.stderr.strip()}")
    return int(done.stdout.strip().split(";")[0])


def follow(job_id: int, log: Path) -> int:
    """Show the job's output until it has ended; 0 if it completed."""
    shown, state, unanswered = 0, "", 0
    while True:
        ended = state in ENDED or unanswered > _PATIENCE  # asked before the last read: nothing of the output is missed
        if log.is_file():
            with open(log, "rb") as file:
                file.seek(shown)
                text = file.read()
            shown += len(text)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
        if ended:
            print(f"job {job_id} ended: {state if state in ENDED else 'Slurm knows it no more'}", flush=True)
            return ExitCode.OK if state == "COMPLETED" else ExitCode.TARGET_MISSED
        now = job_fields(job_id).get("JobState")
        unanswered = 0 if now else unanswered + 1
        if now is not None and now != state and now in ("PENDING", "RUNNING"):
            print(f"job {job_id}: {now.lower()}", flush=True)
        state = now or state
        time.sleep(1)


@guarded
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", required=True)
    parser.add_argument(
        "--nodes", type=whole(1, 10**6), help="checked against the config, which gives the number by itself"
    )
    parser.add_argument("--style", choices=STYLES, default="srun", help="what starts ranks (default %(default)s)")
    parser.add_argument(
        "--runs", type=whole(0, 10**6), default=1, help="runs in the job, seeds counting up (default %(default)s)"
    )
    parser.add_argument("--time", help="time limit as sbatch takes it")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--container", metavar="IMAGE", help="run the ranks in this image (pyxis)")
    parser.add_argument(
        "--out", metavar="FOLDER", default="runs/slurm", help="home of submissions (default %(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the batch script, submit nothing")
    parser.add_argument("--no-tail", action="store_true", help="return once the job is queued")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    args = parser.parse_intermixed_args()
    try:
        if args.runs < 1:  # without argparse's usage, as the other checks of a submission
            raise UserError(f"--runs {args.runs} must be at least 1")
        config = load_config(args.config, args.overrides)
        folder = Path(args.out).absolute() / f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        script = render(config, folder, args)
        if args.dry_run:
            print(script, end="")
            return 0
        job_id = submit(config, folder, script)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    log = folder / f"slurm-{job_id}.out"
    print(f"job {job_id}, folder {folder}, output {log}", flush=True)
    if args.no_tail:
        return 0
    try:
        return follow(job_id, log)
    except KeyboardInterrupt:
        print(f"\njob {job_id} goes on; end it with scancel {job_id}", file=sys.stderr)
        return ExitCode.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
