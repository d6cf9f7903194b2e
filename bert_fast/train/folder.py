"""The run's folder: what is in it, and whether a run may start there."""

from __future__ import annotations

from pathlib import Path

from bert_fast import claims
from bert_fast.balance.cost import read_cost
from bert_fast.cli import to_yaml
from bert_fast.config import Config, as_plain, run_folder
from bert_fast.data.tokenizer_files import TOKENIZER_FILES
from bert_fast.data.wordpiece import load_vocabulary
from bert_fast.errors import UserError
from bert_fast.files import CHECKPOINT_MANIFEST, STEP_FOLDER, checkpoints_in, write_atomically
from bert_fast.launch.code import commit
from bert_fast.model.tensorflow_bundle import is_bundle

CHECKPOINT_FILES = ("__[0-9]*_[0-9]*.distcp", "tensors.json", CHECKPOINT_MANIFEST)
FINISHING = "finishing.json"  # the record of a run that is done, until metrics.json, the last of its files, is there
RUN = claims.Kind(
    "a run",
    (
        "config.yaml", "commit.txt", "nodes.json", "preflight.json", "supervise.json", "stopped.json",
        "result_0.txt", "metrics.jsonl", "tensorboard/events.out.tfevents.*", "flight/nccl_trace_rank_*",
        "trace.json", "profiler-0.json", "buckets.yaml", "buckets.json", "cost.json",
        *(f"checkpoints/{step}/{name}" for step in (STEP_FOLDER, f".{STEP_FOLDER}.tmp", f".{STEP_FOLDER}.old")
          for name in CHECKPOINT_FILES),
        "model/config.json", "model/model.safetensors", *(f"model/{name}" for name in TOKENIZER_FILES),
        FINISHING, "report.html", "metrics.json",
    ),
    "choose another run.name, run.folder or run.results_dir",
    alone=True,
    is_older=lambda folder: bool(checkpoints_in(folder / "checkpoints")),
)  # fmt: skip


def check_folder(config: Config, resume: bool) -> None:
    """Refuse to write over a finished run, or over a stopped one without --resume. Changes nothing. Raises UserError."""
    folder = run_folder(config)
    if (folder / "metrics.json").exists():
        raise UserError(
            f"{folder} already holds a finished run; choose another run.name or run.folder, or remove it first"
        )
    has_checkpoint = bool(checkpoints_in(folder / "checkpoints"))
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


def check_inputs(config: Config) -> None:
    """Things to find missing before ranks are started: only looks whether files are there."""
    for split, folder in (("train", config.data.train), ("eval", config.data.eval)):
        if not (Path(folder) / "manifest.json").is_file():
            if (Path(folder) / split / "manifest.json").is_file():
                raise UserError(
                    f"{folder} (data.{split}) holds stores and is none; set data.{split}={Path(folder) / split}"
                )
            raise UserError(
                f"no data at {folder} (data.{split}); make it with the prepare_data.py command at the top of the "
                "config file, or `make data` for the mini benchmark"
            )
    if config.balance.cost_file is not None:
        read_cost(config.balance.cost_file)
    checkpoint = config.train.init_checkpoint
    if checkpoint and not is_bundle(checkpoint) and not (Path(checkpoint) / "model.safetensors").is_file():
        raise UserError(
            f"train.init_checkpoint={checkpoint} is neither a folder with model.safetensors nor the prefix of a TensorFlow "
            f"checkpoint (PREFIX.index){_hint(Path(checkpoint))}"
        )


def _hint(folder: Path) -> str:
    """What is in a folder that is no starting checkpoint: a run's final model, TensorFlow's files, a pickle."""
    bundles = [path.with_suffix("") for path in sorted(folder.glob("*.index")) if is_bundle(path.with_suffix(""))]
    inner = folder / "model"
    if bundles or (inner / "model.safetensors").is_file():
        return f"; there is one: set train.init_checkpoint={bundles[0] if bundles else inner}"
    if (folder / "pytorch_model.bin").is_file():
        return "; its pytorch_model.bin is not read, as it can run code: load it elsewhere and save_pretrained() it"
    return ""


def create_folder(config: Config, resume: bool) -> Path:
    """Make the run's folder, remove what a run left that ended before its first checkpoint, record config and commit."""
    folder = run_folder(config)
    claims.claim(folder, RUN)
    if not resume:
        clear_run(folder)
        write_atomically(folder / "config.yaml", to_yaml(as_plain(config)))
        write_atomically(folder / "commit.txt", commit() + "\n")
    return folder


def clear_run(folder: Path) -> None:
    """Remove a run's own files; the folder is claimed by the caller. Raises UserError where one of them is not a plain file."""
    for path in claims.remove_own(folder, RUN.writes):
        if any(path.match(name) and len(path.parts) == name.count("/") + 1 for name in RUN.writes):
            raise UserError(
                f"{folder / path} is not a file that a run has written; move it, or choose another run.folder"
            )


def checkpoint_vocabulary(folder: str | None) -> str | None:
    """Hash of the vocabulary that lies beside a starting checkpoint, if one does: stores must have been made with it."""
    if not folder:
        return None
    vocab = (Path(folder).parent if is_bundle(folder) else Path(folder)) / "vocab.txt"
    return load_vocabulary(vocab).sha256 if vocab.is_file() else None
