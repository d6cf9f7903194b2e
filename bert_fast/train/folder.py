"""The run's folder: what is in it, and whether a run may start there."""

from __future__ import annotations

import shutil
from pathlib import Path

from bert_fast.balance.cost import read_cost
from bert_fast.cli import to_yaml
from bert_fast.config import Config, as_plain, run_folder
from bert_fast.errors import UserError
from bert_fast.files import checkpoints_in, sha256_of, write_atomically
from bert_fast.launch.code import commit
from bert_fast.launch.owner import claim, owner_of
from bert_fast.model.tensorflow_bundle import is_bundle


def check_folder(config: Config, resume: bool) -> None:
    """Refuse to write over a finished run, or over a stopped one without --resume. Raises UserError."""
    folder = run_folder(config)
    if (folder / "metrics.json").exists():
        raise UserError(
            f"{folder} already holds a finished run; choose another run.name or run.folder, or remove it first"
        )
    owner = owner_of(folder)
    if owner:
        raise UserError(
            f"{folder} is in use by {owner}; wait for it, stop it, or choose another run.name or run.folder"
        )
    has_checkpoint = bool(checkpoints_in(folder / "checkpoints"))
    if resume and not has_checkpoint:
        raise UserError(f"--resume: {folder} has no checkpoint; start the run without --resume")
    is_ours = has_checkpoint or (folder / "commit.txt").exists()
    if folder.is_dir() and not is_ours and any(folder.iterdir()):
        raise UserError(f"{folder} holds files that are not a run's; choose another run.name or run.folder")
    if has_checkpoint and not resume:
        raise UserError(f"{folder} holds a stopped run; continue it with --resume, or choose another run.name")


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
    """Make the run's folder and record config and commit in it."""
    folder = run_folder(config)
    try:
        if (folder / "commit.txt").exists() and not resume:  # remains of a run that ended before its first checkpoint
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the run's folder {folder}: {error.strerror}; set run.results_dir") from None
    claim(folder)
    if not resume:
        write_atomically(folder / "config.yaml", to_yaml(as_plain(config)))
        write_atomically(folder / "commit.txt", commit() + "\n")
    return folder


def checkpoint_vocabulary(folder: str | None) -> str | None:
    """Hash of the vocabulary that lies beside a starting checkpoint, if one does: stores must have been made with it."""
    if not folder:
        return None
    vocab = (Path(folder).parent if is_bundle(folder) else Path(folder)) / "vocab.txt"
    return sha256_of(vocab) if vocab.is_file() else None
