"""A run's folder: the name of everything in it, and whether a run may start there. Without torch.

A run's own files are these and no others: only they are removed before a new start. No other module spells their names.
"""

from __future__ import annotations

from pathlib import Path

from bert_fast import claims
from bert_fast.config import Config, as_plain
from bert_fast.config.yaml_files import to_yaml
from bert_fast.errors import UserError
from bert_fast.files import write_atomically

CONFIG = "config.yaml"  # every setting, defaults included
COMMIT = "commit.txt"  # of the code that ran
NODES = "nodes.json"  # the host of every rank
PREFLIGHT = "preflight.json"
SUPERVISION = "supervise.json"  # what the supervisor of a Slurm job did: starts, nodes, reasons
STOPPED = "stopped.json"  # step and signal of a run that was stopped
RESULT_LOG = "result_0.txt"  # the MLPerf log
METRICS_LINES = "metrics.jsonl"  # a line per logging interval and per evaluation (report.schema)
TRACE = "trace.json"
PROFILER_TRACE = "profiler-0.json"
BUCKETS_CONFIG = "buckets.yaml"  # what `bucket_mb: auto` chose, as a piece of a config
BUCKETS_RECORD = "buckets.json"  # and what it was measured from
COST = "cost.json"  # the cost model, for `balance.cost` of a later run
CHECKPOINTS = "checkpoints"
MODEL = "model"  # the final model in Hugging Face form
FLIGHT = "flight"  # NCCL's flight records
TENSORBOARD = "tensorboard"
PENDING_RECORD = "finishing.json"  # the record of a run that is done, until the last of its files, RECORD, is there
REPORT = "report.html"
RECORD = "metrics.json"  # the record of the whole run (report.schema)

CHECKPOINT_MANIFEST = "complete.json"  # the last file of a checkpoint
CHECKPOINT_TENSORS = "tensors.json"
_STEP_PREFIX = "step-"
STEP_FOLDER = _STEP_PREFIX + 8 * "[0-9]"  # the name of a checkpoint, as a pattern
CHECKPOINT_FILES = ("__[0-9]*_[0-9]*.distcp", CHECKPOINT_TENSORS, CHECKPOINT_MANIFEST)
TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def checkpoint_name(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"{_STEP_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name. Raises ValueError for a folder of another name."""
    return int(checkpoint.name.removeprefix(_STEP_PREFIX))


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder of checkpoints, oldest first: those whose manifest is there."""
    return sorted(path.parent for path in folder.glob(f"{STEP_FOLDER}/{CHECKPOINT_MANIFEST}"))


RUN = claims.Kind(
    "a run",
    (
        CONFIG,
        COMMIT,
        NODES,
        PREFLIGHT,
        SUPERVISION,
        STOPPED,
        RESULT_LOG,
        METRICS_LINES,
        f"{TENSORBOARD}/events.out.tfevents.*",
        f"{FLIGHT}/nccl_trace_rank_*",
        TRACE,
        PROFILER_TRACE,
        BUCKETS_CONFIG,
        BUCKETS_RECORD,
        COST,
        *(
            f"{CHECKPOINTS}/{step}/{name}"
            for step in (STEP_FOLDER, f".{STEP_FOLDER}.tmp", f".{STEP_FOLDER}.old")
            for name in CHECKPOINT_FILES
        ),
        f"{MODEL}/config.json",
        f"{MODEL}/model.safetensors",
        *(f"{MODEL}/{name}" for name in TOKENIZER_FILES),
        PENDING_RECORD,
        REPORT,
        RECORD,
    ),
    "choose another run.name, run.folder or run.results_dir",
    alone=True,
    is_older=lambda folder: bool(checkpoints_in(folder / CHECKPOINTS)),
)


def run_folder(config: Config) -> Path:
    """Where a run writes."""
    run = config.run
    return Path(run.folder) if run.folder else Path(run.results_dir) / f"{run.name}-seed{config.train.seed}"


def check_folder(config: Config, resume: bool) -> None:
    """Refuse to write over a finished run, or over a stopped one without --resume. Changes nothing. Raises UserError."""
    folder = run_folder(config)
    if (folder / RECORD).exists():
        raise UserError(
            f"{folder} already holds a finished run; choose another run.name or run.folder, or remove it first"
        )
    has_checkpoint = bool(checkpoints_in(folder / CHECKPOINTS))
    if resume and not has_checkpoint and claims.owner_of(folder) is None:
        raise UserError(f"--resume: {folder} has no checkpoint; start the run without --resume")
    claims.check(folder, RUN)
    if has_checkpoint and not resume:
        raise UserError(f"{folder} holds a stopped run; continue it with --resume, or choose another run.name")


def take_folder(config: Config, resume: bool) -> None:
    """As `check_folder`, and the folder is this process's from then on: of two starts, one is refused here.

    Raises:
        UserError: naming the run that has it, or why no run may start there.
    """
    check_folder(config, resume)
    folder = run_folder(config)
    claims.claim(folder, RUN)
    try:
        check_folder(config, resume)  # another run may have ended there since
    except UserError:
        claims.release(folder)
        raise


def create_folder(config: Config, resume: bool, commit: str) -> Path:
    """Make the run's folder, remove what a run left that ended before its first checkpoint, record config and `commit`."""
    folder = run_folder(config)
    claims.claim(folder, RUN)
    if not resume:
        clear_run(folder)
        write_atomically(folder / CONFIG, to_yaml(as_plain(config)))
        write_atomically(folder / COMMIT, commit + "\n")
    return folder


def clear_run(folder: Path) -> None:
    """Remove a run's own files; the folder is claimed by the caller. Raises UserError where one of them is not a plain file."""
    for path in claims.remove_own(folder, RUN.writes):
        if any(path.match(name) and len(path.parts) == name.count("/") + 1 for name in RUN.writes):
            raise UserError(
                f"{folder / path} is not a file that a run has written; move it, or choose another run.folder"
            )
