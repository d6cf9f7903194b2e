"""A task small enough for real runs in tests: a tiny language, its store, a config that learns it in seconds."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.training_run import ROOT

WORDS = {
    "colour": ["red", "blue", "green", "black", "white", "grey", "brown"],
    "animal": ["cat", "dog", "cow", "hen", "fox", "owl", "ant", "bee", "rat", "pig"],
    "verb": ["sees", "hears", "likes", "finds", "meets", "wants"],
    "place": ["house", "field", "river", "forest", "garden"],
}

CONFIG = {
    "run": {"name": "tiny", "tensorboard": False, "measure_peak_flops": False},
    "model": {
        "vocab_size": 200, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64,
        "max_positions": 32, "initializer_range": 0.06,
    },
    "data": {"max_seq_len": 32},
    "batch": {"global_batch_size": 16, "micro_batch_size": 8},
    "communication": {"bucket_mb": 0.02, "timeout_s": 60},
    "optimizer": {"name": "adamw", "lr": 0.01, "beta2": 0.98},
    "schedule": {"warmup_steps": 5, "total_steps": 1000},
    "train": {"precision": "fp32", "max_steps": 20, "log_every_steps": 1, "warmup_batches": 1},
    "evaluation": {"every_samples": 160},
    "system": {"world_size": 2, "device": "cpu", "threads_per_rank": 1},
}  # fmt: skip


def config_over(store: Path) -> dict[str, Any]:
    """The tiny config over a folder with train/ and eval/ stores; dropout is on, as by default."""
    config: dict[str, Any] = copy.deepcopy(CONFIG)
    config["data"] |= {"train": str(store / "train")}
    config["evaluation"] |= {"data": str(store / "eval")}
    return config


def write_text(path: Path, num_documents: int = 60) -> None:
    """Documents of the tiny language in MLCommons' form: one sentence a line, a blank line between documents."""
    rng = random.Random(0)

    def sentence() -> str:
        one, two = (f"{rng.choice(WORDS['colour'])} {rng.choice(WORDS['animal'])}" for _ in range(2))
        return f"the {one} {rng.choice(WORDS['verb'])} a {two} in the {rng.choice(WORDS['place'])} ."

    documents = ("\n".join(sentence() for _ in range(rng.randint(4, 12))) for _ in range(num_documents))
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")


def prepare_data(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """scripts/prepare_data.py as a person starts it."""
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def prepare_store(folder: Path) -> Path:
    """Make the text and the stores of the tiny language in `folder`; the folder that holds train/ and eval/."""
    (folder / "text").mkdir()
    write_text(folder / "text" / "tiny.txt")
    done = prepare_data(
        "--workers", "1", "--corpus", "mlcommons", "--input", folder / "text", "--out", folder / "store", "--vocab-size", "200",
        "--max-seq-len", "32", "--max-predictions", "5", "--dupe-factor", "3", "--eval-fraction", "0.2", "--seed", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "store"
