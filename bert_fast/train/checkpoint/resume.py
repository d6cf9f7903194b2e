"""Which checkpoint a run goes on from, and what it must have in common with the run that wrote it."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bert_fast.config import Config, as_plain
from bert_fast.config.choices import STRATEGIES
from bert_fast.errors import UserError
from bert_fast.run_folder import checkpoints_in
from bert_fast.train.checkpoint.storage import OtherFormatError, read_description, remove_partial, verify_checkpoint
from bert_fast.train.checkpoint.train_state import TrainState, parse_description
from bert_fast.train.collectives import broadcast_value, gather_floats
from bert_fast.train.environment import Environment

# What may differ between the run that wrote a checkpoint and the one that goes on: how fast, where, how long, how watched.
# Everything else decides which weights come out, and is refused.
MAY_CHANGE = (
    "run.*", "system.*", "recovery.*", "memory.*", "mlperf.clear_caches", "model.attention_backend", "model.last_layer",
    "data.train", "evaluation.data",  # where they lie; what is in them is compared by hash
    "data.allow_shared_text",
    "batch.micro_batch_size", "batch.gradient_accumulation_steps", "batch.shape_multiple",
    "batch.virtual_ranks",
    "evaluation.batch_size", "balance.prefetch",
    "communication.engine", "communication.bucket_mb", "communication.min_bucket_mb", "communication.max_bucket_mb",
    "communication.shard_optimizer", "communication.reshard_after_forward", "communication.shard_within_node",
    "communication.backend", "communication.timeout_s",
    "optimizer.step_per_bucket", "data.scrub_mb_per_s", "checkpoint.timeout_s",
    "checkpoint.init_from", "train.compile", "train.cuda_graphs", "train.deterministic", "train.warmup_batches",
    "train.max_steps", "evaluation.target_accuracy", "evaluation.every_samples", "evaluation.start_samples",
    "evaluation.at_start", "checkpoint.every_steps", "checkpoint.async_save", "checkpoint.keep_last",
    "checkpoint.save_final_model", "train.log_every_steps", "train.max_skipped_steps",
)  # fmt: skip


def resume_key(config: Config, train_sha256: str, eval_sha256: str) -> dict[str, Any]:
    """What a checkpoint keeps of its run for `check_key`: settings by name, hashes of the data sets.

    The number of ranks and how they share a global batch may change: the samples of the steps stay the same.
    """
    plain = as_plain(config)
    settings = {
        f"{section}.{name}": value
        for section, values in plain.items()
        for name, value in values.items()
        if not any(fnmatch.fnmatch(f"{section}.{name}", pattern) for pattern in MAY_CHANGE)
    }
    strategy = config.balance.strategy
    if STRATEGIES[strategy].draws_by_rank:  # its samples follow from the number of ranks
        settings[f"samples per rank ({strategy})"] = config.batch.samples_per_rank
    return {
        "settings": json.loads(json.dumps(settings)),
        "model": _hash({name: value for name, value in settings.items() if name.startswith("model.")}),
        "train data": train_sha256[:16],
        "eval data": eval_sha256[:16],
    }


def check_key(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model, data set or setting. Raises UserError with both values."""
    fix = "resume with the run's own config or start a new run"
    for name in ("train data", "eval data"):
        if theirs.get(name) != ours[name]:
            raise UserError(
                f"checkpoint {path} does not fit: {name} had the hash {theirs.get(name)} and has now {ours[name]}; "
                "resume with the store it was trained on or start a new run"
            )
    before, now = theirs.get("settings", {}), ours["settings"]
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not changed:
        return
    shown = "; ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in changed[:4])
    more = f" (and {len(changed) - 4} more)" if len(changed) > 4 else ""
    model = ""
    if theirs.get("model") != ours["model"]:
        model = f"another model (hash {theirs.get('model')}, now {ours['model']}): "
    raise UserError(f"checkpoint {path} does not fit this config: {model}{shown}{more}; {fix}")


def latest_valid_checkpoint(folder: Path, environment: Environment, log: Callable[[str], None]) -> Path:
    """The newest checkpoint whose files are as they were written; names those are not. A collective.

    Raises:
        UserError: there is no such checkpoint, or the newest is of another format.
    """
    if environment.is_main:
        remove_partial(folder)
    # Rank 0's view counts: on a network file system others may still see what is no longer there
    names = broadcast_value([path.name for path in reversed(checkpoints_in(folder))])
    damaged = []
    for path in (folder / name for name in names):
        wrong, other_format = None, None
        try:
            wrong = verify_checkpoint(path, environment.rank, environment.world_size)
        except OtherFormatError as error:
            other_format = str(error)
        flags = gather_floats([float(wrong is not None), float(other_format is not None)], environment.device)
        if flags[:, 1].any():  # an earlier one will be of that format too
            rank = int(flags[:, 1].argmax())
            raise UserError(other_format or f"rank {rank} finds checkpoint {path} to be of another format")
        if not flags[:, 0].any():
            return path
        rank = int(flags[:, 0].argmax())
        damaged.append(f"checkpoint {path} is damaged ({wrong or f'found by rank {rank}'})")
        log(f"warning: {damaged[-1]}; looking for an earlier one")
    if not damaged:
        raise UserError(f"--resume: {folder} has no complete checkpoint; start the run without --resume")
    raise UserError(f"{damaged[0]} and there is no earlier one that is whole; remove it and start the run anew")


def load_checkpoint(path: Path, key: dict[str, Any], state: TrainState, seed: int, log: Callable[[str], None]) -> None:
    """Load a checkpoint into `state`, on every rank by itself.

    Args:
        key: of the run that goes on (`resume_key`).
        seed: of the run, for random numbers that begin anew where another number of ranks wrote the checkpoint.

    Raises:
        UserError: it is damaged, or of another model, data set or setting.
    """
    description = parse_description(path, read_description(path))
    check_key(path, description.key, key)
    now = state.environment.world_size
    if description.world_size != now:
        log(
            f"resumed by {now} ranks, stopped by {description.world_size}: the same samples in the same steps, assigned to "
            "other ranks"
        )
    state.load(path, description, seed)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
