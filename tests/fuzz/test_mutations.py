"""Seeded damage to everything that is read: one line (UserError) or success, no traceback, no hang, no memory.

20 mutations of each kind of file in the ordinary tests, 200 in those marked slow.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import resource
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import ROOT
from support.steps import cpu_rank

from bert_fast.balance.cost import CostModel, read_cost
from bert_fast.config import Config
from bert_fast.config.load import config_from_tree, load_config
from bert_fast.data.formats.convert import export_store
from bert_fast.data.formats.mlperf import read_blocks
from bert_fast.data.recipe import read_recipe
from bert_fast.data.store import Store
from bert_fast.errors import UserError
from bert_fast.files import write_json
from bert_fast.launch.machine_file import load_machine_file
from bert_fast.mlperf.score import score_folder
from bert_fast.model.bert import BertForPretraining
from bert_fast.model.checkpoints import load_pretrained, save_pretrained
from bert_fast.model.tensorflow_bundle import TensorBundle
from bert_fast.train.checkpoint.resume import latest_valid_checkpoint, load_checkpoint, resume_key
from bert_fast.train.checkpoint.storage import as_bytes, write_checkpoint
from bert_fast.train.checkpoint.train_state import TrainState
from bert_fast.train.clock import Clock
from bert_fast.train.setup.build import build
from bert_fast.train.setup.warmup import synthetic_input

ODD = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"[/]",
    b"1e999",
    b"-1",
    b"NaN",
    b"null",
    b"[[[[",
    b"{",
    b"99999999999999999999",
    b"\x1b[2J",
)
LOG = [
    ("global_batch_size", 64), ("submission_division", "closed"), ("target_accuracy", 0.7), ("seed", 3), ("run_start", None),
    ("eval_accuracy", 0.5), ("eval_accuracy", 0.71), ("run_stop", None),
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four changes: flips, cuts, repeats, odd words."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        size = rng.choice((1, 1, 4, 8, rng.randrange(64)))
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + size]
        elif kind == 2:
            out[at:at] = out[at : at + size] * rng.randrange(4)
        elif kind == 3:
            out[at : at + size] = rng.choice(ODD)
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """A folder with one sound file or folder of every kind."""
    folder = tmp_path_factory.mktemp("originals")
    shutil.copytree(stores / "train", folder / "store")
    for form in ("tfrecord", "hdf5", "hdf5-variable"):
        export_store(stores / "train", folder / form, form, width=64, most_masked=20, per_file=50, log=lambda _: None)
    shutil.copy(ROOT / "configs/mini_cpu.yaml", folder / "config.yaml")
    shutil.copy(ROOT / "configs/data/pydocs_mini.yaml", folder / "recipe.yaml")
    shutil.copy(ROOT / "configs/systems/loopback.yaml", folder / "system.yaml")
    (folder / "cost.json").write_text(json.dumps({"planned_with": {"linear": 2.0, "quadratic": 0.5}, "fitted": None}))
    lines = [
        ":::MLLOG "
        + json.dumps(
            {"key": key, "value": value, "time_ms": 1000 * n, "metadata": {"epoch_num": 64 * n, "status": "success"}}
        )
        for n, (key, value) in enumerate(LOG)
    ]
    (folder / "result_0.txt").write_text("\n".join(lines) + "\n")
    config = checkpoint_config()
    save_pretrained(BertForPretraining(config.model), config.model, folder / "checkpoint")
    shutil.copytree(ROOT / "tests/golden/tensorflow", folder / "bundle")
    write_run_checkpoint(folder / "checkpoints")
    return folder


def state_of(config: Config) -> TrainState:
    return TrainState(build(config, cpu_rank()), cpu_rank(), Clock(), CostModel(2.0, 0.5), "a test")


def key_of(config: Config) -> dict[str, Any]:
    return resume_key(config, "a" * 64, "b" * 64)


def write_run_checkpoint(folder: Path) -> None:
    """What a run of one rank leaves after its first step."""
    config = checkpoint_config()
    state = state_of(config)
    state.components.step(synthetic_input(config, cpu_rank(), seed=0), lr=0.01)
    state.progress.step, state.progress.samples = 1, 2
    state.clock.load_state_dict({"elapsed": 1.0, "paused": {"checkpoint": 0.5}})
    own = as_bytes("rank.0", state.rank_state())
    write_checkpoint(folder, [*state.slices(), own], state.describe(key_of(config)), 0, 2, None)


def checkpoint_config() -> Config:
    return config_from_tree({
        "model": {
            "vocab_size": 40, "hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_positions": 16,
        },
        "data": {"max_seq_len": 16}, "batch": {"global_batch_size": 2, "micro_batch_size": 2}, "schedule": {"total_steps": 2},
        "train": {"max_steps": 2}, "evaluation": {"every_samples": 2},
    })  # fmt: skip


def read_store(path: Path) -> None:
    store = Store(path.parent)
    store.check(vocab_size=30_000, max_seq_len=512, vocab_sha256=None, sha256=None)
    ids = np.arange(min(len(store), 16))
    store.batch(ids)
    for index in ids.tolist():
        store[index]


def read_checkpoint(path: Path) -> None:
    config = checkpoint_config()
    with torch.no_grad():
        load_pretrained(BertForPretraining(config.model), config.model, path.parent)


def read_bundle(path: Path) -> None:
    bundle = TensorBundle(str(path).partition(".index")[0].partition(".data")[0])
    for name in list(bundle.entries)[:20]:
        bundle[name]


def read_run_checkpoint(path: Path) -> None:
    config, folder = checkpoint_config(), path.parent.parent
    random_state = torch.get_rng_state()
    try:
        found = latest_valid_checkpoint(folder, cpu_rank(), lambda _: None)
        load_checkpoint(found, key_of(config), state_of(config), 0, lambda _: None)
    finally:
        torch.set_rng_state(random_state)


def read_matching_run_checkpoint(path: Path) -> None:
    """With sizes and hashes of what is there now, so that the readers see the damage and not only the hash check."""
    manifest = path.parent / "complete.json"
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        body = json.loads(manifest.read_text(encoding="utf-8"))
        if path != manifest:
            data = path.read_bytes()
            body["files"][path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        body.pop("sha256", None)
        body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        write_json(manifest, body)
    read_run_checkpoint(path)


RUN_CHECKPOINT = {"manifest": "complete.json", "list of tensors": "tensors.json", "tensors": "__0_0.distcp"}
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("config.yaml", load_config),
    "recipe": ("recipe.yaml", read_recipe),
    "system file": ("system.yaml", load_machine_file),
    "cost file": ("cost.json", read_cost),
    "TFRecord": ("tfrecord/*", lambda path: list(read_blocks(path, 30_000))),
    "HDF5, rows of one length": ("hdf5/*", lambda path: list(read_blocks(path, 30_000))),
    "HDF5, rows of their own length": ("hdf5-variable/*", lambda path: list(read_blocks(path, 30_000))),
    "manifest": ("store/manifest.json", read_store),
    "offsets": ("store/offsets.npy", read_store),
    "lengths": ("store/lengths.npy", read_store),
    "tokens": ("store/samples.bin", read_store),
    "log": ("result_0.txt", score_folder),
    "safetensors": ("checkpoint/model.safetensors", read_checkpoint),
    "description": ("checkpoint/config.json", read_checkpoint),
    "TensorFlow index": ("bundle/*.index", read_bundle),
    "TensorFlow data": ("bundle/*.data-00000-of-00001", read_bundle),
    "checksums of blocks": ("store/blocks.npy", read_store),
    **{
        f"checkpoint, {what}{hashes}": (f"checkpoints/step-00000001/{name}", reader)
        for what, name in RUN_CHECKPOINT.items()
        for hashes, reader in (("", read_run_checkpoint), (" with its hash", read_matching_run_checkpoint))
    },
}


def attack(kind: str, originals: Path, tmp_path: Path, count: int) -> None:
    pattern, read = READERS[kind]
    source = sorted(originals.glob(pattern))[0]
    target = source
    if source.parent != originals:  # its neighbours belong to it
        shutil.copytree(source.parent, tmp_path / "copy" / source.parent.name)
        target = tmp_path / "copy" / source.parent.name / source.name
    else:
        target = tmp_path / source.name
    data = source.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failures = []
    for seed in range(count):
        target.unlink(missing_ok=True)
        target.write_bytes(mutated(data, random.Random(f"{kind}:{seed}")))
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                read(target)
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > 4000:
                failures.append(f"seed {seed}: not one line: {str(error)[:200]!r}")
        except Exception as error:
            failures.append(f"seed {seed}: {type(error).__name__}: {str(error)[:200]}")
        if time.monotonic() - start > 10:
            failures.append(f"seed {seed}: {time.monotonic() - start:.0f} s")
    assert not failures, f"{kind}: " + "\n".join(failures)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@pytest.mark.parametrize("kind", READERS)
def test_damage_is_one_line(kind: str, originals: Path, tmp_path: Path) -> None:
    attack(kind, originals, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_much_damage_is_one_line(kind: str, originals: Path, tmp_path: Path) -> None:
    attack(kind, originals, tmp_path, 200)


@pytest.mark.parametrize("name", ["key", "state", "world_size"])
@pytest.mark.parametrize("value", [None, [], "x"])
def test_a_checkpoint_of_another_form_is_one_line(name: str, value: object, originals: Path, tmp_path: Path) -> None:
    shutil.copytree(originals / "checkpoints", tmp_path / "checkpoints")
    manifest = tmp_path / "checkpoints/step-00000001/complete.json"
    write_json(manifest, {**json.loads(manifest.read_text(encoding="utf-8")), name: value})
    with pytest.raises(UserError, match=r"damaged \(complete\.json"):
        read_matching_run_checkpoint(manifest)
