"""Before ranks are started: are the files that a config names there, and is there memory for so many processes?"""

from __future__ import annotations

from pathlib import Path

from bert_fast.balance.cost import read_cost
from bert_fast.config import Config
from bert_fast.config.choices import OBJECTIVES, attribute
from bert_fast.data.wordpiece import load_vocabulary
from bert_fast.errors import UserError
from bert_fast.hardware import machine_memory
from bert_fast.model.tensorflow_bundle import is_bundle
from bert_fast.run_folder import MODEL

_PROCESS_BYTES = 150 << 20  # of a rank that has imported torch and does nothing


def check_inputs(config: Config) -> None:
    """Things to find missing before ranks are started: only looks whether files are there."""
    stores = (("data.train", "train", config.data.train), ("evaluation.data", "eval", config.evaluation.data))
    for field, split, folder in stores:
        if not (Path(folder) / "manifest.json").is_file():
            if (Path(folder) / split / "manifest.json").is_file():
                raise UserError(
                    f"{folder} ({field}) holds stores and is not one itself; set {field}={Path(folder) / split}"
                )
            command = attribute(OBJECTIVES[config.train.objective].store).command
            benchmark = "" if OBJECTIVES[config.train.objective].on_pairs else ", or `make data` for the mini benchmark"
            raise UserError(
                f"no data at {folder} ({field}); make it with the {Path(command).name} command at the top of the config "
                f"file{benchmark}"
            )
    if config.balance.cost_path is not None:
        read_cost(config.balance.cost_path)
    checkpoint = config.checkpoint.init_from
    if checkpoint and not is_bundle(checkpoint) and not (Path(checkpoint) / "model.safetensors").is_file():
        raise UserError(
            f"checkpoint.init_from={checkpoint} is neither a folder with model.safetensors nor the prefix of a TensorFlow "
            f"checkpoint (PREFIX.index){_hint(Path(checkpoint))}"
        )


def check_room(config: Config) -> None:
    """Refuse to start more processes here than this machine's memory can hold. Raises UserError."""
    needed, there = config.system.world_size * _PROCESS_BYTES, machine_memory()
    if needed > there:
        raise UserError(
            f"system.world_size={config.system.world_size} processes here need at least {needed / 2**30:,.0f} GiB and "
            f"this machine has {there / 2**30:,.0f}; start fewer, or start them on several machines (docs/running.md)"
        )


def _hint(folder: Path) -> str:
    """What is in a folder that is no starting checkpoint: a run's final model, TensorFlow's files, a pickle."""
    bundles = [path.with_suffix("") for path in sorted(folder.glob("*.index")) if is_bundle(path.with_suffix(""))]
    inner = folder / MODEL
    if bundles or (inner / "model.safetensors").is_file():
        return f"; there is one: set checkpoint.init_from={bundles[0] if bundles else inner}"
    if (folder / "pytorch_model.bin").is_file():
        return "; its pytorch_model.bin is not read, as it can run code: load it elsewhere and save_pretrained() it"
    return ""


def checkpoint_vocabulary(folder: str | None) -> str | None:
    """Hash of the vocabulary that lies beside a starting checkpoint, if one does: stores must have been made with it."""
    if not folder:
        return None
    vocab = (Path(folder).parent if is_bundle(folder) else Path(folder)) / "vocab.txt"
    return load_vocabulary(vocab).sha256 if vocab.is_file() else None
